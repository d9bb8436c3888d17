"""What every configuration checks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from embedcache.config import Config, Count, Flag, Fraction, Names, Positive, split_settings
from embedcache.corpus.config import CorpusConfig
from embedcache.errors import UsageError
from embedcache.training.config import TrainConfig


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Shape(Config):
    width: Count = 64
    rate: Positive = 1e-3
    share: Fraction = 0.5
    gate: Flag = True
    taps: Names = ("final",)
    draws: Count | None = None


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"width": 0}, r"`width=` should be greater than or equal to 1, found 0"),
        ({"width": 2.5}, r"`width=` should be a valid integer, found 2.5"),
        ({"width": True}, r"`width=`.*found True"),
        ({"width": "64"}, r"`width=` should be a valid integer, found '64'"),
        ({"rate": 0}, r"`rate=` should be greater than 0, found 0"),
        ({"rate": float("nan")}, r"`rate=` should be a finite number, found nan"),
        ({"rate": True}, r"`rate=` should be a number, found True"),
        ({"share": 1}, r"`share=` should be less than 1, found 1"),
        ({"gate": 1}, r"`gate=` should be a valid boolean, found 1"),
        ({"taps": [1]}, r"`taps=` should be a valid string, found"),
        ({"taps": 3}, r"`taps=` should be a valid tuple, found 3"),
        ({"draws": 0}, r"`draws=`.*found 0"),
    ],
)
def test_values_that_do_not_fit_are_named(values, words):
    with pytest.raises(UsageError, match=words):
        Shape(**values)


def test_values_are_converted_where_that_is_safe():
    shape = Shape(rate="2e-3", taps="layer_3", share=0)
    assert (shape.rate, shape.taps, shape.share) == (2e-3, ("layer_3",), 0.0)
    assert Shape(taps=[Path("a/b")]).taps == ("a/b",)


def test_a_repr_shows_what_differs_from_the_defaults():
    assert repr(Shape(width=32)) == "Shape(width=32)"
    assert repr(Shape()) == "Shape()"


def test_a_dictionary_comes_back_and_unknown_names_are_refused():
    shape = Shape(width=32, taps=("final", "layer_1"))
    assert Shape.from_dict(shape.to_dict()) == shape
    with pytest.raises(UsageError, match=r"`widht=` is no setting of Shape\. Did you mean 'width'"):
        Shape.from_dict({"widht": 3})
    with pytest.raises(UsageError, match="CorpusConfig needs `sources=`"):
        CorpusConfig.from_dict({})


def test_settings_go_to_the_configuration_that_has_them():
    assert split_settings({"lr": 1, "context": 9}, TrainConfig, CorpusConfig) == (
        {"lr": 1},
        {"context": 9},
    )
    with pytest.raises(
        UsageError, match=r"of TrainConfig or CorpusConfig\. Did you mean 'context'"
    ):
        split_settings({"contxt": 9}, TrainConfig, CorpusConfig)
