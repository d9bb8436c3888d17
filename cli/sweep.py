"""``embedcache train --sweep``: many carry-ons at once, and their leaderboard."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from .show import own_progress, print_json, print_table

if TYPE_CHECKING:
    from embedcache.training.config import TrainConfig

SHOWN = 20


def run_sweep(
    cache: Path,
    out: Path,
    runs: dict[str, TrainConfig],
    device: str,
    *,
    memory: int | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Train all runs into folders of ``out``, and rank them; exit with 1 if any failed."""
    from embedcache.training.distributed import is_leader
    from embedcache.training.sweep import publish_leaderboard, ranking, sweep
    from embedcache.training.train import preview

    if dry_run:
        plans = {
            name: asdict(
                preview(cache, out=out / name, config=config, device=device, memory=memory)
            )
            for name, config in runs.items()
        }
        if as_json:
            print_json(plans)
        else:
            columns: tuple[str, ...] = ("parameters", "train_tokens", "steps", "loss")
            if memory is not None:
                columns += ("memory",)
            print_table(
                ("run", *columns),
                [(name, *(plan[column] for column in columns)) for name, plan in plans.items()],
            )
        return
    results = sweep(
        cache,
        runs={out / name: config for name, config in runs.items()},
        device=device,
        memory=memory,
        progress=own_progress(),
    )
    failed = [result for result in results if result.failure is not None]
    if not is_leader():
        raise typer.Exit(int(bool(failed)))
    rows = ranking(dict(zip(runs, results, strict=True)))
    publish_leaderboard(out, rows)
    if as_json:
        print_json(rows)
    else:
        print_table(
            ("run", "base dev", "dev", "gain", "kept epoch", "parameters"),
            [
                (
                    row["name"],
                    *(
                        "-" if value is None else f"{value:.4f}"
                        for value in (found["base_dev"], found["best_dev"], row["dev_gain"])
                    ),
                    found["best_epoch"],
                    f"{found['parameters']:,}",
                )
                for row in rows[:SHOWN]
                if (found := row["results"]) is not None
            ],
        )
        typer.echo(
            f"\n{len(rows) - len(failed)} of {len(rows)} carry-ons; all: {out}/leaderboard.json"
        )
    for result in failed:
        typer.echo(f"{result.out.name} failed: {result.failure}", err=True)
    if failed:
        raise typer.Exit(1)
