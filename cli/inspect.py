"""``embedcache inspect``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import options
from .errors import translated
from .show import print_json, print_pairs, print_table

if TYPE_CHECKING:
    from embedcache.inspection import SequenceView

EXAMPLES = """
embedcache inspect cache --sequence 3
embedcache inspect cache --split test --sequence 0 --json
"""
MAX_TOKEN_WIDTH = 20
"""Most characters of a token in the table; some tokens are a hundred spaces."""


def inspect_command(
    cache: Annotated[Path, typer.Argument(help="A finished cache.", metavar="CACHE")],
    sequence: Annotated[int, typer.Option(help="Number of the sequence in its split.")] = 0,
    split: Annotated[
        str,
        typer.Option(help="train, dev or test.", autocompletion=options.choices(options.SPLITS)),
    ] = "train",
    as_json: options.AsJson = False,
    base: options.MovedBase = None,
) -> None:
    """Show one sequence of a cache, token by token.

    Prints the name of its document, then a row for each token: its position, whether it is a target
    of the loss, the norm of its embedding, and the base's probabilities for the token after it.
    Texts of tokens need the base's tokenizer; without it, tokens are shown as ids.
    """
    from embedcache.inspection import inspect_sequence

    found = inspect_sequence(cache, sequence, split=split, base=base)
    if as_json:
        print_json(asdict(found))
        return
    pairs: list[tuple[str, object]] = [
        ("cache", f"{found.cache}, {found.codec}"),
        ("sequence", f"{found.split} {found.sequence} (of 0 to {found.sequences - 1})"),
        ("document", found.document),
        ("tokens", f"{len(found.positions)}, {sum(p.target for p in found.positions)} targets"),
    ]
    if found.cross_entropy is not None:
        pairs.append(("base", f"cross-entropy {found.cross_entropy:.4f} over the targets"))
    if found.note:
        pairs.append(("note", translated(found.note)))
    print_pairs(pairs)
    typer.echo("")
    taps = list(found.positions[0].norm)
    norms = [f"norm {tap}" if len(taps) > 1 else "norm" for tap in taps]
    header = ["token", "position", "target", *norms]
    if found.positions[0].choices:
        header += ["p(next)", "1st", "2nd", "3rd"]
    print_table(header, _rows(found))


def _rows(found: SequenceView) -> list[list[str]]:
    rows = []
    for number, position in enumerate(found.positions):
        row = [_token(position.id, position.text), str(number), "yes" if position.target else ""]
        row += [f"{norm:.2f}" for norm in position.norm.values()]
        if position.choices:
            following = position.next_probability
            row.append("" if following is None else f"{following:.4f}")
            row += [f"{_token(c.id, c.text)} {c.probability:.3f}" for c in position.choices]
        rows.append(row)
    return rows


def _token(token: int, text: str | None) -> str:
    shown = str(token) if text is None else repr(text)
    return shown if len(shown) <= MAX_TOKEN_WIDTH else f"{shown[: MAX_TOKEN_WIDTH - 1]}…"
