"""A file that names many runs: settings they share, a grid, and a list.

epochs = 3                       # shared: keys of `TrainConfig`, and a table ``carryon``
[grid]                           # every combination of these
lr = [1e-3, 2e-3]
"carryon.width" = [64, 128]
[[runs]]                         # each of these, with every combination
name = "alice"
documents = ["alice/*"]
"""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path
from typing import Any

from embedcache.errors import UsageError, nearest
from embedcache.training.config import TrainConfig, read_settings

GRID, RUNS, NAME = "grid", "runs", "name"
MOST_RUNS = 10_000


def read_sweep(path: Path, flags: dict[str, Any] | None = None) -> dict[str, TrainConfig]:
    """Return the runs of a sweep file by name; ``flags`` win over what the file's runs share.

    Raises ``UsageError`` for a file that is missing, malformed, or names a setting or a run that
    cannot be.
    """
    value = read_settings(path)
    grid, runs = value.pop(GRID, {}), value.pop(RUNS, [{}])
    if not isinstance(grid, dict) or not all(isinstance(v, list) and v for v in grid.values()):
        raise UsageError(
            f"{path}: grid must be a table of lists, such as lr = [1e-3, 2e-3]; found {grid!r}"
        )
    if not isinstance(runs, list) or not runs or not all(isinstance(run, dict) for run in runs):
        raise UsageError(
            f"{path}: runs must be a list of tables, each begun by [[runs]]; found {runs!r}"
        )
    shared = merged(value, flags or {})
    count = len(runs)
    for values in grid.values():
        count *= len(values)
    if count > MOST_RUNS:
        raise UsageError(f"{path} asks for {count:,} runs; {MOST_RUNS:,} is the most")
    found: dict[str, TrainConfig] = {}
    for run in runs:
        named = run.get(NAME)
        own = {key: setting for key, setting in run.items() if key != NAME}
        for choice in product(*grid.values()):
            point = dict(zip(grid, choice, strict=True))
            name = _name(named, own, point)
            if name in found:
                raise UsageError(
                    f"{path}: two runs are called '{name}': give each of [[runs]] a name of its own"
                )
            try:
                found[name] = TrainConfig.from_dict(
                    merged(merged(shared, _nested(own)), _nested(point))
                )
            except UsageError as error:
                hint = _misplaced(point | own | value)
                raise UsageError(f"{path}, run '{name}': {error}{hint}") from error
    return found


def merged(settings: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """Return settings with ``more`` over them, table by table.

    >>> merged({"a": 1, "t": {"x": 1}}, {"t": {"y": 2}})
    {'a': 1, 't': {'x': 1, 'y': 2}}
    """
    result = dict(settings)
    for key, value in more.items():
        old = result.get(key)
        both = isinstance(old, dict) and isinstance(value, dict)
        result[key] = merged(old, value) if both else value  # type: ignore[arg-type]
    return result


def _nested(settings: dict[str, Any]) -> dict[str, Any]:
    """Turn ``carryon.width`` into a table."""
    result: dict[str, Any] = {}
    for key, value in settings.items():
        first, _, rest = key.partition(".")
        result = merged(result, {first: _nested({rest: value}) if rest else value})
    return result


def _misplaced(settings: dict[str, Any]) -> str:
    """Say where a misspelt table of the file itself was meant."""
    close = [hint for key in settings if (hint := nearest(key, (GRID, RUNS)))]
    return close[0] if close else ""


def _name(named: Any, own: dict[str, Any], point: dict[str, Any]) -> str:
    """Return a folder's name: the run's own, and what the grid sets."""
    if named is not None and (not isinstance(named, str) or not named):
        raise UsageError(f"a run's name must be text, found {named!r}")
    settings = point if named else own | point
    parts = [named] if named else []
    parts += [f"{key.rpartition('.')[2]}={_spelt(value)}" for key, value in settings.items()]
    name = re.sub(r"[^\w.=+-]+", "_", "-".join(parts)).strip(".")
    return name[:120] or "run"


def _spelt(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return "+".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
