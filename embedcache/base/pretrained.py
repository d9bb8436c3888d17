"""The files of a base directory, read with transformers: configuration, tokenizer and model.

transformers and torch are imported inside the functions, so that ``identity`` and ``locate`` stay
light.
"""

from __future__ import annotations

import contextlib
import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from embedcache.errors import BaseModelError

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

UNREADABLE = (
    OSError,
    ValueError,
    LookupError,
    ImportError,
    NotImplementedError,
    SafetensorError,
    struct.error,
)
"""The errors of transformers, safetensors and gguf for files that are damaged or unknown."""


def first_line(error: BaseException) -> str:
    """Return the first line of another library's message, with a full stop.

    >>> first_line(ValueError("no such thing\\nLong advice follows"))
    'no such thing.'
    """
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].strip().rstrip(".:") + "."


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' progress bars and warnings inside the context."""
    from transformers.utils import logging as untyped

    logging: Any = untyped
    verbosity = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file of a base; raise ``BaseModelError`` if there is none."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise BaseModelError(
            f"a base is a directory with config.json, *.safetensors and tokenizer files; "
            f"found no {path}. Check the path, or download the model again."
        ) from error
    except ValueError as error:
        raise BaseModelError(
            f"{path} should hold JSON; found: {error}. Download the model again."
        ) from error
    if not isinstance(value, dict):
        raise BaseModelError(
            f"{path} should hold a JSON object; found a {type(value).__name__}. "
            "Download the model again."
        )
    return value


def architecture(config: Mapping[str, Any]) -> str:
    """Return the model class that a parsed config.json names, else its model type.

    >>> architecture({"architectures": ["LlamaForCausalLM"], "model_type": "llama"})
    'LlamaForCausalLM'
    """
    declared = config.get("architectures") or [config.get("model_type", "unknown")]
    return str(declared[0])


def read_config(directory: Path) -> PretrainedConfig:
    """Return the configuration in ``directory``; remote code is never run.

    Raises:
        BaseModelError: the installed transformers does not know the architecture.
    """
    from transformers import AutoConfig

    try:
        with quiet_transformers():
            return AutoConfig.from_pretrained(
                directory, trust_remote_code=False, local_files_only=True
            )
    except (OSError, ValueError, KeyError) as error:
        found = architecture(read_json(directory / "config.json"))
        raise BaseModelError(
            f"a base is a causal language model that transformers itself knows; found {found} "
            f"in {directory}, and embedcache runs no code that comes with a model. A newer "
            f"transformers may know it: pip install --upgrade transformers. ({first_line(error)})"
        ) from error


def read_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer in ``directory``; raise ``BaseModelError`` if it cannot be read."""
    from transformers import AutoTokenizer

    try:
        with quiet_transformers():
            return AutoTokenizer.from_pretrained(
                directory, trust_remote_code=False, local_files_only=True
            )
    except UNREADABLE as error:
        raise BaseModelError(
            f"the tokenizer in {directory} cannot be loaded: {first_line(error)} "
            "Download the model again."
        ) from error


def read_model(
    directory: Path, *, dtype: torch.dtype, gguf_file: str | None = None
) -> PreTrainedModel:
    """Return the causal language model in ``directory``, on the CPU in ``dtype``.

    Args:
        directory: a directory in transformers' layout.
        dtype: dtype of the weights.
        gguf_file: name of a GGUF file in ``directory`` to read instead.

    Raises:
        BaseModelError: the model cannot be read, a weight is missing, or a weight has another
            shape than the configuration says.
    """
    from transformers import AutoModelForCausalLM

    path = directory if gguf_file is None else directory / gguf_file
    # transformers' types do not know of output_loading_info.
    auto: Any = AutoModelForCausalLM
    try:
        with quiet_transformers():
            model, report = auto.from_pretrained(
                directory,
                dtype=dtype,
                gguf_file=gguf_file,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                # Mismatched sizes are refused below, where the message can name them.
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except UNREADABLE as error:
        raise BaseModelError(
            f"the base in {path} cannot be loaded: {first_line(error)} Download it again, or use "
            "a base that AutoModelForCausalLM.from_pretrained loads."
        ) from error
    # transformers fills missing and mismatched weights with random numbers and only warns.
    if missing := sorted(report["missing_keys"]):
        raise BaseModelError(
            f"the weights in {path} are incomplete: {len(missing)} are missing, such as "
            f"{missing[0]}. A base needs its head too: use the files of the causal language model."
        )
    if mismatched := sorted(report["mismatched_keys"]):
        name, found, expected = mismatched[0]
        raise BaseModelError(
            f"the weights in {path} do not fit its config.json: {name} should be "
            f"{list(expected)}, found {list(found)}. Download both again from one revision."
        )
    return model
