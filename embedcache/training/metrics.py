"""The metrics of a run: JSON lines, one a logged step or epoch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from embedcache.files import publish_bytes

METRICS_FILE = "metrics.jsonl"


class Metrics:
    """Appends rows to a file; on resume, rows past the checkpoint's step are dropped first."""

    def __init__(self, path: Path, *, keep_steps: int):
        self._path = path
        kept = [row for row in self.rows() if row["step"] <= keep_steps] if keep_steps else []
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
