"""Loading a base: frozen, in evaluation mode, its head checked against its own logits."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from embedcache.base.head import Head
from embedcache.base.identity import BaseIdentity, identify, tokenizer_hash
from embedcache.base.locate import locate, named
from embedcache.base.pretrained import UNREADABLE, read_model
from embedcache.base.quiet import quiet_transformers, read_config
from embedcache.base.reason import reason
from embedcache.base.self_check import check_base
from embedcache.device import resolve_device, resolve_dtype
from embedcache.errors import BaseModelError, IdentityError


@dataclass(frozen=True, kw_only=True, slots=True)
class Base:
    """A loaded base: its model takes no gradients and is in evaluation mode."""

    identity: BaseIdentity
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    head: Head
    device: torch.device
    dtype: torch.dtype


def load_identity(spec: str | os.PathLike[str], *, revision: str | None = None) -> BaseIdentity:
    """Return the identity of the base that ``spec`` names, loading no weights.

    Raises ``BaseModelError`` if it is not a causal language model.
    """
    spec = os.fspath(spec)
    directory = locate(spec, revision=revision)
    _require_causal(directory)
    return identify(directory, name=named(spec, revision))


def load_tokenizer(
    spec: str | os.PathLike[str], *, revision: str | None = None
) -> PreTrainedTokenizerBase:
    """Return the tokenizer of the base that ``spec`` names, loading no weights."""
    return _read_tokenizer(locate(os.fspath(spec), revision=revision))


def tokenizer_at_hand(
    identity: BaseIdentity, spec: str | os.PathLike[str] | None = None
) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a recorded base from this machine: nothing is fetched for it.

    ``spec`` is where the base is now, if not where it was. Raises ``BaseModelError`` if it is not
    here, ``IdentityError`` if it is another tokenizer.
    """
    directory = locate(os.fspath(spec or identity.name), fetch=False)
    found = tokenizer_hash(directory)
    if found != identity.tokenizer:
        raise IdentityError(
            f"{directory} has another tokenizer ({found[:12]}) than {identity.name} had "
            f"({identity.tokenizer[:12]}). Give the directory of that base with --base."
        )
    return _read_tokenizer(directory)


def load_base(
    spec: str | os.PathLike[str],
    *,
    revision: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
) -> Base:
    """Load the base that ``spec`` names (see ``locate``) and check it with a short forward.

    ``device`` is a torch device, or ``auto``: CUDA where there is one. ``dtype`` is float32,
    bfloat16, float16 or ``auto``: bfloat16 on CUDA, else float32. Raises ``BaseModelError`` if
    it is not a causal language model that embedcache understands, ``UsageError`` for an unknown
    device or dtype.
    """
    spec = os.fspath(spec)
    target = resolve_device(device)
    torch_dtype = resolve_dtype(dtype, target)
    directory = locate(spec, revision=revision)
    _require_causal(directory)
    identity = identify(directory, name=named(spec, revision))
    model: Any = read_model(directory, dtype=torch_dtype)
    model = model.eval().requires_grad_(False).to(target)
    head = Head.from_model(model)
    check_base(model, head)
    return Base(
        identity=identity,
        model=model,
        tokenizer=_read_tokenizer(directory),
        head=head,
        device=target,
        dtype=torch_dtype,
    )


def _require_causal(directory: Path) -> None:
    """Raise ``BaseModelError`` before weights are read that belong to no causal language model."""
    config = read_config(directory)
    declared = config.architectures or []
    known = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    refused = (
        config.is_encoder_decoder
        or config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        or (declared and not known.intersection(declared))
    )
    if refused:
        raise BaseModelError(
            f"a base is a causal language model, such as LlamaForCausalLM; found "
            f"{', '.join(declared) or config.model_type} (model type {config.model_type}) in "
            f"{directory}. Use a decoder-only model with its head."
        )


def _read_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    try:
        with quiet_transformers():
            return AutoTokenizer.from_pretrained(
                directory, trust_remote_code=False, local_files_only=True
            )
    except UNREADABLE as error:
        raise BaseModelError(
            f"the tokenizer in {directory} cannot be loaded: {reason(error)} "
            "Download the model again."
        ) from error
