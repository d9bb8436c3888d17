"""Rows of benchmark results: a value, its peer's value from the same run, and how to repeat it."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
CPU_FEATURES = {"amx_bf16": "AMX", "avx512_bf16": "AVX512-BF16"}


def hardware() -> str:
    """Return the name of the GPU, or the CPU with its matrix units and the number of threads."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text().split() if cpuinfo.is_file() else []
    found = [name for flag, name in CPU_FEATURES.items() if flag in flags]
    features = f" with {' and '.join(found)}" if found else ""
    return f"{platform.machine()} CPU{features}, {torch.get_num_threads()} threads"


def commit() -> str | None:
    """Return the commit that is measured, or None if it is unknown.

    ``COMMIT`` in the environment names it where the source tree has no ``.git`` folder. The commit
    of a tree whose package has uncommitted changes is unknown.
    """
    if named := os.environ.get("COMMIT"):
        return named

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        try:
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout
        except (OSError, subprocess.CalledProcessError):
            return None

    if git("status", "--porcelain", "--", ":/embedcache", ":/cli") != "":
        return None
    head = git("rev-parse", "--short=10", "HEAD")
    return head and head.strip()


def row(
    name: str, value: float, unit: str, *, peer: str, peer_value: float, command: str
) -> dict[str, Any]:
    """Return one row. ``ratio`` is ``value`` divided by ``peer_value``."""
    return {
        "name": name,
        "value": round(value, 4),
        "unit": unit,
        "peer": peer,
        "peer_value": round(peer_value, 4),
        "ratio": round(value / peer_value, 4),
        "hardware": hardware(),
        "command": command,
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }


def record(benchmark: str, rows: list[dict[str, Any]], folder: Path = RESULTS) -> None:
    """Write the rows to ``<benchmark>.json`` and print them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{benchmark}.json").write_text(json.dumps(rows, indent=2) + "\n")
    for entry in rows:
        print(
            f"{entry['name']}: {entry['value']:,.4g} {entry['unit']}, "
            f"{entry['peer']} {entry['peer_value']:,.4g}: ratio {entry['ratio']:.3f}"
        )
