"""Convert a GGUF file, once, to a directory in transformers' layout."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import shutil
import time
import uuid
from pathlib import Path

from embedcache.base.home import home, weight_hash
from embedcache.base.identity import SOURCE_FILE
from embedcache.base.pretrained import UNREADABLE, first_line, quiet_transformers, read_model
from embedcache.errors import BaseModelError
from embedcache.store.files import fsync_path, publish_json

CONVERTER = 1
"""Version of the conversion. Raise it when ``_write_base`` writes different files."""

_log = logging.getLogger("embedcache")


def converted_gguf(gguf: Path) -> Path:
    """Return a directory in transformers' layout with the model of a GGUF file.

    The directory is ``home()/bases/<16 hex of the GGUF's SHA-256>-v<converter>``. It holds the
    weights, dequantised and rounded to bfloat16, with tied weights stored once, the tokenizer and
    the chat template.

    Raises:
        BaseModelError: transformers cannot read the file, or gguf or accelerate is not installed.
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
                "Run: pip install 'embedcache[gguf]'"
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
            # Another process may have published the same directory first.
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

    # transformers shows the progress bar of a dequantisation whatever its settings are.
    with quiet_transformers(), contextlib.redirect_stderr(io.StringIO()) as printed:
        try:
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        except UNREADABLE as error:
            raise BaseModelError(
                f"transformers cannot read {gguf}: {first_line(error)} "
                "Use the model's safetensors instead: give its hub id or a directory."
            ) from error
        model = read_model(gguf.parent, dtype=torch.bfloat16, gguf_file=gguf.name)
        # transformers refuses to save a model that is still marked as quantised.
        config = model.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        config.architectures = [type(model).__name__]
        config.save_pretrained(directory)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    _log.debug("transformers printed while converting: %s", printed.getvalue())
    weights: dict[str, torch.Tensor] = {}
    stored: set[int] = set()
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in stored:
            stored.add(tensor.data_ptr())
            weights[name] = tensor.contiguous()
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    # safetensors lets only the owner read its file; give it the mode of the others.
    (directory / "model.safetensors").chmod((directory / "config.json").stat().st_mode)
