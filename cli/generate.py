"""``embedcache generate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import options
from .show import print_json

EXAMPLES = """
embedcache generate carryon --prompt 'def main' --compare
embedcache generate carryon --prompt 'What is a tap?' --chat --alpha 0.5
embedcache generate carryon --prompt 'Once' --temperature 0.8 --top-p 0.9 --seed 1
"""
SAMPLING = "Sampling"


def generate_command(
    ctx: typer.Context,
    carryon: Annotated[Path, typer.Argument(help="Folder of a carry-on.", metavar="CARRYON")],
    prompt: Annotated[str, typer.Option(help="Text to continue or, with --chat, to answer.")],
    chat: Annotated[
        bool, typer.Option("--chat", help="Send the prompt as a user's turn of a chat.")
    ] = False,
    alpha: Annotated[
        float,
        typer.Option(help="Strength of the carry-on: 0 is the base alone, 1 as trained."),
    ] = 1.0,
    compare: Annotated[
        bool, typer.Option("--compare", help="Also print the answer of the base alone.")
    ] = False,
    as_json: options.AsJson = False,
    max_new_tokens: Annotated[
        int, typer.Option(help="Write at most this many tokens.", rich_help_panel=SAMPLING)
    ] = 128,
    temperature: Annotated[
        float,
        typer.Option(help="0 always takes the likeliest token.", rich_help_panel=SAMPLING),
    ] = 0.0,
    top_p: Annotated[
        float,
        typer.Option(
            help="Sample from the likeliest tokens with this total probability.",
            rich_help_panel=SAMPLING,
        ),
    ] = 1.0,
    top_k: Annotated[
        int,
        typer.Option(
            help="Sample from this many of the likeliest tokens; 0 means all.",
            rich_help_panel=SAMPLING,
        ),
    ] = 0,
    seed: Annotated[int, typer.Option(help="Seed.", rich_help_panel=SAMPLING)] = 0,
    base: options.MovedBase = None,
    device: options.BaseDevice = "auto",
    dtype: options.BaseDtype = "auto",
) -> None:
    """Generate text with the live base and a carry-on."""
    from embedcache.compose.generate import Sampling, generate
    from embedcache.compose.load import load

    sampling = Sampling(**options.settings(ctx, Sampling))
    answers = []
    with load(carryon, base, device=device, dtype=dtype) as model:
        for value in (0.0, alpha) if compare else (alpha,):
            if compare and not as_json:
                name = "base" if value == 0 else f"carry-on, alpha {value:g}"
                typer.echo(f"--- {name} ---")
            text = generate(
                model,
                prompt,
                alpha=value,
                chat=chat,
                sampling=sampling,
                on_text=None if as_json else lambda piece: typer.echo(piece, nl=False),
            )
            answers.append({"alpha": value, "text": text})
            if not as_json:
                typer.echo()
    if as_json:
        print_json({"prompt": prompt, "answers": answers})
