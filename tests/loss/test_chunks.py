"""Plans of how many logits exist at a time."""

from __future__ import annotations

import pytest
import torch

from embedcache.errors import UsageError
from embedcache.loss.chunks import Chunks, plan_chunks

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
MIB = 1 << 20


@pytest.mark.parametrize("N", [1, 1025, 16_384])
@pytest.mark.parametrize("V", [3, 50_257])
@pytest.mark.parametrize("budget", [8 * MIB, 1024 * MIB])
@pytest.mark.parametrize("hidden", [0, 5120])
def test_chunks_cover_all_within_the_budget(N, V, budget, hidden):
    plan = plan_chunks(
        N, V, torch.bfloat16, CUDA, budget=budget, streamed_hidden=min(hidden, budget >> 14)
    )
    held = plan.columns * (plan.rows + 2 * min(hidden, budget >> 14)) * 2
    assert held == plan.bytes <= budget
    for total, cuts in ((N, plan.of_rows(N)), (V, plan.of_columns(V))):
        assert [i for cut in cuts for i in range(total)[cut]] == list(range(total))


def test_a_gpu_takes_the_whole_vocabulary_for_equal_chunks_of_rows():
    plan = plan_chunks(16_384, 248_320, torch.bfloat16, CUDA, budget=1024 * MIB)
    assert plan == Chunks(rows=2048, columns=248_320, bytes=2 * 2048 * 248_320)
    assert str(plan) == "2,048 positions × 248,320 tokens (1.0 GB)"


def test_chunks_are_of_equal_size():
    # 10,922 positions would fit, and leave 5,462 for the second chunk.
    plan = plan_chunks(16_384, 49_152, torch.bfloat16, CUDA, budget=1024 * MIB)
    assert (plan.rows, plan.columns) == (8192, 49_152)


def test_a_small_budget_cuts_the_vocabulary_before_products_get_narrow():
    plan = plan_chunks(16_384, 49_152, torch.float32, CPU)
    assert plan == Chunks(rows=1024, columns=4096, bytes=16 * MIB)


def test_few_positions_get_wide_tiles():
    assert plan_chunks(10, 49_152, torch.float32, CPU).columns == 49_152


def test_a_budget_that_is_too_small_is_refused():
    with pytest.raises(UsageError, match=r"at least 524\.3 kB.*found 500\.0 kB"):
        plan_chunks(16_384, 49_152, torch.float32, CPU, budget=500_000)
    assert plan_chunks(16_384, 49_152, torch.float32, CPU, budget=524_288).columns == 128


@pytest.mark.gpu
def test_a_gpu_nearly_full_gets_a_smaller_budget():
    from embedcache.loss.chunks import FREE_SHARE, LOGIT_BYTES, default_budget

    device = torch.device("cuda")
    torch.cuda.empty_cache()  # memory that earlier tests left counts as free
    assert default_budget(device) == LOGIT_BYTES["cuda"]
    free = torch.cuda.mem_get_info()[0]
    held = torch.empty(free - LOGIT_BYTES["cuda"], dtype=torch.uint8, device=device)
    assert 0 < default_budget(device) <= FREE_SHARE * LOGIT_BYTES["cuda"] * 1.1
    del held
    torch.cuda.empty_cache()  # other tests start processes on the same device
