"""Taps: the places in a base where embeddings are taken.

The tap ``final`` is the vector after the final norm, the input of the head. The tap ``layer_k`` is
the residual stream that enters decoder layer k, ``hidden_states[k]`` in transformers.

Axes: B batch, T time, H hidden, V vocabulary.
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
    """Return the taps in a comma-separated list; a number k means ``layer_k``.

    Raises:
        UsageError: a word is not a tap, or a tap is repeated.

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
                "Set `taps=`, for example, to final,15."
            )
        if tap in taps:
            raise UsageError(f"the tap {tap} is repeated in '{text}'. Give each tap once.")
        taps.append(tap)
    return tuple(taps)


def layer_of(tap: str) -> int | None:
    """Return k for ``layer_k`` and None for ``final``.

    >>> layer_of("layer_22"), layer_of("final")
    (22, None)
    """
    if tap == FINAL:
        return None
    match = re.fullmatch(r"layer_(\d+)", tap)
    if match is None:
        raise BaseModelError(f"a tap is 'final' or 'layer_K'; found '{tap}'. Set `taps=` to final.")
    return int(match[1])


def check_taps(taps: Sequence[str], num_layers: int) -> None:
    """Raise ``BaseModelError`` unless a base of ``num_layers`` decoder layers has all ``taps``."""
    for tap in taps:
        layer = layer_of(tap)
        if layer is not None and layer >= num_layers:
            raise BaseModelError(
                f"this base has {num_layers} layers: its taps are 'final' and 0 to "
                f"{num_layers - 1} (layer_K is the input of layer K); found {tap}. "
                f"Set `taps=`, for example, to final,{num_layers - 1}."
            )


def decoder_of(model: Any) -> nn.Module:
    """Return the decoder: the module that maps token ids to final embeddings."""
    decoder = model.get_decoder()
    if decoder is model or not isinstance(decoder, nn.Module):
        decoder = getattr(model, model.base_model_prefix, None)
    if not isinstance(decoder, nn.Module):
        raise BaseModelError(
            f"a base has a decoder and a head; found no decoder in {type(model).__name__}. "
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
        f"a base's decoder has one list of {expected} layers; found none in "
        f"{type(model).__name__}. Only its final embeddings can be used: set `taps=` to final."
    )


def token_embedding_of(model: Any) -> nn.Module:
    """Return the token embedding, a module with a weight [V, H]."""
    return model.get_input_embeddings()


def is_tied(model: Any) -> bool:
    """Return whether the head and the token embedding share one weight."""
    weight = getattr(model.get_output_embeddings(), "weight", None)
    embedding = getattr(token_embedding_of(model), "weight", None)
    return (
        weight is not None and embedding is not None and weight.data_ptr() == embedding.data_ptr()
    )


def final_embeddings(model: Any, input_ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
    """Return the final embeddings of token ids without computing logits.

    Args:
        model: a transformers causal language model.
        input_ids: token ids [B, T].
        inputs: ``attention_mask`` and ``position_ids`` for the decoder, if needed.

    Returns:
        x_BTH in the model's dtype; gradients follow the caller's mode.
    """
    return _embeddings(decoder_of(model)(input_ids=input_ids, use_cache=False, **inputs))


class TapRecorder:
    """A context manager that records taps during forward passes of a model.

    After a forward pass of the model or its decoder, ``taps`` maps each tap to its x_BTH, in the
    model's dtype and on its device. The next forward pass replaces them.

    Raises:
        BaseModelError: the base does not have one of the taps.
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
