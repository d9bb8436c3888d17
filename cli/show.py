"""How commands show what they do and found: bars on stderr, tables and JSON on stdout."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from embedcache.progress import Progress


class TerminalProgress:
    """Bars with a rate and an estimate, on stderr, where that is a terminal; remarks always."""

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
        """Print one line on stderr."""
        typer.echo(remark, err=True)


class _TerminalBar:
    def __init__(self, shown: Any):
        self._shown = shown

    def advance(self, amount: int, facts: str = "") -> None:
        if facts:
            self._shown.set_postfix_str(facts, refresh=False)
        self._shown.update(amount)


def own_progress() -> Progress:
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
