"""Plot all speeds and times of ``results/*.json`` relative to their peers.

python tests/benchmarks/plot.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parent))
from record import RESULTS

FASTER_IS_MORE = {"tokens/s": True, "GB/s": True, "M values/s": True, "ms": False, "s": False}
"""Whether a larger value is faster, by unit."""


def speedup(row: dict[str, Any]) -> float | None:
    """Return the speed relative to the peer, or None for a row that is no speed or time."""
    more = FASTER_IS_MORE.get(row["unit"].partition(",")[0])
    return None if more is None else row["ratio"] if more else 1 / row["ratio"]


def draw(results: Path) -> Figure:
    """Return a bar chart of all speeds and times, with one colour for each file of results."""
    bars = [
        (file.stem, f"{row['name']}   against   {row['peer']}", found)
        for file in sorted(results.glob("*.json"))
        for row in json.loads(file.read_text())
        if (found := speedup(row)) is not None
    ]
    figure = Figure(figsize=(13, 1 + 0.24 * len(bars)), dpi=90, layout="constrained")
    axes = figure.subplots()
    axes.set_xscale("log")
    for benchmark in dict.fromkeys(name for name, _, _ in bars):
        places = [place for place, (name, _, _) in enumerate(bars) if name == benchmark]
        values = [bars[place][2] for place in places]
        # Bars start at 1: a value slower than its peer extends to the left.
        axes.barh(places, [value - 1 for value in values], left=1, label=benchmark)
        for place, value in zip(places, values, strict=True):
            side = "left" if value >= 1 else "right"
            axes.text(value, place, f" {value:.3g} ", va="center", ha=side, fontsize=7)
    axes.set_yticks(range(len(bars)), [label for _, label, _ in bars], fontsize=7)
    axes.invert_yaxis()
    axes.margins(x=0.12, y=0.01)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel("times as fast as its peer")
    axes.legend(fontsize=7, frameon=False, loc="upper right")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


if __name__ == "__main__":
    draw(RESULTS).savefig(RESULTS / "speedups.png", metadata={"Software": None})
