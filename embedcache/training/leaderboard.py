"""What came of a sweep: a ranking by dev loss, as JSON and as a picture."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from embedcache.store.files import publish_bytes, publish_json
from embedcache.training.config import TrainConfig
from embedcache.training.run.run import TrainSummary

BOARD_FILE, PICTURE_FILE = "leaderboard.json", "leaderboard.png"
SHOWN = 30


def ranking(
    runs: Sequence[tuple[str, TrainConfig, TrainSummary | None, Exception | None]],
) -> list[dict[str, Any]]:
    """Return a row for each run, best first: by what dev gained on the base; failed ones last."""
    rows = []
    for name, config, summary, failure in runs:
        base, best = (None, None) if summary is None else (summary.base_dev, summary.best_dev)
        rows.append(
            {
                "name": name,
                "dev_gain": None if base is None or best is None else base - best,
                "failure": None if failure is None else str(failure),
                "settings": config.to_dict(),
                "results": None if summary is None else asdict(summary),
            }
        )
    return sorted(rows, key=lambda row: (row["failure"] is not None, -(row["dev_gain"] or 0.0)))


def publish_leaderboard(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Publish the ranking in ``folder``."""
    publish_json(folder / BOARD_FILE, rows)
    publish_bytes(folder / PICTURE_FILE, picture(rows))


def picture(rows: Sequence[dict[str, Any]]) -> bytes:
    """Return a PNG of how far each of the best runs is below its base on dev."""
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
