"""What a feed draws for the batches that it gives."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import World

from embedcache.carryon.branch.config import BranchConfig
from embedcache.training.config import TrainConfig
from embedcache.training.distributed import ALONE, Ranks
from embedcache.training.inputs import Materials
from embedcache.training.run.checkpoint import TrainState
from embedcache.training.step.batch_stream import Feed
from embedcache.training.step.settings import PLAIN, Recipe


@pytest.mark.parametrize("part_tokens", [None, 80])
@pytest.mark.parametrize(("epoch", "position"), [(0, 0), (1, 4), (1, 999)])
@pytest.mark.parametrize("count", [1, 2])
def test_draws_are_those_of_the_step_over_epochs_and_parts(
    world: World, part_tokens, epoch, position, count
):
    config = TrainConfig(carryon=BranchConfig(width=32), batch_tokens=200, samples=30, epochs=3)
    shared = Materials(world.cache(), torch.device("cpu"), Ranks(rank=0, count=count))
    recipe = Recipe(part_tokens=part_tokens)
    shortlist = shared.shortlist(config, recipe)
    step = 7
    states = TrainState(epoch=epoch, position=position, step=step)
    members = [
        SimpleNamespace(state=states, config=one) for one in (replace(config, epochs=1), config)
    ]
    loader = shared.train_loader(config, recipe)
    feed = Feed(loader, members, shortlist)
    drawn = []
    for at in range(epoch, 3):
        seen = []
        while feed.advance():
            generator = shortlist.generator(step)
            while True:
                seen.append(feed.due.batch.sequences)
                (found,) = feed.due.shortlists
                (expected,) = shortlist.draw(feed.due.batch.targets_N, generator)
                assert torch.equal(found.weight_CH, expected.weight_CH)
                assert torch.equal(found.index_N, expected.index_N)
                drawn.append(found.log_weight_C)
                feed.let_go()
                assert feed.due is None
                if feed.ended:
                    break
                feed.next_part()
            step += 1
        whole = loader.epoch(at, skip=position if at == epoch else 0)
        assert seen == [batch.sequences for batch in whole]
    assert len(drawn) > step - 7 > 3 if part_tokens else len(drawn) == step - 7 > 3
    assert not torch.equal(drawn[0], drawn[1])


def test_what_memory_ran_out_for_is_drawn_again_as_it_was(world: World, monkeypatch):
    config = TrainConfig(carryon=BranchConfig(width=32), batch_tokens=200, samples=30)
    shared = Materials(world.cache(), torch.device("cpu"), ALONE)
    loader, shortlist = shared.train_loader(config, PLAIN), shared.shortlist(config, PLAIN)
    members = [SimpleNamespace(state=TrainState(), config=config)]
    prepare = Feed(loader, members, shortlist)._preparing(3)
    batch = next(loader.epoch(0))
    other = Feed(loader, members, shortlist)._preparing(3)
    (expected,) = other(replace(batch, last_part=False)).shortlists
    columns, failed = shortlist.columns, []

    def short(*given):
        found = columns(*given)
        if not failed:
            failed.append(1)
            raise torch.OutOfMemoryError
        return found

    monkeypatch.setattr(shortlist, "columns", short)
    with pytest.raises(torch.OutOfMemoryError):
        prepare(batch)
    (found,) = prepare(batch).shortlists
    assert torch.equal(found.log_weight_C, expected.log_weight_C)
