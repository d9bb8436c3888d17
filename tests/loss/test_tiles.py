"""Tiles of a head: views on the device, copies of one in host memory."""

from __future__ import annotations

import pytest
import torch
from support.loss_problems import HEADS, problem

from embedcache.base.head import Head
from embedcache.loss import Chunks, VocabSubset, linear_cross_entropy
from embedcache.loss.tiles import LabelRows, tiles

ELSEWHERE = torch.device("cuda")  # not the head's device; nothing is allocated there


def test_tiles_of_a_head_on_the_device_are_views():
    _, head, _ = problem("bias", 7, 33, 5)
    subset = VocabSubset.whole(head)
    slices = Chunks(rows=1, columns=10).of_columns(33)
    starts = []
    for tile in tiles(subset, slices, torch.device("cpu")):
        starts.append(tile.start)
        size = len(tile.subset.weight_CH)
        assert tile.subset.weight_CH.data_ptr() == head.weight_VH[tile.start :].data_ptr()
        assert torch.equal(tile.subset.weight_CH, head.weight_VH[tile.start : tile.start + size])
        assert torch.equal(tile.subset.bias_C, head.bias_V[tile.start : tile.start + size])
    assert starts == [0, 10, 20, 30]


def test_label_rows_copied_from_streamed_tiles_are_those_looked_up():
    _, head, targets = problem("plain", 64, 101, 16)
    subset = VocabSubset.whole(head)
    copied = LabelRows(subset, targets, ELSEWHERE)
    for tile in tiles(subset, Chunks(rows=1, columns=30).of_columns(101), torch.device("cpu")):
        copied.copy_from(tile)
    chunk = slice(5, 40)
    for labels in (copied, LabelRows(subset, targets, torch.device("cpu"))):
        matrix, index = labels.source(chunk)
        assert torch.equal(matrix[index], head.weight_VH[targets[chunk]])


@pytest.mark.gpu
@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("sizes", [(64, 128), (1000, 100), (70, 2003)])
def test_a_head_streamed_from_host_memory_gives_the_same(kind, dtype, sizes):
    x, head, targets = problem(kind, 200, 2003, 96, dtype, "cuda")
    bias = None if head.bias_V is None else head.bias_V.cpu()
    host = Head(
        head.weight_VH.cpu().pin_memory(), bias, logit_scale=head.logit_scale, softcap=head.softcap
    )
    chunks = Chunks(rows=sizes[0], columns=sizes[1])
    results = []
    for each in (head, host):
        for _ in range(3):  # repeated: reused memory must not matter
            loss = linear_cross_entropy(x, each, targets, chunks=chunks)
            (gradient,) = torch.autograd.grad(loss.sum(), x)
        results.append((loss, gradient))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
