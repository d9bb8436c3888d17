"""What a feed draws for the batches that it gives."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from conftest import World

from embedcache.carryon.config import CarryOnConfig
from embedcache.training.checkpoint import TrainState
from embedcache.training.config import TrainConfig
from embedcache.training.feed import Feed
from embedcache.training.materials import Materials
from embedcache.training.ranks import ALONE
from embedcache.training.recipe import Recipe


@pytest.mark.parametrize("part_tokens", [None, 80])
@pytest.mark.parametrize("step", [0, 3])
def test_draws_are_those_of_the_step_part_by_part(world: World, part_tokens, step):
    config = TrainConfig(carryon=CarryOnConfig(width=32), batch_tokens=200, samples=30)
    shared = Materials(world.cache(), torch.device("cpu"), ALONE)
    recipe = Recipe(part_tokens=part_tokens)
    shortlist = shared.shortlist(config, recipe)
    member = SimpleNamespace(state=TrainState(step=step))
    feed = Feed(shared.train_loader(config, recipe), [member], shortlist)
    drawn = []
    for number in range(3):
        assert feed.advance()
        generator = shortlist.generator(step + number)
        while True:
            (found,), (expected,) = (
                feed.batch.drawn,
                shortlist.draw(feed.batch.targets_N, generator),
            )
            assert torch.equal(found.weight_CH, expected.weight_CH)
            assert torch.equal(found.index_N, expected.index_N)
            drawn.append(found.log_weight_C)
            if feed.batch.last:
                break
            feed.next_part()
        feed.batch = None
    assert len(drawn) == 3 if part_tokens is None else len(drawn) > 3
    assert not torch.equal(drawn[0], drawn[1])
