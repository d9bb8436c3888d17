"""``embedcache train``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from embedcache.units import format_seconds

from . import options
from .show import formatted, leader_progress, print_json, print_pairs
from .sweep import run_sweep

if TYPE_CHECKING:
    from embedcache.training.train import TrainSummary

EXAMPLES = """
embedcache train cache --out carryon
embedcache train cache --out carryon --width 128 --epochs 8 --memory 1GB
embedcache train cache --out alice --document 'alice/*'
embedcache train cache --out sweep --sweep sweep.toml
torchrun --nproc-per-node 4 -m embedcache_cli train cache --out carryon
"""
SHAPE, TRAINING, DATA = "Shape of the carry-on", "Training", "Data and loss"


def train_command(
    ctx: typer.Context,
    cache: Annotated[Path, typer.Argument(help="A finished cache.", metavar="CACHE")],
    out: Annotated[Path, typer.Option(help="Folder of the carry-on; of all carry-ons of a sweep.")],
    config: Annotated[
        Path | None,
        typer.Option(help="TOML or YAML file of settings. Options that are typed override it."),
    ] = None,
    sweep: Annotated[
        Path | None,
        typer.Option(
            help="TOML or YAML file of many runs: shared settings, a [grid], a list of [[runs]]. "
            "Trains all of them and ranks them."
        ),
    ] = None,
    device: options.Device = "auto",
    memory: Annotated[
        str | None,
        typer.Option(
            help="Most memory of the device to use, such as 1GB or 800MB. Training is then "
            "computed in a way that fits.",
            metavar="SIZE",
            show_default="all that is free",
        ),
    ] = None,
    dry_run: options.DryRun = False,
    as_json: options.AsJson = False,
    width: Annotated[
        int, typer.Option(help="Width of the branch: its main dial.", rich_help_panel=SHAPE)
    ] = 64,
    blocks: Annotated[
        int, typer.Option(help="Transformer blocks of the branch.", rich_help_panel=SHAPE)
    ] = 2,
    gate: Annotated[
        bool,
        typer.Option(help="Scale each output by a learned gate in (0, 1).", rich_help_panel=SHAPE),
    ] = True,
    token_input: Annotated[
        bool,
        typer.Option(help="Read the token ids beside the embeddings.", rich_help_panel=SHAPE),
    ] = False,
    taps: Annotated[
        str,
        typer.Option(
            help="Taps of the cache to read, separated by commas, such as final,22; final is "
            "required.",
            metavar="TAPS",
            rich_help_panel=SHAPE,
        ),
    ] = "final",
    bridge_bits: Annotated[
        int,
        typer.Option(
            help="Bits per value of the embeddings that the branch reads: 16, 8 or 4.",
            rich_help_panel=SHAPE,
        ),
    ] = 16,
    epochs: Annotated[
        int, typer.Option(help="Passes over the train split.", rich_help_panel=TRAINING)
    ] = 4,
    lr: Annotated[
        float, typer.Option(help="Peak learning rate of AdamW.", rich_help_panel=TRAINING)
    ] = 2e-3,
    batch_tokens: Annotated[
        int | None,
        typer.Option(
            help="Tokens of an optimiser step.",
            show_default="1/64 of train, from 2048 to 16384",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    patience: Annotated[
        int,
        typer.Option(
            help="Stop after this many epochs without a better dev loss.",
            rich_help_panel=TRAINING,
        ),
    ] = 2,
    seed: Annotated[
        int,
        typer.Option(help="Seed of initial weights, order and sampling.", rich_help_panel=TRAINING),
    ] = 0,
    documents: Annotated[
        list[str] | None,
        typer.Option(
            "--document",
            help="Train and score only on documents whose name matches this pattern; repeatable. "
            "A name is the file's path below the folder that was extracted (notes/a.txt), with a "
            "record's number after it (data.jsonl:12). * matches any characters, / too; ? matches "
            "one, [ab] one of a few.",
            metavar="PATTERN",
            show_default="all documents",
            rich_help_panel=DATA,
        ),
    ] = None,
    loss: Annotated[
        str,
        typer.Option(
            help="exact: cross-entropy over the whole vocabulary. shortlist: over the labels of a "
            "step and a sample of other tokens, faster with a large vocabulary; its difference "
            "from the exact loss on dev is printed. auto: shortlist if the vocabulary is at least "
            "8 times the sample. A cache extracted with --top-ids needs a smaller sample.",
            autocompletion=options.choices(["auto", "exact", "shortlist"]),
            rich_help_panel=DATA,
        ),
    ] = "auto",
) -> None:
    """Stage two: train a carry-on from a cache, without the base.

    The epoch with the best dev loss is kept. Run the same command again to resume a run that was
    stopped. A file of settings can also set warmup, weight_decay, samples, …; its table [carryon]
    holds the settings of the carry-on: width, blocks, ….
    """
    from embedcache.base.taps import parse_taps
    from embedcache.carryon.branch.config import BranchConfig
    from embedcache.errors import UsageError
    from embedcache.training.config import TrainConfig, read_settings
    from embedcache.training.distributed import is_leader
    from embedcache.training.sweep import merged, read_sweep
    from embedcache.training.train import preview, train
    from embedcache.units import parse_bytes

    budget = None if memory is None else parse_bytes(memory)
    ctx.params["taps"] = parse_taps(taps)
    typed = options.settings(ctx, TrainConfig, typed_only=True)
    if shape := options.settings(ctx, BranchConfig, typed_only=True):
        typed["carryon"] = shape
    if sweep is not None:
        if config is not None:
            raise UsageError(
                f"expected --sweep or --config, found both: write the settings of {config} at the "
                f"top of {sweep}"
            )
        runs = read_sweep(sweep, typed)
        run_sweep(cache, out, runs, device, memory=budget, dry_run=dry_run, as_json=as_json)
        return
    request = TrainConfig.from_dict(merged({} if config is None else read_settings(config), typed))
    place: dict[str, Any] = {"out": out, "config": request, "device": device, "memory": budget}
    if dry_run:
        plan = asdict(preview(cache, **place))
        if as_json:
            print_json(plan)
        else:
            print_pairs(_plan_pairs(plan))
        return
    result = train(cache, **place, progress=leader_progress())
    if not is_leader():
        return
    if as_json:
        print_json(asdict(result))
        return
    print_pairs(_result_pairs(result))
    typer.echo(f"\nNext: embedcache eval {result.out} {cache}")


def _plan_pairs(plan: dict[str, Any]) -> list[tuple[str, object]]:
    """Return what a run would do, in words."""
    return [
        (name.replace("_", " "), formatted(value))
        for name, value in plan.items()
        if value is not None
    ]


def _result_pairs(result: TrainSummary) -> list[tuple[str, object]]:
    loss = result.loss
    if result.shortlist_bias is not None:
        loss += f" ({result.shortlist_bias:+.4f} nats from the exact loss on dev)"
    pairs: list[tuple[str, object]] = [
        ("carry-on", result.out),
        ("parameters", f"{result.parameters:,}"),
        ("steps", f"{result.steps:,} in {result.epochs} epochs, kept epoch {result.best_epoch}"),
        ("loss", loss),
    ]
    if result.base_dev is not None and result.best_dev is not None:
        pairs.append(
            (
                "dev",
                f"base {result.base_dev:.4f}, carry-on {result.best_dev:.4f} "
                f"({result.best_dev - result.base_dev:+.4f} nats a token)",
            )
        )
    speed = f"{result.tokens_per_second:,.0f} tokens/s over {format_seconds(result.seconds)}"
    pairs.append(("speed", speed))
    if result.memory is not None:
        pairs.append(("memory", result.memory))
    return [*pairs, ("plot", f"{result.out}/loss.png")]
