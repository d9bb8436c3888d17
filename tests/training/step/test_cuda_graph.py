"""Steps by CUDA graphs against the same steps of a stack; CUDA itself is tested in `test_gpu`."""

from __future__ import annotations

import gc
import json
import weakref
from dataclasses import replace

import pytest
import torch
from conftest import World

from embedcache.carryon.branch.config import BranchConfig
from embedcache.carryon.branch.model import Branch
from embedcache.data import packing
from embedcache.training import inputs as inputs_module
from embedcache.training import trainer
from embedcache.training.config import TrainConfig
from embedcache.training.distributed import ALONE, Ranks
from embedcache.training.step import cuda_graph, padding
from embedcache.training.step.cuda_graph import GraphedStack
from embedcache.training.step.settings import PLAIN, StepSettings
from embedcache.training.step.stack import Stack, Work
from embedcache.training.step.step_inputs import StepInputs
from embedcache.training.sweep import sweep

CPU = torch.device("cpu")
CONFIG = TrainConfig(carryon=BranchConfig(width=32, blocks=1), batch_tokens=500, samples=30)


class Replayed:
    """Stands for a CUDA graph on a CPU: it computes the same part into the same tensors."""

    def __init__(self, part):
        part()
        self.part, self.made, self.replays = part, part(), 0

    def replay(self):
        self.replays += 1
        made = self.part()
        for kept, found in zip(*map(tensors, (self.made, made)), strict=True):
            kept.copy_(found)

    def pool(self):
        return None


def tensors(made) -> tuple[torch.Tensor, ...]:
    return made if isinstance(made, tuple) else (made,)


@pytest.fixture
def ends(monkeypatch) -> list[Replayed]:
    """Captured ends of steps."""
    return []


@pytest.fixture
def graphs(monkeypatch, ends) -> list[Replayed]:
    """Captured parts."""
    made: list[Replayed] = []

    def capture(part, device, pool, **more):
        graph = Replayed(part)
        (ends if isinstance(graph.made, tuple) else made).append(graph)
        return graph, graph.made

    monkeypatch.setattr(cuda_graph, "capture", capture)
    return made


@pytest.fixture
def stacks(world: World, monkeypatch, graphs):
    """Two equal stacks of two, and batches in parts of one row."""
    monkeypatch.setattr(packing, "CU_SEQLENS_MULTIPLE", 8)
    monkeypatch.setattr(cuda_graph, "OFTEN", 1)
    monkeypatch.setattr(padding, "COLUMNS", 384)  # shortlists have 256
    monkeypatch.setattr(inputs_module, "fast_dtype", lambda device: torch.float32)

    def make(loss: str):
        shared = inputs_module.TrainingInputs(world.cache(), CPU, ALONE)
        configs = [replace(CONFIG, seed=seed, lr=5e-3 * (seed + 1)) for seed in range(2)]
        models = []
        for config in configs:
            torch.manual_seed(config.seed)
            model = Branch(config.carryon, 32)
            torch.nn.init.normal_(model.branch.weight, std=0.1)
            models.append(model)
        frozen = shared.frozen(CONFIG.carryon, PLAIN, training=True)
        loader = shared.train_loader(CONFIG, StepSettings(part_tokens=200, one_row=True))
        shortlist = shared.shortlist(CONFIG, PLAIN) if loss == "shortlist" else None

        def prepare(batch):
            if shortlist is None:
                return StepInputs(batch)
            return StepInputs(batch, shortlist.draw(batch.targets_N, shortlist.generator(1)))

        batches = list(map(prepare, loader.epoch(0)))
        return [Stack(models, configs, frozen) for _ in range(2)], batches

    return make, graphs


def changed(inputs: StepInputs, **fields) -> StepInputs:
    """Return the inputs with other values of the batch's fields."""
    return replace(inputs, batch=replace(inputs.batch, **fields))


def longer(inputs: StepInputs, more: int) -> StepInputs:
    """Return the inputs with so many more empty sequences."""
    cu_seqlens_M = inputs.batch.cu_seqlens_M
    return changed(inputs, cu_seqlens_M=torch.cat([cu_seqlens_M, cu_seqlens_M[-1:].repeat(more)]))


def first_targets(inputs: StepInputs, count: int) -> StepInputs:
    batch = inputs.batch
    few = changed(inputs, predict_N=batch.predict_N[:count], targets_N=batch.targets_N[:count])
    return replace(few, shortlists=[s._replace(index_N=s.index_N[:count]) for s in few.shortlists])


def works(batches) -> list[list[Work]]:
    """Return the work of every part of one step or more."""
    return [
        [
            Work(
                inputs=inputs,
                targets=inputs.batch.total.targets,
                rate=1e-3 * (number + 1) * (k + 1),
            )
            for k in range(2)
        ]
        for number, inputs in enumerate(batches)
    ]


def step(stack: Stack, taker: Stack | GraphedStack, parts: list[list[Work]]):
    """Take a step, part by part."""
    stack.begin(parts[0])
    found = taker.finish(sum(taker.prepared(work)().clone() for work in parts))
    return [value.clone() for value in found]


def in_steps(batches) -> list[list[list[Work]]]:
    steps: list[list[list[Work]]] = [[]]
    for work in works(batches):
        steps[-1].append(work)
        if work[0].inputs.batch.last_part:
            steps.append([])
    return steps[:-1]


@pytest.mark.parametrize("loss", ["exact", "shortlist"])
def test_replayed_steps_are_those_computed_alone(stacks, ends, loss):
    make, graphs = stacks
    (plain, captured), batches = make(loss)
    graphed = GraphedStack(captured, CPU)
    steps = in_steps(batches * 2)
    assert len(steps) < len(batches * 2)
    for parts in steps:
        expected = step(plain, plain, parts)
        found = step(captured, graphed, parts)
        for value, other in zip(found, expected, strict=True):
            torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        captured.optimizer.values_KP, plain.optimizer.values_KP, rtol=1e-3, atol=1e-5
    )
    # Few shapes, each captured once, in the middle of steps as well; all parts were replayed.
    assert [end.replays for end in ends] == [len(steps)]
    assert sum(graph.replays for graph in graphs) == 2 * len(batches)
    assert (
        len(graphs)
        == len({padding.shape_of(batch, whole=False) for batch in batches})
        < len(batches)
    )
    moments = [stack.optimizer.moments(0)["step"] for stack in (plain, captured)]
    assert moments == [len(steps)] * 2


def test_a_part_without_targets_is_captured_like_others(stacks):
    make, graphs = stacks
    (plain, captured), batches = make("exact")
    nothing = batches[0].batch.predict_N[:0]
    empty = changed(batches[0], predict_N=nothing, targets_N=nothing)
    found = []
    for stack, taker in ((plain, plain), (captured, GraphedStack(captured, CPU))):
        found.append(step(stack, taker, works([empty, batches[1]])))
    for value, other in zip(*found, strict=True):
        torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-6)
    assert sum(graph.replays for graph in graphs) == 2


def test_a_loss_that_is_not_finite_moves_only_the_others(stacks):
    make, _ = stacks
    (_, captured), batches = make("exact")
    graphed = GraphedStack(captured, CPU)
    first, second = works(batches[:2])
    step(captured, graphed, [first])
    before = captured.optimizer.values_KP.clone()
    captured.model.branch.bias.data[1] = torch.nan
    before[1] = captured.optimizer.values_KP[1]
    loss_K, _ = step(captured, graphed, [second])
    assert loss_K.isfinite().tolist() == [True, False]
    assert not torch.equal(captured.optimizer.values_KP[0], before[0])
    torch.testing.assert_close(captured.optimizer.values_KP[1], before[1], equal_nan=True)
    assert [int(captured.optimizer.moments(k)["step"]) for k in range(2)] == [2, 1]


def test_the_stack_computes_what_cannot_be_captured(stacks, monkeypatch):
    make, graphs = stacks
    (plain, captured), batches = make("exact")
    graphed = GraphedStack(captured, CPU)
    work = works(batches[:1])[0]
    rows = changed(batches[0], cu_seqlens_M=None)
    apart = [work[0], replace(work[1], inputs=replace(batches[0]))]

    def check(work):
        found = step(captured, graphed, [work])
        for value, other in zip(found, step(plain, plain, [work]), strict=True):
            torch.testing.assert_close(value, other)

    for one in (works([rows])[0], apart):
        check(one)
    monkeypatch.setattr(cuda_graph, "SHAPES", 0)
    check(work)
    assert not graphs


@pytest.mark.parametrize("room", [1, 3])  # the end is captured first, then two shapes of parts
def test_without_room_for_a_graph_the_stack_takes_the_steps(stacks, monkeypatch, room):
    make, graphs = stacks
    (plain, captured), batches = make("exact")
    capture, tried = cuda_graph.capture, []

    def short(part, device, pool, **more):
        tried.append(1)
        if len(tried) == room:
            part()
            raise torch.OutOfMemoryError
        return capture(part, device, pool, **more)

    monkeypatch.setattr(cuda_graph, "capture", short)
    graphed = GraphedStack(captured, CPU)
    parts = works(batches)
    found = step(captured, graphed, parts)
    for value, other in zip(found, step(plain, plain, parts), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-6)
    assert len(tried) == room and len(graphs) == room // 2
    assert not graphed.room and not graphed._graphs and graphed._finish is None


def test_a_streamed_head_is_not_captured(stacks):
    make, graphs = stacks
    (_, captured), batches = make("exact")
    captured.streams = lambda batch: True
    step(captured, GraphedStack(captured, CPU), works(batches[:1]))
    assert not graphs


@pytest.mark.parametrize("loss", [pytest.param("exact", marks=pytest.mark.slow), "shortlist"])
def test_training_by_graphs_learns_the_same(world, tmp_path, monkeypatch, graphs, ends, loss):
    found = []
    for capture in (False, True):
        settings = StepSettings(part_tokens=200, one_row=True, cuda_graph=capture)
        monkeypatch.setattr(trainer, "plain_settings", lambda *given, settings=settings: settings)
        runs = {
            tmp_path / f"{capture}{seed}": replace(CONFIG, loss=loss, seed=seed, order_seed=0)
            for seed in range(2)
        }
        results = sweep(world.cache_path, runs=runs, device="cpu")
        assert bool(graphs) is bool(ends) is capture
        found.append([one.summary.best_dev for one in results])
        for out in runs:
            lines = (out / "metrics.jsonl").read_text().splitlines()
            rows = [json.loads(line) for line in lines]
            found[-1] += [row["train_loss"] for row in rows if "train_loss" in row]
    assert found[1] == pytest.approx(found[0], rel=1e-4)
    assert all(graph.replays for graph in graphs)
    # Within a budget no graph is kept while dev is scored.
    assert [end.replays > 0 for end in ends] == [True] * CONFIG.epochs + [False]


def test_many_carry_ons_are_not_captured(world, tmp_path, monkeypatch, graphs):
    settings = StepSettings(one_row=True, cuda_graph=True)
    monkeypatch.setattr(trainer, "plain_settings", lambda *given: settings)
    monkeypatch.setattr(cuda_graph, "OFTEN", 1)
    monkeypatch.setattr(cuda_graph, "MOST", 2)
    for many in (3, 2):
        assert not graphs
        config = replace(CONFIG, loss="exact", epochs=1, order_seed=0)
        runs = {tmp_path / f"{many}.{seed}": replace(config, seed=seed) for seed in range(many)}
        assert not any(one.failure for one in sweep(world.cache_path, runs=runs, device="cpu"))
    assert graphs


def test_a_step_s_end_that_needs_other_processes_is_not_captured(stacks, ends):
    make, _ = stacks
    (_, captured), _ = make("exact")
    captured._ranks = Ranks(count=2)
    GraphedStack(captured, CPU)
    assert not ends


def test_capturing_the_end_of_a_step_moves_nothing(stacks):
    """Each step is clipped and counted once, the first one as well."""
    make, _ = stacks
    (plain, captured), batches = make("exact")
    for stack in (plain, captured):
        stack.optimizer._clip_K.fill_(1e-2)
    graphed = GraphedStack(captured, CPU)
    parts = works(batches[:1])
    found, expected = step(captured, graphed, parts), step(plain, plain, parts)
    assert expected[1].min() > 1e-2
    for value, other in zip(found, expected, strict=True):
        torch.testing.assert_close(value, other)


def test_within_a_budget_one_graph_grows_to_take_all_parts(stacks, ends, monkeypatch):
    """A larger part's graph replaces the one before; smaller parts are padded to it."""
    monkeypatch.setattr(padding, "BOUNDARIES", 8)
    make, graphs = stacks
    (plain, captured), batches = make("shortlist")
    for stack in (plain, captured):
        stack.settings = replace(PLAIN, part_tokens=200)
    graphed = GraphedStack(captured, CPU)
    widest = max(batches, key=lambda inputs: len(inputs.shortlists[0].weight_CH))
    few = widest.shortlists[0]
    many = few._replace(
        weight_CH=torch.cat([few.weight_CH] * 3),
        log_weight_C=torch.cat([few.log_weight_C, few.log_weight_C - 9, few.log_weight_C - 8]),
    )
    wide = replace(longer(widest, 8), shortlists=[many])
    some = batches[0]  # of more sequences, and of fewer columns, than the widest
    longest = longer(some, 24)
    for one in (some, wide, longest, wide, *batches):
        expected = step(plain, plain, works([one]))
        found = step(captured, graphed, works([one]))
        for value, other in zip(found, expected, strict=True):
            torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-6)
        assert len(graphed._graphs) == 1
    assert len(graphs) == 3 and len(ends) == 1
    (shape,) = graphed._graphs
    assert shape.columns == 384 * -(-3 * len(few.weight_CH) // 384)
    assert shape.positions >= 200 and shape.boundaries == len(longest.batch.cu_seqlens_M)


def test_within_a_budget_a_few_more_sequences_need_no_other_graph(stacks):
    make, graphs = stacks
    (plain, captured), batches = make("exact")
    for stack in (plain, captured):
        stack.settings = replace(PLAIN, part_tokens=200)
    graphed = GraphedStack(captured, CPU)
    few = changed(batches[0], cu_seqlens_M=batches[0].batch.cu_seqlens_M[-8:].clone())
    few.batch.cu_seqlens_M[0] = 0
    more = longer(few, 8)
    for one in (few, more, few):
        found, expected = step(captured, graphed, works([one])), step(plain, plain, works([one]))
        for value, other in zip(found, expected, strict=True):
            torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-6)
    assert [shape.boundaries for shape in graphed._graphs] == [16] and len(graphs) == 1


def test_a_batch_is_freed_before_its_graph_is_replayed(stacks):
    """The memory of a batch that was copied serves the next part."""
    make, graphs = stacks
    (_, captured), batches = make("shortlist")
    graphed = GraphedStack(captured, CPU)
    for _ in range(2):  # the first is captured, the second only copied
        x_BTH = {tap: x.clone() for tap, x in batches[0].batch.x_BTH.items()}
        batch = changed(batches[0], x_BTH=x_BTH)
        kept = weakref.ref(x_BTH["final"])
        (work,) = works([batch])
        captured.begin(work)
        differentiate = graphed.prepared(work)
        del batch, work, x_BTH
        gc.collect()
        assert kept() is None
        differentiate()
    assert [graph.replays for graph in graphs] == [2]


def test_a_rare_shape_is_computed_by_the_graph_of_a_larger_one(stacks, monkeypatch):
    make, graphs = stacks
    monkeypatch.setattr(cuda_graph, "OFTEN", 4)
    (plain, captured), batches = make("shortlist")
    graphed, whole, few = GraphedStack(captured, CPU), batches[0], first_targets(batches[0], 20)
    fewer, more = (padding.shape_of(one, whole=False) for one in (few, whole))
    assert more.holds(fewer)
    assert fewer.logits() < more.logits()
    between = fewer._replace(boundaries=fewer.boundaries + 8)
    for shapes in ((more, between), (between, more)):
        graphed._graphs = dict.fromkeys(shapes)
        assert graphed._shape(few) == between  # the smallest that holds it
    graphed = GraphedStack(captured, CPU)
    made = []
    for one in (whole, few, few, few, few, few, whole):
        found, expected = step(captured, graphed, works([one])), step(plain, plain, works([one]))
        for value, other in zip(found, expected, strict=True):
            torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-6)
        made.append(len(graphs))
    assert made == [1, 1, 1, 1, 2, 2, 2]
    assert [graph.replays for graph in graphs] == [5, 2]


def test_a_shape_that_no_graph_holds_is_captured_at_once(stacks, monkeypatch):
    make, graphs = stacks
    monkeypatch.setattr(cuda_graph, "OFTEN", 4)
    (_, captured), batches = make("exact")
    graphed, few = GraphedStack(captured, CPU), first_targets(batches[0], 20)
    for one in (few, longer(batches[0], 16)):
        step(captured, graphed, works([one]))
    assert len(graphs) == 2
    monkeypatch.setattr(cuda_graph, "SHAPES", 2)
    for _ in range(6):  # one shape too many: the graph of the larger one computes it for good
        step(captured, graphed, works([longer(few, 8)]))
    assert [graph.replays for graph in graphs] == [1, 7]


def test_a_stream_s_end_does_not_make_all_deltas_at_once(stacks, monkeypatch):
    """A batch without tokens has no shortlist; that of the one beside it has."""
    make, _ = stacks
    (plain, _), batches = make("shortlist")
    plain.settings = replace(PLAIN, delta_positions=32)
    plain.streams = lambda inputs: not inputs.shortlists
    losses, rows = plain._losses, []
    plain._losses = lambda groups, h_KnR, some: (
        rows.append(h_KnR.shape[1]) or losses(groups, h_KnR, some)
    )
    seen = [batches[0].without_tokens(), batches[0]]
    plain.differentiate([Work(inputs=inputs, targets=9, rate=0.0) for inputs in seen])
    assert len(rows) > 1 and max(rows) == 32
