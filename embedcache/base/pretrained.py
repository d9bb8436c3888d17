"""A causal language model read from files, every weight from them or none at all."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel

from embedcache.base.quiet import quiet_transformers
from embedcache.base.reason import reason
from embedcache.errors import BaseModelError

UNREADABLE = (
    OSError,
    ValueError,
    LookupError,
    ImportError,
    NotImplementedError,
    SafetensorError,
    struct.error,
)
"""What transformers, safetensors and gguf raise for files that are damaged or unknown to them."""


def read_model(
    directory: Path, *, dtype: torch.dtype, gguf_file: str | None = None
) -> PreTrainedModel:
    """Return the model in ``directory``, or in its file ``gguf_file``, on the CPU in ``dtype``.

    Raises ``BaseModelError`` if it cannot be read, or its weights do not fit its configuration.
    """
    where = directory if gguf_file is None else directory / gguf_file
    # transformers types what this returns without its loading report.
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
                # Only so that the report below names them: they are refused.
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except UNREADABLE as error:
        raise BaseModelError(
            f"the base in {where} cannot be loaded: {reason(error)} Download it again, or use a "
            "base that AutoModelForCausalLM.from_pretrained loads."
        ) from error
    # transformers fills both with random numbers and goes on.
    if missing := sorted(report["missing_keys"]):
        raise BaseModelError(
            f"the weights in {where} are not whole: {len(missing)} are missing, such as "
            f"{missing[0]}. A base needs its head, too: use the causal language model's own files."
        )
    if mismatched := sorted(report["mismatched_keys"]):
        name, found, expected = mismatched[0]
        raise BaseModelError(
            f"the weights in {where} are not those of its config.json: {name} should be "
            f"{list(expected)}, found {list(found)}. Download both again from one revision."
        )
    return model
