from __future__ import annotations

import pytest

from embedcache.carryon.branch.config import CarryOnConfig
from embedcache.carryon.branch.model import CarryOn
from embedcache.errors import UsageError


def test_a_dictionary_gives_the_configuration_back():
    config = CarryOnConfig(
        width=96, head_width=16, taps=("final", "layer_1"), gate=False, bridge_bits=4
    )
    assert CarryOnConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(("width", "head_width"), [(64, 64), (96, 32), (256, 64), (32, 32)])
def test_heads_are_as_wide_as_divides_the_width_and_what_is_stored_says_so(width, head_width):
    config = CarryOnConfig(width=width)
    assert config.to_dict()["head_width"] == config.head_width == head_width
    assert CarryOnConfig.from_dict(config.to_dict()) == config
    assert CarryOn(config, 8).blocks[0].head_width == head_width
    assert CarryOnConfig(width=width, head_width=16).head_width == 16


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"width": 0}, "width must be at least 1"),
        ({"width": 48}, "divide width"),
        ({"width": 33, "head_width": 33}, "even"),
        ({"taps": ["layer_1"]}, "'final'"),
        ({"taps": ["final", "final"]}, "twice"),
        ({"taps": "final"}, "list"),
        ({"bridge_bits": 5}, "16, 8 or 4"),
        ({"widht": 64}, "Did you mean 'width'"),
        ({"width": "64"}, "width"),
        ({"width": 64.0}, "width"),
        ({"gate": "no"}, "gate"),
    ],
)
def test_what_cannot_be_is_refused(values, words):
    with pytest.raises(UsageError, match=words):
        CarryOnConfig.from_dict(values)


def test_a_table_is_expected():
    with pytest.raises(UsageError, match="carry-on"):
        CarryOnConfig.from_dict(3)
