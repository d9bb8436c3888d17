"""Batches of several carry-ons as one, and attention without a mask where none is needed."""

from __future__ import annotations

import torch
from conftest import World
from support.carryons import change, change_at

from embedcache.carryon.branch.config import BranchConfig
from embedcache.carryon.branch.model import Branch
from embedcache.carryon.nn.attention import segment_mask
from embedcache.carryon.protocol import CarryOn, batch_features
from embedcache.data.frozen import FrozenInputs
from embedcache.data.loader import BatchLoader
from embedcache.training.step.stack import Work, stacked_batch
from embedcache.training.step.step_inputs import StepInputs


def model(world: World) -> CarryOn:
    torch.manual_seed(0)
    carryon = Branch(BranchConfig(width=32), world.cache().attributes.base["hidden_size"])
    torch.nn.init.normal_(carryon.branch.weight)
    return carryon


def test_rows_of_one_sequence_each_need_no_mask(world: World) -> None:
    inputs = FrozenInputs(world.cache(), torch.device("cpu"))
    carryon, seen = model(world), set()
    for tokens in (60, 256):
        for batch in BatchLoader(
            world.cache().split("train"), batch_tokens=tokens, taps=("final",)
        ).epoch(0):
            seen.add(batch.packed)
            rows = [len(set(row[row >= 0].tolist())) for row in batch.segments_BT]
            assert batch.packed == (max(rows) > 1)
            masked = change(
                carryon,
                {"final": batch.x_BTH["final"].float()},
                positions_BT=batch.positions_BT,
                attention=segment_mask(batch.segments_BT),
            )
            torch.testing.assert_close(
                change_at(carryon, batch, inputs),
                batch.at_predicted(masked),
                rtol=1e-4,
                atol=1e-5,
            )
    assert seen == {True, False}


def test_padding_to_the_largest_batch_changes_nobody(world: World) -> None:
    split = world.cache().split("train")
    batches = [
        next(BatchLoader(split, batch_tokens=tokens, taps=("final",), seed=tokens).epoch(0))
        for tokens in (60, 128)
    ]
    many = BatchLoader(split, batch_tokens=256, taps=("final",)).epoch(0)
    batches.insert(1, next(batch for batch in many if batch.packed))
    work = [Work(inputs=StepInputs(b), targets=0, rate=0) for b in batches]
    inputs = FrozenInputs(world.cache(), torch.device("cpu"))
    carryon = model(world)
    together = stacked_batch(work)
    stack = Branch.stack([carryon] * 3)
    found = stack.change(batch_features(stack, together, inputs))
    assert together.packed
    for k, batch in enumerate(batches):
        B, T = batch.ids_BT.shape
        torch.testing.assert_close(
            found[k, :B, :T].flatten(0, 1).index_select(0, batch.predict_N),
            change_at(carryon, batch, inputs),
            rtol=1e-4,
            atol=1e-5,
        )
        assert (together.segments_BT[k, B:] == -1).all()
        assert not together.x_BTH["final"][k, :, T:].any()
