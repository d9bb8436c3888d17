"""The examples load: what they import is where they say."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted([*ROOT.glob("examples/**/*.py"), *ROOT.glob("tests/benchmarks/*.py")])


def load(path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", [*sys.path])
    spec = importlib.util.spec_from_file_location(f"script_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # where dataclasses look their own up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_loads(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(path, monkeypatch)


def test_the_picture_of_benchmarks_has_every_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    plot = load(ROOT / "tests/benchmarks/plot.py", monkeypatch)
    assert plot.speedup({"unit": "tokens/s", "ratio": 4.0}) == 4.0
    assert plot.speedup({"unit": "s, by these speeds", "ratio": 0.1}) == 10.0
    assert plot.speedup({"unit": "nats", "ratio": 1.0}) is None
    shown = {text.get_text().strip() for text in plot.draw(plot.RESULTS).axes[0].texts}
    for name in ("train_gpu", "sweep_cpu"):
        for row in json.loads((plot.RESULTS / f"{name}.json").read_text()):
            value = plot.speedup(row)
            assert value is None or f"{value:.3g}" in shown
