"""The metrics of a run: JSON lines, one a logged step or epoch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from embedcache.store.files import publish_bytes
from embedcache.training.run.checkpoint import TrainState

METRICS_FILE = "metrics.jsonl"


class Metrics:
    """Appends rows to a file; on resume, rows past the checkpoint are dropped first."""

    def __init__(self, path: Path, *, resume: TrainState | None):
        self._path = path
        kept = [] if resume is None else [row for row in self.rows() if _is_before(row, resume)]
        publish_bytes(path, "".join(json.dumps(row) + "\n" for row in kept).encode())

    def add(self, *, step: int, **values: Any) -> None:
        """Append one row."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")

    def rows(self) -> list[dict[str, Any]]:
        """Return all rows; a last line cut short by a crash is left out."""
        if not self._path.is_file():
            return []
        text = self._path.read_text(encoding="utf-8")
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def _is_before(row: dict[str, Any], state: TrainState) -> bool:
    """Whether a row was written before a checkpoint of that state: it is not written again."""
    if "dev_loss" in row:  # a row of a whole epoch, 0 for the base's
        return bool(row["epoch"] <= state.epoch)
    return bool(row["step"] <= state.step)
