"""The interface of every kind of carry-on, which training, evaluation and serving use.

A kind is a folder of `embedcache.carryon` that registers itself (see `embedcache.carryon.registry`
and ``examples/add_a_kind.md``). It has a configuration, a subclass of `CarryOnConfig`, and a
module, a subclass of `CarryOn`.

Axes: K stacked carry-ons, B rows of a batch, T time, N positions, H hidden of the base, R width of
the carry-on's features. (K) stands for an axis that only a stack has.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from embedcache.carryon.blend import Alpha
from embedcache.carryon.config import CarryOnConfig
from embedcache.carryon.nn.attention import Spans, segment_mask
from embedcache.data.batch import Batch
from embedcache.data.frozen import FrozenInputs

KeyValueUpdate = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Takes a layer's number and its new keys and values [B, E, T, F]; returns all keys and values of
that layer so far. E counts attention heads, F is the width of a head."""


class InputStats(NamedTuple):
    """Mean and standard deviation of each component of a tap's embeddings, float64 [H]."""

    mean_H: Tensor
    deviation_H: Tensor

    @classmethod
    def of(cls, sample_NH: Tensor) -> InputStats:
        """Return the statistics of a sample of embeddings."""
        x_NH = sample_NH.double()
        return cls(x_NH.mean(dim=0), x_NH.std(dim=0, correction=0))


@dataclass(frozen=True, slots=True, kw_only=True)
class CarryOnInputs:
    """Inputs of a carry-on. Those of a stack have the axis K, or are shared by its carry-ons.

    Attributes:
        x_BTH: embeddings by tap; every tap of the configuration is there.
        positions_BT: position of each token in its sequence, from 0.
        tokens_BTH: the base's token embedding of the ids, where ``token_embedding`` is among the
            configuration's ``base_arrays``.
        attention: mask_BTU, True where a query may see a key, or the `Spans` of one long row; None
            means plain causal attention.
        update: stores keys and values of earlier calls, while generating; a stack takes none.
    """

    x_BTH: dict[str, Tensor]
    positions_BT: Tensor
    tokens_BTH: Tensor | None = None
    attention: Tensor | Spans | None = None
    update: KeyValueUpdate | None = None


class CarryOn(nn.Module, ABC):
    """A trainable module on a base's embeddings: it maps x to x′, the input of the head.

    A new carry-on starts as the base: x′ = x. A module may hold K carry-ons of one shape, stacked:
    every parameter then has K as its first axis, and so has x′.

    Attributes:
        config: the kind's configuration.
        hidden: width H of the base's embeddings.
        recompute: whether training computes activations again for the gradient, to save memory.
    """

    recompute: bool = False

    def __init__(self, config: CarryOnConfig, hidden: int):
        super().__init__()
        self.config = config
        self.hidden = hidden

    @abstractmethod
    def features(self, inputs: CarryOnInputs, alpha: Alpha = 1.0) -> Tensor:
        """Return h_(K)BTR, computed across the positions of a sequence."""

    @abstractmethod
    def embeddings(self, h: Tensor, x: Tensor, alpha: Alpha = 1.0) -> Tensor:
        """Return y(α), [..., H]; each position is computed independently.

        Args:
            h: `features` of these positions, (K)…R.
            x: the base's final embeddings of these positions, [..., H]; y(α) has the dtype of x.
            alpha: the rescale dial: 0 gives x, 1 gives x′.
        """

    @property
    @abstractmethod
    def key_value_layers(self) -> int:
        """Number of key-value layers that the carry-on keeps while generating."""

    def forward(self, inputs: CarryOnInputs, alpha: Alpha = 1.0) -> Tensor:
        """Return y(α), [(K), B, T, H], in the dtype of the final embeddings."""
        return self.embeddings(self.features(inputs, alpha), inputs.x_BTH["final"], alpha)

    def calibrate(self, stats: dict[str, InputStats]) -> None:
        """Set buffers from the statistics of each tap's components, before training begins."""

    def parameter_count(self) -> int:
        """Return the number of trainable parameters."""
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def count(self) -> int:
        """Number K of the carry-ons of a stack."""
        return len(next(self.parameters()))

    @classmethod
    def stack(cls, models: Sequence[Self]) -> Self:
        """Return one module that holds copies of carry-ons of equal configuration and buffers."""
        with torch.device("meta"):  # the weights are set below
            stacked = cls(models[0].config, models[0].hidden)
        for name, buffer in models[0].named_buffers():
            setattr(stacked, name, buffer.clone())
        layers = dict(stacked.named_modules())
        for name, _ in list(stacked.named_parameters()):
            layer, _, part = name.rpartition(".")
            values = [model.get_parameter(name).detach() for model in models]
            setattr(layers[layer], part, nn.Parameter(torch.stack(values)))
        return stacked

    def member(self, index: int) -> dict[str, Tensor]:
        """Return views of one carry-on's weights in a stack, by their names in a single one."""
        parameters = {name: value.detach()[index] for name, value in self.named_parameters()}
        return parameters | dict(self.named_buffers())


def stack_of(models: Sequence[CarryOn]) -> CarryOn:
    """Return one module that holds copies of carry-ons of one kind and configuration."""
    return type(models[0]).stack(models)


def batch_features(
    model: CarryOn, batch: Batch, frozen: FrozenInputs, alpha: Alpha = 1.0
) -> Tensor:
    """Return h_(K)BTR of a carry-on, or a stack, on a batch from a cache."""
    attention: Tensor | Spans | None = None
    if batch.cu_seqlens_M is not None:
        # Rows of several carry-ons end in padding, which may be longer than any sequence.
        longest = frozen.context if batch.cu_seqlens_M.ndim == 1 else batch.ids_BT.shape[-1]
        attention = Spans(batch.cu_seqlens_M, max(frozen.context, longest))
    elif batch.packed:
        attention = segment_mask(batch.segments_BT)
    inputs = CarryOnInputs(
        x_BTH={tap: x.to(frozen.dtype) for tap, x in batch.x_BTH.items()},
        positions_BT=batch.positions_BT,
        tokens_BTH=frozen.tokens_BTH(batch.ids_BT),
        attention=attention,
    )
    with frozen.autocast():
        return model.features(inputs, alpha)


def predicted_embeddings(
    model: CarryOn | None, batch: Batch, frozen: FrozenInputs, alpha: Alpha = 1.0
) -> Tensor:
    """Return y(α), [(K), N, H], at the positions of a batch that predict a target.

    The result has the dtype of the head. Without a ``model``, or at α = 0, it is the base's x_NH.
    Features are computed at all positions, embeddings only at the predicting ones.
    """
    x_NH = batch.at_predicted(batch.x_BTH["final"]).to(frozen.dtype)
    if model is None or (not isinstance(alpha, Tensor) and alpha == 0):
        return x_NH
    h_BTR = batch_features(model, batch, frozen, alpha)
    h_NR = h_BTR.flatten(-3, -2).index_select(-2, batch.predict_N)
    with frozen.autocast():
        return model.embeddings(h_NR.unsqueeze(-3), x_NH, alpha).squeeze(-3)
