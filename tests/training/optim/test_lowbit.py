"""Numbers in 16 bits: what is lost, and that nothing is of a weight."""

from __future__ import annotations

import pytest
import torch

from embedcache.training.optim.lowbit import (
    decoded_square,
    draws,
    encoded_square,
    joined,
    split,
    stepped_square,
)


def test_two_halves_are_all_of_a_weight():
    draw = torch.Generator().manual_seed(0)
    exact = torch.randint(-(2**31), 2**31, (200_000,), generator=draw).to(torch.int32)
    exact = exact.view(torch.float32)
    exact = torch.cat([exact[exact.abs() < 3e38], torch.tensor([0.0, -0.0, 1.0, -1.0, 1e-40])])
    high, low = split(exact)
    assert torch.equal(joined(high, low).view(torch.int32), exact.view(torch.int32))
    # The first half is the nearest bfloat16; in the middle of two, either.
    rounded = exact.to(torch.bfloat16)
    off, least = ((x.double() - exact.double()).abs() for x in (high, rounded))
    assert torch.equal(off, least)


def test_every_code_stands_for_itself():
    codes = torch.arange(1 << 16).to(torch.int32).to(torch.int16)
    values = decoded_square(codes)
    assert torch.equal(encoded_square(values), codes)
    assert values[0] == 0 and values.isfinite().all()
    neighbours = values[2:] / values[1:-1]
    assert neighbours.min() > 1.001 and neighbours.max() < 1.0015
    beyond = encoded_square(torch.tensor([0.0, 1e-30, 1e30]))
    assert decoded_square(beyond).tolist() == [0.0, 0.0, values[-1].item()]


def test_what_hardly_moves_follows_on_average():
    """By a ten-thousandth a step, of which nearest codes would never move."""
    code = encoded_square(torch.full((20_000,), 0.37))
    started = decoded_square(code)[0].log()
    for step in range(500):
        _, code = stepped_square(code, 1 - 1e-4, torch.zeros(len(code)), draws(len(code), step))
    moved = decoded_square(code).log().mean() - started
    assert moved.item() == pytest.approx(-500e-4, rel=5e-3)


def test_a_mean_of_squares_is_kept_from_nothing_on():
    draw = torch.Generator().manual_seed(0)
    slopes = torch.randn(100, 1000, generator=draw) * 10.0 ** torch.arange(-9, 1).repeat(100)
    code, exact = torch.zeros(1000, dtype=torch.int16), torch.zeros(1000, dtype=torch.float64)
    for step, slope in enumerate(slopes):
        found, code = stepped_square(code, 0.95, slope, draws(1000, step))
        exact = 0.95 * exact + 0.05 * slope.double().square()
        apart = (decoded_square(code) / found).log()
        assert apart.abs().max() < 1.4e-3  # a code
    assert ((found / exact).log().abs() < 0.02).all()
    _, code = stepped_square(code, 0.95, torch.zeros(1000), draws(1000, 0))
    assert torch.equal(decoded_square(code) > 0, torch.ones(1000, dtype=torch.bool))


def test_draws_are_spread_evenly_and_differ_by_step():
    found = torch.stack([draws(100_000, step) for step in (0, 1, 7)])
    assert found.min() >= 0 and found.max() < 1
    counts = torch.histc(found, bins=100, min=0, max=1)
    assert (counts - 3000).abs().max() < 300
    assert abs(torch.corrcoef(found)[0, 1:]).max() < 0.02
    assert torch.equal(draws(10, 3), draws(20, 3)[:10])
