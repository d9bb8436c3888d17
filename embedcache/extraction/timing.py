"""How long blocks will take: a pipeline of two stages, from what was measured of each.

Blocks are computed one after the other (forward, encoding, the copy to the host) and committed on
threads beside (coding, hashing, writing, flushing). Either stage may be the slower one, the first
has to be filled and the last to be drained.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Iterator

import torch

from embedcache.base.forward import CHECK_EVERY
from embedcache.extraction.measure import Measured
from embedcache.extraction.sample import Item, Known


def blocks_seconds(
    tokens: dict[str, int],
    todo: list[Item],
    measured: Measured,
    known: Known,
) -> float:
    """Return the time from the first of the blocks ``todo`` to the last one's commit.

    ``tokens`` are theirs, by split; batches that are ``known`` are not computed again.
    """
    return pipeline_seconds(_stages(tokens, todo, measured, known), measured.threads)


def pipeline_seconds(stages: Iterable[tuple[float, float]], threads: int) -> float:
    """Return when the last of some blocks is committed, by the seconds of each one's stages.

    >>> pipeline_seconds([(1.0, 3.0)] * 4, threads=1)
    13.0
    >>> pipeline_seconds([(1.0, 3.0)] * 4, threads=3)
    7.0
    """
    computed, free = 0.0, [0.0] * threads
    for computing, committing in stages:
        computed += computing
        heapq.heapreplace(free, max(computed, free[0]) + committing)
    return max(free)


def _stages(
    tokens: dict[str, int],
    todo: list[Item],
    measured: Measured,
    known: Known,
) -> Iterator[tuple[float, float]]:
    """Yield the seconds of computing and of committing each block, self-checks included."""
    positions = sum(tokens.values()) * measured.padding
    there = sum(map(_positions, (known[item] for item in todo if item in known)))
    todo_share = max(0.0, 1 - there / max(1, positions))
    forward = todo_share * measured.padding * measured.position_seconds
    blocks = Counter(name for name, _ in todo)
    for number, (name, _) in enumerate(todo):
        if name not in measured.encoded:
            continue  # its blocks hold nothing
        rows, encoded = tokens[name] / blocks[name], measured.encoded[name]
        late = todo_share * encoded.late_seconds
        computing = rows * (max(0.0, forward + late) + encoded.row_seconds)
        if number % CHECK_EVERY == 0:
            computing += measured.check_seconds if number else 2 * measured.check_seconds
        yield computing, rows * encoded.commit_seconds


def _positions(batches: dict[int, dict[str, torch.Tensor]]) -> int:
    """Return the positions of a block's batches, padding included."""
    return sum(next(iter(x_BTH.values())).shape[:2].numel() for x_BTH in batches.values())
