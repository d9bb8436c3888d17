"""A live base with a carry-on: a transformers model whose logits are y(α).

    y(α) = W (x + α · g ⊙ f)                              GPT Carry-On, arXiv 2504.07513

The carry-on is hooked behind the base's decoder, so the base's own code applies its head, scales,
soft-cap and generation. The branch keeps its keys and values as further layers of the base's
key-value cache: beam search, cropping and reordering reach them like any other.

Axes: B batch, T time, S time of keys, H hidden.
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import DynamicLayer

from embedcache.base.identity import BaseIdentity
from embedcache.base.load import Base
from embedcache.base.taps import (
    FINAL,
    TapRecorder,
    decoder_of,
    token_embedding_of,
)
from embedcache.carryon.branch.model import CarryOn, KeyValueUpdate
from embedcache.carryon.saving import load_carryon
from embedcache.errors import UsageError


def compose(base: Base, folder: Path, *, alpha: float = 1.0) -> Composed:
    """Load the carry-on in ``folder`` and compose it with ``base``.

    Raises ``IdentityError`` if it belongs to another base, ``CarryOnError`` if it is not whole.
    """
    model, record = load_carryon(folder)
    base.identity.require(
        BaseIdentity.from_dict(record.base), this="the base", that=f"the carry-on {folder}"
    )
    return Composed(base, model, alpha=alpha)


class Composed:
    """A base's model with a carry-on attached until `detach`, or the end of a ``with`` block.

    Attributes:
        model: the base's transformers model; call or ``generate`` with it as ever.
        alpha: the dial; 0 skips the branch, so the logits are the base's, bit for bit. Change it
            between generations, not within one: the branch's keys would have a gap.
        x_BTH: the base's final embedding of the last forward, before the carry-on.
        delta_BTH: what the branch made of it, None where α is 0.
    """

    def __init__(self, base: Base, carryon: CarryOn, *, alpha: float = 1.0):
        self.model: Any = base.model
        self.alpha = alpha
        self.x_BTH: Tensor | None = None
        self.delta_BTH: Tensor | None = None
        decoder = decoder_of(base.model)
        if any(isinstance(getattr(hook, "__self__", None), Composed) for hook in _hooks(decoder)):
            raise UsageError("this base already has a carry-on: detach() it first")
        # In float32 whatever the base's dtype, as it was trained: a mean ten times the spread
        # would lose the spread to bfloat16.
        self._carryon = carryon.to(base.device, torch.float32).eval().requires_grad_(False)
        self._embedding = token_embedding_of(base.model)
        self._layers = base.model.config.get_text_config().num_hidden_layers
        taps = [tap for tap in carryon.config.taps if tap != FINAL]
        self._recorder = TapRecorder(base.model, taps)
        self._recorder.__enter__()
        self._handle = decoder.register_forward_hook(self._after, with_kwargs=True)

    def __enter__(self) -> Composed:
        """Return self."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Detach."""
        self.detach()

    def detach(self) -> None:
        """Remove the carry-on; the model is the base again."""
        self._handle.remove()
        self._recorder.__exit__(None, None, None)

    def _after(
        self, decoder: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        x_BTH = output.last_hidden_state
        self.x_BTH, self.delta_BTH = x_BTH, None
        if self.alpha == 0:
            return output
        ids_BT = args[0] if args else kwargs.get("input_ids")
        cache = output.get("past_key_values")
        past = self._past(cache, x_BTH.shape[1])
        mask_BS = kwargs.get("attention_mask")
        low = x_BTH.device.type == "cuda" and x_BTH.dtype != torch.float32
        with torch.autocast(x_BTH.device.type, torch.bfloat16, enabled=low):
            delta_BTH = self._carryon(
                {FINAL: x_BTH, **self._recorder.taps},
                positions_BT=_positions(kwargs.get("position_ids"), x_BTH, past),
                tokens_BTH=self._tokens(ids_BT),
                where=_mask(mask_BS, x_BTH, past),
                update=None if cache is None else self._update_of(cache),
            )
        self.delta_BTH = delta_BTH.to(x_BTH.dtype)
        output.last_hidden_state = x_BTH + self.alpha * self.delta_BTH
        return output

    def _tokens(self, ids_BT: Tensor | None) -> Tensor | None:
        if not self._carryon.config.token_input:
            return None
        if ids_BT is None:
            raise ValueError("this carry-on reads token ids: call the model with input_ids")
        # The matrix itself: some bases scale its output, which is not what was trained on.
        return F.embedding(ids_BT, self._embedding.weight)  # type: ignore[arg-type]

    def _past(self, cache: Any, new: int) -> int:
        """Return the tokens that the branch has seen, and make its layers in the cache."""
        if cache is None:
            return 0
        while len(cache.layers) < self._layers + self._carryon.config.blocks:
            cache.layers.append(DynamicLayer())
        past = int(cache.layers[self._layers].get_seq_length())
        if past + new != cache.get_seq_length():
            raise ValueError(
                f"the carry-on has seen {past + new} tokens and the base "
                f"{cache.get_seq_length()}: this key-value cache was partly filled at alpha 0 or "
                "without the carry-on. Begin with a new cache."
            )
        return past

    def _update_of(self, cache: Any) -> KeyValueUpdate:
        def update(block: int, k_BNTD: Tensor, v_BNTD: Tensor) -> tuple[Tensor, Tensor]:
            keys, values = cache.layers[self._layers + block].update(k_BNTD, v_BNTD)
            return keys, values

        return update


def _hooks(module: torch.nn.Module) -> list[Any]:
    return list(module._forward_hooks.values())


def _positions(position_ids: Tensor | None, x_BTH: Tensor, past: int) -> Tensor:
    """Return positions_BT as the base takes them."""
    B, T = x_BTH.shape[:2]
    if position_ids is None:
        position_ids = torch.arange(past, past + T, device=x_BTH.device)[None]
    return position_ids.expand(B, T)


def _mask(mask_BS: Tensor | None, x_BTH: Tensor, past: int) -> Tensor | None:
    """Return mask_BTS from a padding mask; None where plain causal attention is meant."""
    if mask_BS is not None and mask_BS.ndim != 2:
        raise ValueError(
            f"a carry-on takes attention masks of shape [B, S], found {tuple(mask_BS.shape)}"
        )
    B, T = x_BTH.shape[:2]
    if past == 0 and (mask_BS is None or bool(mask_BS.all())):
        return None
    S = past + T
    query = torch.arange(past, S, device=x_BTH.device)[:, None]
    key = torch.arange(S, device=x_BTH.device)[None]
    mask_BTS = (key <= query).expand(B, T, S)
    if mask_BS is not None:
        # A query on padding sees itself alone: a row without any key would be NaN.
        mask_BTS = (mask_BTS & mask_BS[:, None, :S].bool()) | (key == query)
    return mask_BTS
