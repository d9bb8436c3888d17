"""A live base with a carry-on: a transformers model whose logits are W · y(α).

The carry-on is hooked behind the base's decoder, so the base's own code applies its head, scales,
soft-cap and generation. The carry-on's keys and values are further layers of the base's key-value
cache: beam search, cropping and reordering reach them like any other.

Axes: B rows of a batch, T time, U keys of attention, H hidden.
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
from embedcache.base.taps import FINAL, TapRecorder, decoder_of, token_embedding_of
from embedcache.carryon.protocol import CarryOn, CarryOnInputs, KeyValueUpdate
from embedcache.carryon.saving import load_carryon
from embedcache.errors import UsageError


def compose(base: Base, folder: str | Path, *, alpha: float = 1.0) -> ComposedModel:
    """Load the carry-on in ``folder`` and compose it with a base that is loaded.

    Raises:
        IdentityError: if the carry-on belongs to another base.
        CarryOnError: if it is damaged or incomplete.
    """
    model, record = load_carryon(Path(folder))
    base.identity.require(
        BaseIdentity.from_dict(record.base), this="the base", that=f"the carry-on {folder}"
    )
    return ComposedModel(base, model, alpha=alpha)


class ComposedModel:
    """A base's model with a carry-on attached, until `detach` or the end of a ``with`` block.

    Attributes:
        base: the base, with its tokenizer and identity.
        model: the base's transformers model; call it or its ``generate`` as ever.
        alpha: the rescale dial. At 0 the carry-on is skipped, and the logits equal the base's bit
            for bit. Change it between generations, not within one: the carry-on's key-value cache
            would miss tokens.
    """

    def __init__(self, base: Base, carryon: CarryOn, *, alpha: float = 1.0):
        self.base = base
        self.model: Any = base.model
        self.alpha = alpha
        self._x_BTH: Tensor | None = None
        decoder = decoder_of(base.model)
        hooks = [getattr(hook, "__self__", None) for hook in decoder._forward_hooks.values()]
        if any(isinstance(hook, ComposedModel) for hook in hooks):
            raise UsageError("this base already has a carry-on: call its `detach()` first")
        # Float32 as in training, whatever the base's dtype: bfloat16 would lose the spread of a
        # component whose mean is ten times its spread.
        self._carryon = carryon.to(base.device, torch.float32).eval().requires_grad_(False)
        self._embedding = token_embedding_of(base.model)
        self._layers = base.model.config.get_text_config().num_hidden_layers
        taps = [tap for tap in carryon.config.taps if tap != FINAL]
        self._recorder = TapRecorder(base.model, taps)
        self._recorder.__enter__()
        self._handle = decoder.register_forward_hook(self._after, with_kwargs=True)

    def __repr__(self) -> str:
        """Return the base's name and the carry-on's configuration."""
        return f"ComposedModel({self.base.identity.name!r}, {self._carryon.config!r})"

    def __enter__(self) -> ComposedModel:
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

    def base_embeddings(self) -> Tensor:
        """Return x_BTH, the base's own final embeddings of the last forward pass."""
        if self._x_BTH is None:
            raise RuntimeError("no forward pass has been made yet")
        return self._x_BTH

    def _after(
        self, decoder: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        """Replace the decoder's last hidden state x by y(α)."""
        self._x_BTH = x_BTH = output.last_hidden_state
        if self.alpha == 0:
            return output
        ids_BT = args[0] if args else kwargs.get("input_ids")
        cache = output.get("past_key_values")
        past = self._past(cache, x_BTH.shape[1])
        inputs = CarryOnInputs(
            x_BTH={FINAL: x_BTH, **self._recorder.taps},
            positions_BT=_positions(kwargs.get("position_ids"), x_BTH, past),
            tokens_BTH=self._tokens(ids_BT),
            attention=_mask(kwargs.get("attention_mask"), x_BTH, past),
            update=None if cache is None else self._update_of(cache),
        )
        low = x_BTH.device.type == "cuda" and x_BTH.dtype != torch.float32
        with torch.autocast(x_BTH.device.type, torch.bfloat16, enabled=low):
            output.last_hidden_state = self._carryon(inputs, self.alpha)
        return output

    def _tokens(self, ids_BT: Tensor | None) -> Tensor | None:
        """Return the base's token embedding of ids, where the carry-on needs it."""
        if "token_embedding" not in self._carryon.config.base_arrays:
            return None
        if ids_BT is None:
            raise ValueError("this carry-on reads token ids: call the model with input_ids")
        # The matrix itself: some bases scale its output, and training used the matrix.
        return F.embedding(ids_BT, self._embedding.weight)  # type: ignore[arg-type]

    def _past(self, cache: Any, new: int) -> int:
        """Return the number of tokens in the carry-on's cache layers; add them if missing."""
        if cache is None:
            return 0
        while len(cache.layers) < self._layers + self._carryon.key_value_layers:
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
        def update(layer: int, k_BETF: Tensor, v_BETF: Tensor) -> tuple[Tensor, Tensor]:
            keys, values = cache.layers[self._layers + layer].update(k_BETF, v_BETF)
            return keys, values

        return update


def _positions(position_ids: Tensor | None, x_BTH: Tensor, past: int) -> Tensor:
    """Return positions_BT as the base takes them."""
    B, T = x_BTH.shape[:2]
    if position_ids is None:
        position_ids = torch.arange(past, past + T, device=x_BTH.device)[None]
    return position_ids.expand(B, T)


def _mask(mask_BU: Tensor | None, x_BTH: Tensor, past: int) -> Tensor | None:
    """Return mask_BTU from a padding mask, or None where plain causal attention is meant."""
    if mask_BU is not None and mask_BU.ndim != 2:
        raise ValueError(
            f"a carry-on takes attention masks of shape [B, U], found {tuple(mask_BU.shape)}"
        )
    B, T = x_BTH.shape[:2]
    if past == 0 and (mask_BU is None or bool(mask_BU.all())):
        return None
    U = past + T
    query = torch.arange(past, U, device=x_BTH.device)[:, None]
    key = torch.arange(U, device=x_BTH.device)[None]
    mask_BTU = (key <= query).expand(B, T, U)
    if mask_BU is not None:
        # A query on padding sees itself alone: a row without any key would be NaN.
        mask_BTU = (mask_BTU & mask_BU[:, None, :U].bool()) | (key == query)
    return mask_BTU
