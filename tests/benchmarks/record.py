"""Writes a benchmark's rows beside it: each value with the peer's, measured in the same run."""

from __future__ import annotations

import datetime
import json
import platform
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def hardware() -> str:
    """Name what this run computes on."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def row(
    name: str, value: float, unit: str, *, peer: str, peer_value: float, command: str
) -> dict[str, Any]:
    """Return one row; ``ratio`` is ours over the peer's."""
    return {
        "name": name,
        "value": round(value, 4),
        "unit": unit,
        "peer": peer,
        "peer_value": round(peer_value, 4),
        "ratio": round(value / peer_value, 4),
        "hardware": hardware(),
        "command": command,
        "date": datetime.date.today().isoformat(),
    }


def record(benchmark: str, rows: list[dict[str, Any]], folder: Path = RESULTS) -> None:
    """Write the rows as ``<benchmark>.json`` and print them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{benchmark}.json").write_text(json.dumps(rows, indent=2) + "\n")
    for entry in rows:
        print(
            f"{entry['name']}: {entry['value']:,.4g} {entry['unit']}, "
            f"{entry['peer']} {entry['peer_value']:,.4g}: ratio {entry['ratio']:.3f}"
        )
