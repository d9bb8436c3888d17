from __future__ import annotations

import pytest

from embedcache.carryon.branch.config import BranchConfig
from embedcache.carryon.branch.model import Branch
from embedcache.errors import UsageError


def test_a_dictionary_gives_the_configuration_back():
    config = BranchConfig(
        width=96, head_width=16, taps=("final", "layer_1"), gate=False, bridge_bits=4
    )
    assert BranchConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(("width", "head_width"), [(64, 64), (96, 32), (256, 64), (32, 32)])
def test_heads_are_as_wide_as_divides_the_width_and_what_is_stored_says_so(width, head_width):
    config = BranchConfig(width=width)
    assert config.to_dict()["head_width"] == config.head_width == head_width
    assert BranchConfig.from_dict(config.to_dict()) == config
    assert Branch(config, 8).blocks[0].head_width == head_width
    assert BranchConfig(width=width, head_width=16).head_width == 16


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"width": 0}, "`width=` should be greater"),
        ({"width": 48}, "divide `width=`"),
        ({"width": 33, "head_width": 33}, "even"),
        ({"taps": ["layer_1"]}, "'final'"),
        ({"taps": ["final", "final"]}, "twice"),
        ({"taps": 3}, "valid tuple"),
        ({"bridge_bits": 5}, "16, 8 or 4"),
        ({"widht": 64}, "Did you mean 'width'"),
        ({"width": "64"}, "width"),
        ({"width": 64.0}, "width"),
        ({"gate": "no"}, "gate"),
    ],
)
def test_what_cannot_be_is_refused(values, words):
    with pytest.raises(UsageError, match=words):
        BranchConfig.from_dict(values)


def test_a_table_is_expected():
    with pytest.raises(UsageError, match="names and values"):
        BranchConfig.from_dict(3)
