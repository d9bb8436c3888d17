"""``embedcache generate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .show import print_json


def generate_command(
    carryon: Annotated[Path, typer.Argument(help="A carry-on.")],
    prompt: Annotated[str, typer.Option(help="What to continue or answer.")],
    base: Annotated[
        str | None, typer.Option(help="The base, where it is not found as it was named.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="The prompt is a user's turn.")] = False,
    alpha: Annotated[float, typer.Option(help="The dial: 0 is the base.")] = 1.0,
    compare: Annotated[bool, typer.Option("--compare", help="Answer with the base, too.")] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens at most.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Nucleus.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="0 is off.")] = 0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="dtype of the base.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Write text."""
    from embedcache.compose.generate import Sampling, generate
    from embedcache.compose.load import load

    sampling = Sampling(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
    )
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
