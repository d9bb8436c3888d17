"""Embeddings of a block of sequences: forward passes of the base without logits.

Axes: B sequences of a batch, S sequences of a block, T time, N tokens of a block, H hidden. A
``rows_S2`` holds the first token of each sequence in its block and the token past its last.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from embedcache.base.load import Base
from embedcache.base.taps import TapRecorder, final_embeddings
from embedcache.device import any_shape_attention
from embedcache.errors import NumericsError
from embedcache.units import round_up

Array = np.ndarray[Any, Any]

CHECK_EVERY = 64
"""Blocks from one check of the padding to the next; the first block is always checked."""

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.08, torch.float16: 0.02}
"""Largest relative difference (Frobenius norm of a sequence) of batched and unbatched embeddings.

A mistake in padding or positions gives 0.3 and more; rounding gives about a tenth of the tolerance.
"""

WIDTH_MULTIPLE = 32
"""Pad batches to a multiple of this many positions, so that few shapes of products are planned."""


def plan_batches(lengths: list[int], batch_tokens: int) -> list[list[int]]:
    """Group sequences of similar length into batches of at most ``batch_tokens`` padded tokens.

    The batches depend on the lengths alone, so that a block computed again gives the same bytes.
    A sequence longer than ``batch_tokens`` is a batch of its own.

    >>> plan_batches([3, 8, 8, 2], 16)
    [[1, 2], [0, 3]]
    """
    batches: list[list[int]] = []
    longest = 0
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if not batches or (len(batches[-1]) + 1) * longest > batch_tokens:
            batches.append([])
            longest = lengths[index]
        batches[-1].append(index)
    return batches


class BlockForward:
    """Computes the embeddings of blocks of sequences.

    Args:
        base: the loaded base.
        taps: the taps to record.
        block_tokens: tokens of a block, N.
        batch_tokens: largest number of tokens of a batch, padding included.
    """

    def __init__(self, base: Base, taps: tuple[str, ...], *, block_tokens: int, batch_tokens: int):
        self._base = base
        self._taps = taps
        self._block_tokens = block_tokens
        self._batch_tokens = batch_tokens

    def batches(self, rows_S2: Array) -> list[list[int]]:
        """Return the batches of a block, the widest first, as lists of sequence numbers."""
        widths = [self._width(length) for length in (rows_S2[:, 1] - rows_S2[:, 0]).tolist()]
        return plan_batches(widths, self._batch_tokens)

    def _width(self, length: int) -> int:
        """Return the padded width of a batch whose longest sequence has ``length`` tokens."""
        most = getattr(self._base.model.config, "max_position_embeddings", None) or length
        return max(length, min(round_up(length, WIDTH_MULTIPLE), most, self._batch_tokens))

    def positions(self, rows_B2: Array) -> int:
        """Return the number of tokens of a batch, padding included."""
        return len(rows_B2) * self._width(int((rows_B2[:, 1] - rows_B2[:, 0]).max()))

    @torch.no_grad()
    @any_shape_attention()
    def batch(self, ids_N: Array, rows_B2: Array) -> dict[str, torch.Tensor]:
        """Return x_BTH by tap for one batch of sequences, on the base's device."""
        with TapRecorder(self._base.model, self._taps) as recorder:
            # Padding is on the right and attention is causal, so no token sees padding. Without a
            # mask, attention uses its fast causal kernel. `check` verifies this.
            width = self._width(int((rows_B2[:, 1] - rows_B2[:, 0]).max()))
            final_embeddings(self._base.model, self._padded(ids_N, rows_B2, width))
            return {tap: recorder.taps[tap] for tap in self._taps}

    @torch.no_grad()
    def __call__(
        self,
        ids_N: Array,
        rows_S2: Array,
        known: Mapping[int, dict[str, torch.Tensor]] = MappingProxyType({}),
    ) -> dict[str, torch.Tensor]:
        """Return the embeddings of a block.

        Args:
            ids_N: token ids of the block.
            rows_S2: where each sequence starts and ends in the block.
            known: results of `batch` for some of the block's batches, by number of the batch.

        Returns:
            x_NH by tap, on the base's device and in its dtype.
        """
        base = self._base
        x_NH = {
            tap: torch.zeros(
                self._block_tokens, base.identity.hidden_size, dtype=base.dtype, device=base.device
            )
            for tap in self._taps
        }
        for number, batch in enumerate(self.batches(rows_S2)):
            x_BTH = known[number] if number in known else self.batch(ids_N, rows_S2[batch])
            for tap in self._taps:
                for b, (first, stop) in enumerate(rows_S2[batch].tolist()):
                    x_NH[tap][first:stop] = x_BTH[tap][b, : stop - first]
        return x_NH

    def _padded(self, ids_N: Array, rows_S2: Array, width: int) -> torch.Tensor:
        """Return ids_BT, padded with 0, on the device; the copy is asynchronous."""
        ids_BT = torch.zeros(len(rows_S2), width, dtype=torch.long)
        for b, (first, stop) in enumerate(rows_S2.tolist()):
            ids_BT[b, : stop - first] = torch.from_numpy(ids_N[first:stop])
        if self._base.device.type == "cuda":
            ids_BT = ids_BT.pin_memory()
        return ids_BT.to(self._base.device, non_blocking=True)

    @torch.no_grad()
    @any_shape_attention()
    def check(
        self, ids_N: Array, rows_S2: Array, x_NH: dict[str, torch.Tensor], sample: int
    ) -> float:
        """Compare the ``sample`` most padded sequences with an unbatched forward pass.

        Sequences with values that are not finite are skipped, because `extract` quarantines them.

        Returns:
            The largest relative difference.

        Raises:
            NumericsError: a difference exceeds the tolerance.
        """
        base = self._base
        lengths = (rows_S2[:, 1] - rows_S2[:, 0]).tolist()
        padding = {
            index: self._width(max(lengths[other] for other in batch)) - lengths[index]
            for batch in self.batches(rows_S2)
            for index in batch
        }
        worst = 0.0
        with TapRecorder(base.model, self._taps) as recorder:
            for index in sorted(padding, key=lambda i: (-padding[i], i))[:sample]:
                first, stop = (int(v) for v in rows_S2[index])
                final_embeddings(base.model, self._padded(ids_N, rows_S2[[index]], stop - first))
                for tap in self._taps:
                    alone = recorder.taps[tap][0].float()
                    batched = x_NH[tap][first:stop].float()
                    if not (alone.isfinite().all() or batched.isfinite().all()):
                        continue
                    difference = ((alone - batched).norm() / alone.norm()).item()
                    if not difference <= TOLERANCE[base.dtype]:
                        raise NumericsError(
                            f"batched and unbatched embeddings of tap {tap} differ by "
                            f"{difference:.3g} (relative), expected at most "
                            f"{TOLERANCE[base.dtype]:.3g} in {base.dtype}: this base is not "
                            "computed correctly in padded batches. Set `batch_tokens=` to "
                            f"{min(lengths)} to run each sequence alone."
                        )
                    worst = max(worst, difference)
        return worst
