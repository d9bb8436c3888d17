"""Load a base (a frozen causal language model) and check that its head reproduces its logits.

Axes: B batch, T time, H hidden, V vocabulary.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from embedcache.base.head import Head
from embedcache.base.identity import BaseIdentity, identify, tokenizer_hash
from embedcache.base.locate import locate, with_revision
from embedcache.base.pretrained import read_config, read_model, read_tokenizer
from embedcache.base.taps import final_embeddings
from embedcache.device import resolve_device, resolve_dtype
from embedcache.errors import BaseModelError, IdentityError, NumericsError

_CHECK_TOKENS = 8
"""Length of the two sequences that `check_base` runs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Base:
    """A loaded base. Its parameters require no gradients, and the model is in evaluation mode."""

    identity: BaseIdentity
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    head: Head
    device: torch.device
    dtype: torch.dtype


def load_identity(spec: str | os.PathLike[str], *, revision: str | None = None) -> BaseIdentity:
    """Return the identity of a base without loading its weights.

    Args:
        spec: the base, in any form that `locate` accepts.
        revision: the revision of a hub id.

    Raises:
        BaseModelError: there is no such base, or it is not a causal language model.
    """
    spec = os.fspath(spec)
    directory = locate(spec, revision=revision)
    _require_causal(directory)
    return identify(directory, name=with_revision(spec, revision))


def load_tokenizer(
    spec: str | os.PathLike[str], *, revision: str | None = None
) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a base without loading its weights."""
    return read_tokenizer(locate(os.fspath(spec), revision=revision))


def local_tokenizer(
    identity: BaseIdentity, spec: str | os.PathLike[str] | None = None
) -> PreTrainedTokenizerBase:
    """Return the tokenizer of the base that an identity describes, without a download.

    Args:
        identity: the identity of the base, as recorded in a cache.
        spec: the current location of the base; ``identity.name`` if None.

    Raises:
        BaseModelError: the base is not on this machine.
        IdentityError: the tokenizer differs from the recorded one.
    """
    directory = locate(os.fspath(spec or identity.name), fetch=False)
    found = tokenizer_hash(directory)
    if found != identity.tokenizer:
        raise IdentityError(
            f"expected the tokenizer of {identity.name} (hash {identity.tokenizer[:12]}), but "
            f"{directory} has another tokenizer (hash {found[:12]}). Set `base=` to the directory "
            "of the recorded base."
        )
    return read_tokenizer(directory)


def load_base(
    spec: str | os.PathLike[str],
    *,
    revision: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
) -> Base:
    """Load a base and check it with a short forward pass.

    Args:
        spec: the base, in any form that `locate` accepts.
        revision: the revision of a hub id.
        device: a torch device, or ``auto`` for CUDA where there is a GPU, else the CPU.
        dtype: float32, bfloat16, float16, or ``auto`` for bfloat16 on CUDA, else float32.

    Raises:
        BaseModelError: the base is not a causal language model that embedcache supports.
        NumericsError: the base returns values that are not finite in this dtype.
        UsageError: the device or dtype is unknown.
    """
    spec = os.fspath(spec)
    target = resolve_device(device)
    torch_dtype = resolve_dtype(dtype, target)
    directory = locate(spec, revision=revision)
    _require_causal(directory)
    identity = identify(directory, name=with_revision(spec, revision))
    model: Any = read_model(directory, dtype=torch_dtype)
    model = model.eval().requires_grad_(False).to(target)
    head = Head.from_model(model)
    check_base(model, head)
    return Base(
        identity=identity,
        model=model,
        tokenizer=read_tokenizer(directory),
        head=head,
        device=target,
        dtype=torch_dtype,
    )


@torch.no_grad()
def check_base(model: Any, head: Head) -> None:
    """Check that ``head`` gives the model's logits and that no token sees a later one.

    The tolerance is a relative root-mean-square error of 1e-5 in float32, and of 4e-3 (one bfloat16
    rounding) in 16-bit dtypes.

    Raises:
        BaseModelError: the head does not reproduce the logits, or the model is not causal.
        NumericsError: a value is not finite.
    """
    name = type(model).__name__
    V, H = head.weight_VH.shape
    # Two sequences that differ only in the last token, with ids spread over the vocabulary.
    first_T = (torch.arange(_CHECK_TOKENS, device=head.weight_VH.device) * 7919 + 11) % V
    second_T = first_T.clone()
    second_T[-1] = (second_T[-1] + 1) % V
    ids_BT = torch.stack([first_T, second_T])
    x_BTH = final_embeddings(model, ids_BT)
    if x_BTH.shape != (2, _CHECK_TOKENS, H):
        raise BaseModelError(
            f"expected final embeddings of shape {(*ids_BT.shape, H)}, as the head's input has "
            f"width {H}; {name} returned shape {tuple(x_BTH.shape)}. Use another base."
        )
    expected_BTV = model(input_ids=ids_BT, use_cache=False).logits
    if not (x_BTH.isfinite().all() and expected_BTV.isfinite().all()):
        raise NumericsError(
            f"{name} returns values that are not finite in {x_BTH.dtype}. "
            "Set `dtype=` to bfloat16 or float32."
        )
    tolerance = 1e-5 if x_BTH.dtype == torch.float32 else 4e-3
    error = _relative_error(head(x_BTH), expected_BTV)
    if error > tolerance:
        raise BaseModelError(
            f"{name} applies an operation between the final norm and the logits that embedcache "
            "does not support: the logits of the head differ from those of the model by a "
            f"relative error of {error:.1e}; expected at most {tolerance:.0e}. Use another base."
        )
    leak = _relative_error(x_BTH[0, :-1], x_BTH[1, :-1])
    if leak > tolerance:
        raise BaseModelError(
            f"a base must be causal: no token may see a later one; in {name}, changing the last "
            f"token changed the earlier embeddings by a relative error of {leak:.1e}; expected "
            f"at most {tolerance:.0e}. Use another base."
        )


def _relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    scale = expected.float().square().mean().sqrt().clamp_min(1e-30)
    return float((found.float() - expected.float()).square().mean().sqrt() / scale)


def _require_causal(directory: Path) -> None:
    """Raise ``BaseModelError`` unless config.json describes a causal language model."""
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
