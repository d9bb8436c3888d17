"""Repairs of a cache whose codec is calibrated."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import pytest
from support import fixtures_repair
from support.cache_faults import harm, served
from support.fixtures_extract import content, flip_byte
from support.fixtures_repair import prepared, restored

from embedcache.cache.format.layout import CODEC
from embedcache.cache.verify import verify
from embedcache.errors import CacheError
from embedcache.extraction import calibrate

INVERSE = f"{CODEC}/final/inverse/c/0/0"
repaired = partial(fixtures_repair.repaired, codec="transform")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, session_home: None) -> Path:
    """As in the other tests, but with the codec transform."""
    return prepared(tmp_path_factory.mktemp("repair-codec"), "transform")


@pytest.mark.parametrize(
    "seed",
    [*range(6), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(6, 60))],
)
def test_a_random_fault_is_reported_and_repaired(place: Path, out: Path, seed: int) -> None:
    harm(out, seed)
    assert verify(out, deep=True).faults
    repaired(place, out)
    restored(place, out)


@pytest.mark.parametrize("damage", ["flipped", "missing", "edited", "all"])
def test_a_damaged_calibration_is_reported_and_made_again(
    place: Path, out: Path, damage: str
) -> None:
    match damage:
        case "flipped":
            flip_byte(out / INVERSE)
        case "missing":
            (out / INVERSE).unlink()
        case "edited":
            path = out / CODEC / "final" / "zarr.json"
            path.write_text(path.read_text().replace('"step": ', '"step": 2'))
        case "all":
            shutil.rmtree(out / CODEC)
    faults = verify(out, deep=True).faults
    assert {fault.kind for fault in faults} == {"codec"}
    with pytest.raises(CacheError, match="codec"):
        served(out)
    repaired(place, out)
    restored(place, out)


def test_a_calibration_that_differs_from_before_is_refused(
    place: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flip_byte(out / INVERSE)
    before = content(out)
    monkeypatch.setattr(calibrate, "RIDGE", 1.0)
    with pytest.raises(CacheError, match="is not the one that blocks were encoded with"):
        repaired(place, out)
    after = content(out)
    assert {name for name in before if after.get(name) != before[name]} <= {"manifest.json"}
    monkeypatch.undo()
    repaired(place, out)
    restored(place, out)
