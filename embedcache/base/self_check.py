"""A short forward that shows whether embedcache understands a base, before hours are spent on it.

Shapes: B batch, T time, H hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch

from embedcache.base.head import Head
from embedcache.base.taps import final_embeddings
from embedcache.errors import BaseModelError, NumericsError

_LENGTH = 8


@torch.no_grad()
def check_base(model: Any, head: Head) -> None:
    """Raise unless ``head`` gives ``model``'s logits and no token sees a later one.

    Compares root-mean-square differences with the size of the values: 1e-5 of it may differ in
    float32, 4e-3 (one rounding of bfloat16) in 16 bits. Raises ``BaseModelError``, or
    ``NumericsError`` for values that are not finite.
    """
    architecture = type(model).__name__
    V, H = head.weight_VH.shape
    # Two rows that differ in their last token only, of ids spread over the vocabulary.
    first_T = (torch.arange(_LENGTH, device=head.weight_VH.device) * 7919 + 11) % V
    second_T = first_T.clone()
    second_T[-1] = (second_T[-1] + 1) % V
    input_ids = torch.stack([first_T, second_T])
    x_BTH = final_embeddings(model, input_ids)
    if x_BTH.shape != (2, _LENGTH, H):
        raise BaseModelError(
            f"a base's final embeddings have the shape of its head's input, {H} per token; "
            f"{architecture} gave {tuple(x_BTH.shape)} for {tuple(input_ids.shape)} tokens. "
            "Use another base."
        )
    expected_BTV = model(input_ids=input_ids, use_cache=False).logits
    if not (x_BTH.isfinite().all() and expected_BTV.isfinite().all()):
        raise NumericsError(
            f"{architecture} gives numbers that are not finite in {x_BTH.dtype}. "
            "Type: --dtype bfloat16, or --dtype float32"
        )
    tolerance = 1e-5 if x_BTH.dtype == torch.float32 else 4e-3
    error = _relative(head(x_BTH), expected_BTV)
    if error > tolerance:
        raise BaseModelError(
            f"{architecture} does something between the final norm and the logits that embedcache "
            f"does not know: its head gives logits that differ by {error:.1e} of their size from "
            f"the model's own; {tolerance:.0e} at most was expected. Use another base."
        )
    leak = _relative(x_BTH[0, :-1], x_BTH[1, :-1])
    if leak > tolerance:
        raise BaseModelError(
            f"a base is causal: no token sees a later one; in {architecture} a change of the last "
            f"token changed the embeddings before it by {leak:.1e} of their size. Use another base."
        )


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    scale = expected.float().square().mean().sqrt().clamp_min(1e-30)
    return float((found.float() - expected.float()).square().mean().sqrt() / scale)
