"""Copies packed batches to the device, decodes their embeddings there, and prepares them.

Axes: B rows, T time, H hidden, N predicted positions.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing, suppress
from functools import cache, partial
from typing import Generic, Protocol, TypeVar

import torch

from embedcache.cache.codecs.integers import Codec
from embedcache.data.batch import Batch
from embedcache.data.packing import Packed
from embedcache.data.prefetch import prefetch
from embedcache.device import capture_lock

RETRIES, RETRY_SECONDS = 5, 0.02
"""Number of retries when the device is out of memory, and the seconds between them. Meanwhile the
part in use is freed."""


class HasTensors(Protocol):
    """The result of ``prepare``: an object that owns tensors on the device."""

    def tensors(self) -> Iterable[torch.Tensor]:
        """Return all tensors on the loader's device."""
        ...


Prepared = TypeVar("Prepared", bound=HasTensors)


class ToDevice(Generic[Prepared]):
    """Copies packed batches to a device, decodes them, and applies the caller's ``prepare``.

    Args:
        codecs: the decoder of each tap.
        device: the device of the batches.
        prepare: called with each batch, right after it was decoded and on the same stream.
        retry: whether a part is tried again when the device is out of memory.
    """

    def __init__(
        self,
        codecs: Mapping[str, Codec],
        device: torch.device,
        prepare: Callable[[Batch], Prepared],
        *,
        retry: bool = False,
    ):
        self._codecs = codecs
        self._device = device
        self._prepare = prepare
        self._retry = retry
        if device.type == "cuda":
            # `prepare` may read tensors that were made on the caller's stream.
            _stream(device).wait_stream(torch.cuda.current_stream(device))

    def make(self, packed: Packed) -> Prepared:
        """Copy, decode and prepare one batch on the current stream."""
        return self._prepare(self._decode(packed))

    def make_ahead(self, packed: Iterable[Packed | None], depth: int) -> Generator[Prepared | None]:
        """Make batches on a thread and a CUDA stream of their own, up to ``depth`` ahead.

        None is passed on. An error is raised in the place of its batch.
        """
        with closing(prefetch(self._make_all(packed), depth)) as made:
            yield from map(self._arrive, made)  # a local variable would keep each batch too long

    def _make_all(
        self, packed: Iterable[Packed | None]
    ) -> Iterator[tuple[Prepared, torch.cuda.Event] | None]:
        for one in packed:
            yield None if one is None else self._make_retrying(one)

    def _make_retrying(self, packed: Packed) -> tuple[Prepared, torch.cuda.Event]:
        for _ in range(RETRIES if self._retry else 0):
            with suppress(torch.OutOfMemoryError):
                return self._make_on_stream(packed)
            time.sleep(RETRY_SECONDS)
        return self._make_on_stream(packed)

    def _make_on_stream(self, packed: Packed) -> tuple[Prepared, torch.cuda.Event]:
        """Make a batch on the stream of batches; return it with the event that ends its making."""
        # The context does not span a yield: another thread may close the generator.
        with capture_lock, torch.cuda.stream(_stream(self._device)):
            prepared, ready = self.make(packed), torch.cuda.Event()
            ready.record()
        return prepared, ready

    def _arrive(self, made: tuple[Prepared, torch.cuda.Event] | None) -> Prepared | None:
        """Hand a batch over to the current stream."""
        if made is None:
            return None
        prepared, ready = made
        here = torch.cuda.current_stream(self._device)
        here.wait_event(ready)
        storages = {tensor.untyped_storage().data_ptr(): tensor for tensor in prepared.tensors()}
        for tensor in storages.values():
            tensor.record_stream(here)
        return prepared

    def _decode(self, packed: Packed) -> Batch:
        """Copy a batch to the device and decode its embeddings there."""
        to_device = partial(torch.Tensor.to, device=self._device, non_blocking=True)
        ids_BT, positions_BT, segments_BT = to_device(packed.rows_3BT)
        predict_N, targets_N = to_device(packed.predict_2N)
        has_padding = packed.tokens != segments_BT.numel()
        padding_BT1 = (segments_BT < 0)[..., None] if has_padding else None
        x_BTH = {}
        for tap, arrays in packed.arrays.items():
            stored = {name: to_device(array) for name, array in arrays.items()}
            x = self._codecs[tap].decode(stored, packed.rows_3BT[0].numpy())
            x_BTH[tap] = x if padding_BT1 is None else x.masked_fill_(padding_BT1, 0)
        return Batch(
            x_BTH=x_BTH,
            ids_BT=ids_BT,
            positions_BT=positions_BT,
            segments_BT=segments_BT,
            predict_N=predict_N,
            targets_N=targets_N,
            documents_N=packed.documents_N,
            source_N2=packed.source_N2,
            sequences=packed.sequences,
            tokens=packed.tokens,
            packed=packed.packed,
            cu_seqlens_M=None if packed.cu_seqlens_M is None else to_device(packed.cu_seqlens_M),
            total=packed.total,
            last_part=packed.last_part,
            top_ids_NJ=None if packed.top_ids_NJ is None else to_device(packed.top_ids_NJ),
        )


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """Return the one stream of a device's batches: libraries keep memory for each stream."""
    return torch.cuda.Stream(device)
