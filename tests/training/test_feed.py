"""What a feed draws for the batches that it gives."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import World

from embedcache.carryon.config import CarryOnConfig
from embedcache.training.checkpoint import TrainState
from embedcache.training.config import TrainConfig
from embedcache.training.feed import Feed
from embedcache.training.materials import Materials
from embedcache.training.ranks import Ranks
from embedcache.training.recipe import Recipe


@pytest.mark.parametrize("part_tokens", [None, 80])
@pytest.mark.parametrize(("epoch", "position"), [(0, 0), (1, 4), (1, 999)])
@pytest.mark.parametrize("count", [1, 2])
def test_draws_are_those_of_the_step_over_epochs_and_parts(
    world: World, part_tokens, epoch, position, count
):
    config = TrainConfig(carryon=CarryOnConfig(width=32), batch_tokens=200, samples=30, epochs=3)
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
                seen.append(feed.batch.sequences)
                (found,) = feed.batch.drawn
                (expected,) = shortlist.draw(feed.batch.targets_N, generator)
                assert torch.equal(found.weight_CH, expected.weight_CH)
                assert torch.equal(found.index_N, expected.index_N)
                drawn.append(found.log_weight_C)
                feed.let_go()
                assert feed.batch is None
                if feed.ended:
                    break
                feed.next_part()
            step += 1
        whole = loader.epoch(at, skip=position if at == epoch else 0)
        assert seen == [batch.sequences for batch in whole]
    assert len(drawn) > step - 7 > 3 if part_tokens else len(drawn) == step - 7 > 3
    assert not torch.equal(drawn[0], drawn[1])
