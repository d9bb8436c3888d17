"""A GGUF file, once: dequantised into a directory that loads in a second and identifies itself."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import shutil
import time
import uuid
from pathlib import Path

from embedcache.base.home import home
from embedcache.base.identity import SOURCE_FILE
from embedcache.base.reason import reason
from embedcache.base.weight_hash import weight_hash
from embedcache.errors import BaseModelError
from embedcache.store.files import fsync_path, publish_json

CONVERTER = 1
"""Raise it when the files that ``_write_base`` makes of a GGUF file change in meaning."""

_log = logging.getLogger("embedcache")


def converted_gguf(gguf: Path) -> Path:
    """Return a directory in transformers' layout with what ``gguf`` holds, converting it once.

    The directory is ``home()/bases/<16 hex of the GGUF's SHA-256>-v<converter>``: weights
    dequantised and rounded to bfloat16, tied weights stored once, tokenizer and chat template.
    Raises ``BaseModelError`` if the file is not a GGUF that transformers reads, or gguf or
    accelerate is not installed.
    """
    with gguf.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise BaseModelError(
            f"a GGUF file begins with the bytes GGUF; {gguf} begins with {magic!r}. "
            "Download it again (a Git LFS pointer is a small text file)."
        )
    sha256 = weight_hash(gguf)
    directory = home() / "bases" / f"{sha256[:16]}-v{CONVERTER}"
    if (directory / SOURCE_FILE).is_file():
        return directory
    for library in ("gguf", "accelerate"):
        if importlib.util.find_spec(library) is None:
            raise BaseModelError(
                f"reading {gguf.name} needs the library {library}, which is not installed. "
                "Type: pip install 'embedcache[gguf]'"
            )
    _log.info("converting %s to %s, once; this takes a minute", gguf, directory)
    started = time.monotonic()
    partial = directory.with_name(f".{directory.name}.{uuid.uuid4().hex[:8]}.partial")
    partial.mkdir(parents=True)
    try:
        _write_base(gguf, partial)
        publish_json(partial / SOURCE_FILE, {"gguf_sha256": sha256, "converter": CONVERTER})
        for path in (*partial.iterdir(), partial):
            fsync_path(path)
        try:
            partial.rename(directory)
        except OSError:
            # Another process published the same directory first; ours says the same.
            if not (directory / SOURCE_FILE).is_file():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    fsync_path(directory.parent)
    _log.info("converted %s in %.0f s", gguf.name, time.monotonic() - started)
    return directory


def _write_base(gguf: Path, directory: Path) -> None:
    import torch
    from safetensors.torch import save_file
    from transformers import AutoTokenizer

    from embedcache.base.pretrained import UNREADABLE, read_model
    from embedcache.base.quiet import quiet_transformers

    # transformers draws the bar of a dequantisation whatever its settings say.
    with quiet_transformers(), contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        except UNREADABLE as error:
            raise BaseModelError(
                f"transformers cannot read {gguf}: {reason(error)} "
                "Use the model's safetensors instead: give its hub id or a directory."
            ) from error
        model = read_model(gguf.parent, dtype=torch.bfloat16, gguf_file=gguf.name)
        # The model stays marked as quantised, and transformers then refuses to save it.
        config = model.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        config.architectures = [type(model).__name__]
        config.save_pretrained(directory)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    _log.debug("transformers said while converting: %s", said.getvalue())
    weights: dict[str, torch.Tensor] = {}
    stored: set[int] = set()
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in stored:
            stored.add(tensor.data_ptr())
            weights[name] = tensor.contiguous()
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    # safetensors writes for its owner alone; a shared home is for everyone who may read it.
    (directory / "model.safetensors").chmod((directory / "config.json").stat().st_mode)
