"""The examples and benchmarks import, and the documentation agrees with the repository."""

from __future__ import annotations

import doctest
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

import embedcache

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted([*ROOT.glob("examples/**/*.py"), *ROOT.glob("tests/benchmarks/*.py")])
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "embedcache/README.md",
    "examples/paper/README.md",
]
QUICKSTART = ROOT / "examples/quickstart.py"
ROW = {"unit": "s", "ratio": 2.0, "command": "c", "date": "d", "value": 2, "peer_value": 1}


def load(path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Import a script by its path."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    spec = importlib.util.spec_from_file_location(f"script_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up here
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_script_imports(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(path, monkeypatch)


def test_plot_has_a_bar_for_every_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    plot = load(ROOT / "tests/benchmarks/plot.py", monkeypatch)
    assert plot.speedup({"unit": "tokens/s", "ratio": 4.0}) == 4.0
    assert plot.speedup({"unit": "s, by these speeds", "ratio": 0.1}) == 10.0
    assert plot.speedup({"unit": "nats", "ratio": 1.0}) is None
    results = load(ROOT / "tests/benchmarks/readme.py", monkeypatch).load()
    shown = {text.get_text().strip() for text in plot.draw(plot.RESULTS).axes[0].texts}
    for row in results["train_gpu"] + results["sweep_cpu"]:
        value = plot.speedup(row)
        assert value is None or f"{value:.3g}" in shown


def test_measurements_in_the_readmes_are_those_of_the_results(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    readme = load(ROOT / "tests/benchmarks/readme.py", monkeypatch)
    assert doctest.testmod(readme).failed == 0
    results = readme.load()
    page = (ROOT / "tests/benchmarks/README.md").read_text(encoding="utf-8")
    assert page == readme.page(results), "run: python tests/benchmarks/readme.py"
    main = (ROOT / "README.md").read_text(encoding="utf-8")
    assert main == readme.with_headlines(main, results), "run: python tests/benchmarks/readme.py"


def test_rows_without_a_commit_stand_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    readme = load(ROOT / "tests/benchmarks/readme.py", monkeypatch)
    known = {**ROW, "name": "known", "peer": "p", "hardware": "CPU", "commit": "abc"}
    unknown = {**known, "name": "unknown", "commit": None}
    page = readme.page({"train_cpu": [known, unknown]})
    before, after = page.split("## Rows without a commit")
    assert "| known |" in before and "| unknown |" not in before
    assert "| unknown |" in after and "| known |" not in after


@pytest.mark.parametrize("page", PAGES)
def test_files_that_a_page_names_exist(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    named = set(re.findall(r"`([\w./]+(?:/|\.py|\.md|\.json|\.png))`", text))
    named |= set(re.findall(r"\]\(([\w./-]+)\)", text))
    assert named
    folder = (ROOT / page).parent
    missing = [name for name in named if not ((folder / name).exists() or (ROOT / name).exists())]
    assert not missing, f"{page} names {missing}"


def test_the_readme_has_at_most_150_lines() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_the_readme_and_the_quickstart_use_public_names() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    compile(block, "README.md", "exec")
    for name, text in (("README.md", block), ("quickstart", QUICKSTART.read_text("utf-8"))):
        used = set(re.findall(r"\bec\.(\w+)", text))
        assert used and used <= set(embedcache.__all__), name
        assert "from embedcache" not in text


def test_a_row_names_the_commit_and_the_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    record = load(ROOT / "tests/benchmarks/record.py", monkeypatch)
    monkeypatch.setenv("COMMIT", "abc")
    row = record.row("name", 3, "s", peer="peer", peer_value=2, command="command")
    assert (row["commit"], row["ratio"]) == ("abc", 1.5)
    assert "threads" in row["hardware"] or "NVIDIA" in row["hardware"]
