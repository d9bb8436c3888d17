"""Taps: the places in a base where embeddings are taken.

``final`` is the vector after the final norm, the input of the head. ``layer_k`` is the residual
stream that enters decoder layer k, which transformers calls ``hidden_states[k]``.
Shapes: B batch, T time, H hidden.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from embedcache.errors import BaseModelError, UsageError

FINAL = "final"


def parse_taps(text: str) -> tuple[str, ...]:
    """Return the taps named in ``text``, in its order; a number k stands for ``layer_k``.

    Raises ``UsageError`` for a word that is neither, or a tap named twice.

    >>> parse_taps("final,22,layer_15")
    ('final', 'layer_22', 'layer_15')
    """
    taps: list[str] = []
    for word in text.split(","):
        match = re.fullmatch(r"(?:layer_)?(\d+)", word.strip())
        tap = f"layer_{int(match[1])}" if match else word.strip()
        if match is None and tap != FINAL:
            raise UsageError(
                f"taps are 'final' and layer numbers; found '{word.strip()}' in '{text}'. "
                "Type for example: --taps final,15"
            )
        if tap in taps:
            raise UsageError(f"the tap {tap} is named twice in '{text}'. Name each once.")
        taps.append(tap)
    return tuple(taps)


def layer_of(tap: str) -> int | None:
    """Return k for ``layer_k``, None for ``final``.

    >>> layer_of("layer_22"), layer_of("final")
    (22, None)
    """
    if tap == FINAL:
        return None
    match = re.fullmatch(r"layer_(\d+)", tap)
    if match is None:
        raise BaseModelError(f"a tap is 'final' or 'layer_K'; found '{tap}'. Type: --taps final")
    return int(match[1])


def check_taps(taps: Sequence[str], num_layers: int) -> None:
    """Raise ``BaseModelError`` unless a base of ``num_layers`` decoder layers has all ``taps``."""
    for tap in taps:
        layer = layer_of(tap)
        if layer is not None and layer >= num_layers:
            raise BaseModelError(
                f"this base has {num_layers} layers: its taps are 'final' and 0 to "
                f"{num_layers - 1} (layer_K is what enters layer K); found {tap}. "
                f"Type for example: --taps final,{num_layers - 1}"
            )


def decoder_of(model: Any) -> nn.Module:
    """Return the part of a causal language model that maps token ids to final embeddings."""
    decoder = model.get_decoder()
    if decoder is model or not isinstance(decoder, nn.Module):
        decoder = getattr(model, model.base_model_prefix, None)
    if not isinstance(decoder, nn.Module):
        raise BaseModelError(
            f"a base has a decoder and a head; no decoder was found in {type(model).__name__}. "
            "Use another base."
        )
    return decoder


def layers_of(model: Any) -> nn.ModuleList:
    """Return the decoder layers of ``model``, in order."""
    expected = model.config.get_text_config().num_hidden_layers
    for child in decoder_of(model).children():
        if isinstance(child, nn.ModuleList) and len(child) == expected:
            return child
    raise BaseModelError(
        f"a base's decoder has one list of {expected} layers; none was found in "
        f"{type(model).__name__}. Only its final embeddings can be used: --taps final"
    )


def token_embedding_of(model: Any) -> nn.Module:
    """Return the module that maps token ids to the decoder's input, with weight [V, H]."""
    return model.get_input_embeddings()


def is_tied(model: Any) -> bool:
    """Return whether the head's weight is the token embedding's, in the same memory."""
    weight = getattr(model.get_output_embeddings(), "weight", None)
    embedding = getattr(token_embedding_of(model), "weight", None)
    return (
        weight is not None and embedding is not None and weight.data_ptr() == embedding.data_ptr()
    )


def final_embeddings(model: Any, input_ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
    """Return x_BTH, the final embeddings of ``input_ids`` [B, T], in the model's dtype.

    Runs the decoder alone: no logits are computed. ``inputs`` may hold ``attention_mask``
    and ``position_ids``; gradients follow the caller's mode.
    """
    return _embeddings(decoder_of(model)(input_ids=input_ids, use_cache=False, **inputs))


class TapRecorder:
    """Records taps during forwards of ``model``: a context manager around them.

    After a forward (of the model or of its decoder), ``taps`` maps each tap asked for to its
    x_BTH, in the model's dtype and on its device; the next forward replaces them.
    Raises ``BaseModelError`` for a tap that the base does not have.
    """

    def __init__(self, model: Any, taps: Sequence[str]) -> None:
        check_taps(taps, model.config.get_text_config().num_hidden_layers)
        self._model = model
        self._names = tuple(taps)
        self._handles: list[RemovableHandle] = []
        self.taps: dict[str, torch.Tensor] = {}

    def __enter__(self) -> TapRecorder:
        for tap in self._names:
            layer = layer_of(tap)
            if layer is None:
                handle = decoder_of(self._model).register_forward_hook(self._record_final)
            else:
                handle = layers_of(self._model)[layer].register_forward_pre_hook(
                    self._recorder(tap), with_kwargs=True
                )
            self._handles.append(handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _record_final(self, decoder: nn.Module, args: Any, output: Any) -> None:
        self.taps[FINAL] = _embeddings(output)

    def _recorder(self, tap: str) -> Any:
        def record(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.taps[tap] = args[0] if args else kwargs["hidden_states"]

        return record


def _embeddings(output: Any) -> torch.Tensor:
    named = getattr(output, "last_hidden_state", None)
    return output[0] if named is None else named
