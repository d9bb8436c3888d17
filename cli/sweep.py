"""``embedcache train --sweep``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from .errors import translated
from .show import formatted, leader_progress, print_json, print_table

if TYPE_CHECKING:
    from embedcache.training.config import TrainConfig

LEADERBOARD_ROWS = 20
"""Most rows printed; leaderboard.json has all."""


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
    """Train all runs into folders below ``out`` and rank them; exit with 1 if a run failed."""
    from embedcache.training.distributed import is_leader
    from embedcache.training.leaderboard import publish_leaderboard, ranking
    from embedcache.training.train import preview, sweep

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
                ("run", *(column.replace("_", " ") for column in columns)),
                [
                    (name, *(formatted(plan[column]) for column in columns))
                    for name, plan in plans.items()
                ],
            )
        return
    results = sweep(
        cache,
        runs={out / name: config for name, config in runs.items()},
        device=device,
        memory=memory,
        progress=leader_progress(),
    )
    failed = [result for result in results if result.failure is not None]
    if not is_leader():
        raise typer.Exit(int(bool(failed)))
    rows = ranking(
        [
            (name, result.config, result.summary, result.failure)
            for name, result in zip(runs, results, strict=True)
        ]
    )
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
                for row in rows[:LEADERBOARD_ROWS]
                if (found := row["results"]) is not None
            ],
        )
        typer.echo(
            f"\n{len(rows) - len(failed)} of {len(rows)} runs finished; all of them are in "
            f"{out}/leaderboard.json"
        )
    for result in failed:
        typer.echo(f"{result.out.name} failed: {translated(str(result.failure))}", err=True)
    if failed:
        raise typer.Exit(1)
