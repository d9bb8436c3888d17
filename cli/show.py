"""How commands print: bars and remarks on stderr, tables and JSON on stdout."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

from .errors import translated

if TYPE_CHECKING:
    from embedcache.progress import Progress


class TerminalProgress:
    """Progress on stderr: bars with a rate and an estimate if it is a terminal, and remarks."""

    @contextmanager
    def bar(self, title: str, total: int | None, unit: str) -> Iterator[_TerminalBar]:
        """Show a bar while the block runs."""
        from tqdm import tqdm

        with tqdm(
            desc=title,
            total=total,
            unit=unit,
            unit_scale=True,
            dynamic_ncols=True,
            disable=not sys.stderr.isatty(),
            file=sys.stderr,
        ) as shown:
            yield _TerminalBar(shown)

    def say(self, remark: str) -> None:
        """Print one line on stderr, above any bar."""
        from tqdm import tqdm

        tqdm.write(translated(remark), file=sys.stderr)


class _TerminalBar:
    def __init__(self, shown: Any):
        self._shown = shown

    def advance(self, amount: int, facts: str = "") -> None:
        if facts:
            self._shown.set_postfix_str(facts, refresh=False)
        self._shown.update(amount)


def leader_progress() -> Progress:
    """Return a terminal's progress; only the first of ``torchrun``'s processes shows any."""
    from embedcache.progress import SILENT
    from embedcache.training.distributed import is_leader

    return TerminalProgress() if is_leader() else SILENT


def print_json(value: Any) -> None:
    """Print a value as indented JSON."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


def print_pairs(pairs: Sequence[tuple[str, object]]) -> None:
    """Print names and values in two columns."""
    width = max(len(name) for name, _ in pairs)
    for name, value in pairs:
        typer.echo(f"{name:<{width}}  {value}")


def split_pairs(
    counts: Mapping[str, Any], units: Iterable[str], suffix: str = ""
) -> list[tuple[str, object]]:
    """Return a pair for each split, from counts by unit and split.

    >>> split_pairs({"tokens": {"train": 1200}, "documents": {"train": 1}}, ["tokens", "documents"])
    [('train', '1,200 tokens, 1 document')]
    """
    units = list(units)
    return [
        (split, ", ".join(counted(counts[unit][split], unit) for unit in units) + suffix)
        for split in ("train", "dev", "test")
        if split in counts[units[0]]
    ]


def counted(count: int, unit: str) -> str:
    """Return a count and its unit, a plural in -s.

    >>> counted(1, "blocks"), counted(1200, "blocks")
    ('1 block', '1,200 blocks')
    """
    return f"{count:,} {unit.removesuffix('s') if count == 1 else unit}"


def formatted(value: object) -> str:
    """Return a value as text: large numbers with commas, sequences joined by commas.

    >>> formatted(2048), formatted(["final", "layer_2"]), formatted(True)
    ('2,048', 'final,layer_2', 'yes')
    """
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def print_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table: the first column to the left, the others to the right."""
    cells = [[str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    for number, row in enumerate(cells):
        first = row[0].ljust(widths[0])
        rest = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        typer.echo("  ".join([first, *rest]).rstrip())
        if number == 0:
            typer.echo("  ".join("-" * width for width in widths))
