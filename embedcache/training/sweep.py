"""Many carry-ons on one cache: the sweep, the file that names its runs, and its leaderboard.

A sweep file, TOML or YAML, holds settings that the runs share, a grid, and a list of runs:

    epochs = 3                       # shared: keys of `TrainConfig`, and a table ``carryon``
    [grid]                           # every combination of these
    lr = [1e-3, 2e-3]
    "carryon.width" = [64, 128]
    [[runs]]                         # each of these, with every combination
    name = "alice"
    documents = ["alice/*"]
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

from embedcache.errors import EmbedcacheError, UsageError, nearest
from embedcache.progress import SILENT, Progress
from embedcache.store.files import publish_bytes, publish_json
from embedcache.training.config import TrainConfig, config_from, read_settings
from embedcache.training.distributed import joined
from embedcache.training.run.report import TrainSummary
from embedcache.training.train import Session, training_device

GRID, RUNS, NAME = "grid", "runs", "name"
MOST_RUNS = 10_000
"""Most runs of a sweep file."""
BOARD_FILE, PICTURE_FILE = "leaderboard.json", "leaderboard.png"
SHOWN = 30
"""Most runs in the leaderboard's picture."""


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class SweepResult:
    """The outcome of one run of a sweep: ``summary`` or ``failure`` is None."""

    out: Path
    config: TrainConfig
    summary: TrainSummary | None
    failure: EmbedcacheError | OSError | None

    def __repr__(self) -> str:
        """Return the summary, or the folder and the error."""
        found = self.summary or self.failure
        return f"SweepResult(out={str(self.out)!r}, {found!r})"


def sweep(
    cache: str | Path,
    *,
    runs: Mapping[str | Path, TrainConfig | Mapping[str, Any]],
    memory: str | int | None = None,
    device: str = "auto",
    progress: Progress = SILENT,
    **settings: Any,
) -> list[SweepResult]:
    """Train several carry-ons on one cache. Each is trained as `train` would train it.

    Carry-ons of one shape are stacked: they share products, and those that see the same documents
    in the same order share each batch. A failed run does not stop the others. Under ``torchrun``
    the runs are spread over the processes, and every process returns all results. A sweep that was
    interrupted is resumed by the same call, which skips the runs that are finished.

        embedcache.sweep("cache", runs={"a": {"lr": 1e-3}, "b": {"lr": 2e-3}}, width=128)

    Args:
        cache: folder of a finished cache.
        runs: by folder, a configuration or a mapping of settings, as `train` takes them.
        memory: budget of the device's memory, such as ``"1GB"``, or bytes; see `train`.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        progress: receives bars and remarks.
        settings: settings of all runs that are given as mappings; a run's own settings take
            precedence.

    Returns:
        The outcome of each run, in the order of ``runs``.

    Raises:
        UsageError, CacheError, OutputError, DeviceMemoryError: as `train`, before any run begins.
    """
    configs = {
        Path(out): config_from(run, settings)
        if isinstance(run, TrainConfig)
        else config_from(None, {**settings, **run})
        for out, run in runs.items()
    }
    target = training_device(device, memory)
    with joined(target) as ranks:
        session = Session(cache, target, progress, memory=memory)
        done = {out: session.finished(out, config) for out, config in configs.items()}
        todo = [out for out in configs if done[out] is None]
        for out in todo:
            session.check(out, configs[out])
        ranks.wait()  # no process writes before all have checked
        trained = [
            SweepResult(out=run.out, config=run.config, summary=run.summary, failure=run.failure)
            for run in session.train({out: configs[out] for out in todo[ranks.rank :: ranks.count]})
        ]
        results = {result.out: result for some in ranks.gather(trained) for result in some}
    return [
        results.get(out) or SweepResult(out=out, config=config, summary=done[out], failure=None)
        for out, config in configs.items()
    ]


def read_sweep(path: Path, flags: dict[str, Any] | None = None) -> dict[str, TrainConfig]:
    """Return the runs of a sweep file by name.

    ``flags`` override the settings that the runs share, not those of the grid or of a run. Raises
    ``UsageError`` for a file that is missing or malformed, for unknown settings, and for two runs
    of one name.
    """
    value = read_settings(path)
    grid, runs = value.pop(GRID, {}), value.pop(RUNS, [{}])
    if not isinstance(grid, dict) or not all(isinstance(v, list) and v for v in grid.values()):
        raise UsageError(
            f"{path}: grid must be a table of lists, such as lr = [1e-3, 2e-3]; found {grid!r}"
        )
    if not isinstance(runs, list) or not runs or not all(isinstance(run, dict) for run in runs):
        raise UsageError(
            f"{path}: runs must be a list of tables, each below [[runs]]; found {runs!r}"
        )
    shared = merged(value, flags or {})
    count = len(runs)
    for values in grid.values():
        count *= len(values)
    if count > MOST_RUNS:
        raise UsageError(f"{path} asks for {count:,} runs, at most {MOST_RUNS:,} are possible")
    found: dict[str, TrainConfig] = {}
    for run in runs:
        named = run.get(NAME)
        own = {key: setting for key, setting in run.items() if key != NAME}
        for choice in product(*grid.values()):
            point = dict(zip(grid, choice, strict=True))
            name = _name(named, own, point)
            if name in found:
                raise UsageError(
                    f"{path}: two runs are called '{name}'. Give each of [[runs]] its own name."
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
    """Return settings updated by ``more``, table by table.

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
    """Return a hint if the spelling of a setting is close to ``grid`` or ``runs``."""
    close = [hint for key in settings if (hint := nearest(key, (GRID, RUNS)))]
    return close[0] if close else ""


def _name(named: Any, own: dict[str, Any], point: dict[str, Any]) -> str:
    """Return the name of a run's folder: its own name, and the settings from the grid."""
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


def ranking(results: Mapping[str, SweepResult]) -> list[dict[str, Any]]:
    """Return a row for each run by name, the largest gain on dev first, failed runs last."""
    rows = []
    for name, result in results.items():
        summary, failure = result.summary, result.failure
        base, best = (None, None) if summary is None else (summary.base_dev, summary.best_dev)
        rows.append(
            {
                "name": name,
                "dev_gain": None if base is None or best is None else base - best,
                "failure": None if failure is None else str(failure),
                "settings": result.config.to_dict(),
                "results": None if summary is None else asdict(summary),
            }
        )
    return sorted(rows, key=lambda row: (row["failure"] is not None, -(row["dev_gain"] or 0.0)))


def publish_leaderboard(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write the ranking into a folder, as JSON and as a picture."""
    publish_json(folder / BOARD_FILE, rows)
    publish_bytes(folder / PICTURE_FILE, _picture(rows))


def _picture(rows: Sequence[dict[str, Any]]) -> bytes:
    """Return a PNG of the gain over the base on dev, for the best runs."""
    from matplotlib.figure import Figure

    shown = [row for row in rows if row["dev_gain"] is not None][:SHOWN]
    figure = Figure(figsize=(8, 1.2 + 0.25 * len(shown)), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.barh([row["name"] for row in shown], [row["dev_gain"] for row in shown])
    axes.invert_yaxis()
    axes.set_xlabel("gain over the base on dev (nats a token)")
    axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
