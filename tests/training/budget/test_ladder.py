"""The ladder of a memory budget: which settings are tried, in which order."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from embedcache.errors import UsageError
from embedcache.training.budget import ladder as ladder_module
from embedcache.training.budget.allocator import peak_memory
from embedcache.training.budget.ladder import ladder
from embedcache.training.budget.probe import _first_that_holds, _plans
from embedcache.units import parse_bytes

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def with_triton(monkeypatch):
    monkeypatch.setattr(ladder_module, "has_triton", lambda: True)


def rungs(device: torch.device = CUDA, **changes):
    given = {"budget": 1 << 30, "hidden": 64, "head_width": 32, "loss": "shortlist"}
    given |= {"longest": 100, "step_tokens": 16384, "graphs": True}
    return ladder(device, **(given | changes))


def places(**changes) -> list[tuple[bool, bool, bool]]:
    found = [(one.settings.host_head, one.settings.offload) for one in rungs(**changes)]
    again = [one.settings.recompute for one in rungs(**changes)]
    return [(*place, recompute) for place, recompute in zip(found, again, strict=True)]


def test_the_peak_counts_all_tensors_that_live_at_a_time():
    kept = []
    with peak_memory(CPU, [torch.zeros(100)]) as peak:
        a = torch.ones(1000, 100)
        b = a * 2
        view = b[:10]
        del a
        kept.append(view.sum())
        b += 1
        del b, view
        torch.ones(10)
    assert peak == [400 + 800_000 + 0]
    weight = torch.randn(500, 500, requires_grad=True)
    with peak_memory(CPU, []) as peak:
        x = torch.randn(2000, 500)
        (x @ weight).relu().square().sum().backward()
    # x, the product, what relu and square keep and give, the gradient of each on its way
    assert 4e6 * 4 < peak[0] < 4e6 * 6


def test_an_exact_loss_moves_the_head_to_host_memory_last():
    head, optimiser, both = (True, False, False), (False, True, False), (True, True, False)
    start, end = [(False, False, False), (False, False, True)], [both, (True, True, True)]
    assert places(loss="shortlist") == [*start, head, *end]
    assert places(loss="exact") == [*start, optimiser, *end]
    assert places(device=CPU) == start


def test_without_triton_the_optimiser_stays_on_the_gpu(monkeypatch):
    monkeypatch.setattr(ladder_module, "has_triton", lambda: False)
    assert not any(offload for _, offload, _ in places())
    assert [head for head, _, _ in places()] == [False, False, True, True]


def test_graphs_are_captured_but_for_a_streamed_head_and_the_last_resort(recording):
    assert [one.settings.cuda_graph for one in rungs()] == [True] * 5 + [False]
    assert rungs()[-1].sizes == [100]
    assert [one.settings.cuda_graph for one in rungs(loss="exact")] == [True] * 3 + [False] * 2
    assert not any(one.settings.cuda_graph for one in rungs(graphs=False))


def test_parts_hold_a_sequence_and_are_no_larger_than_a_step():
    for one in rungs(step_tokens=2000, longest=600):
        assert one.sizes[0] == 2000 and one.sizes[-1] == 600
        assert all(a > b for a, b in pairwise(one.sizes))
    *others, leanest = rungs()
    assert leanest.sizes[-1] == 100
    assert all(one.sizes[-1] == 512 for one in others)
    assert {one.sizes[0] for one in rungs(step_tokens=50)} == {100}


@pytest.mark.parametrize("limit", [0, 64, 500, 1024, 5000, 1 << 20])
def test_bisection_finds_the_first_plan_that_holds(limit):
    class Probe:
        def taken(self, settings, most):
            return settings.part_tokens if settings.part_tokens <= most else None

    plans = list(_plans(rungs(CPU)[-1:], 1))
    expected = next((plan for plan in plans if plan.settings.part_tokens <= limit), None)
    found = _first_that_holds(plans, Probe(), limit)
    assert (found and found.settings) == (expected and expected.settings)
    assert found is None or found.expected == found.settings.part_tokens


@pytest.mark.parametrize("text", ["", "GB", "1 GiBs", "-1GB", "1,5GB"])
def test_a_text_that_is_no_size_is_refused(text):
    with pytest.raises(UsageError, match="1GB"):
        parse_bytes(text)
