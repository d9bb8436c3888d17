"""``embedcache train``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from .show import own_progress, print_json, print_pairs
from .sweep import run_sweep


def train_command(
    cache: Annotated[Path, typer.Argument(help="A finished cache.")],
    out: Annotated[Path, typer.Option(help="Folder of the carry-on.")],
    config: Annotated[
        Path | None, typer.Option(help="TOML or YAML file of settings; flags win over it.")
    ] = None,
    width: Annotated[int | None, typer.Option(help="Width of the branch [64].")] = None,
    blocks: Annotated[int | None, typer.Option(help="Transformer blocks [2].")] = None,
    gate: Annotated[bool | None, typer.Option(help="Gate the output [gate].")] = None,
    token_input: Annotated[
        bool | None, typer.Option(help="Read token ids, too [no-token-input].")
    ] = None,
    taps: Annotated[str | None, typer.Option(help="Layers to read [final].")] = None,
    bridge_bits: Annotated[
        int | None, typer.Option(help="Bits of the bridge: 16, 8 or 4 [16].")
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the train split [4].")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate [2e-3].")] = None,
    batch_tokens: Annotated[
        int | None, typer.Option(help="Tokens of a step [a 64th of train, 2048 to 16384].")
    ] = None,
    loss: Annotated[str | None, typer.Option(help="auto, exact or shortlist [auto].")] = None,
    patience: Annotated[
        int | None, typer.Option(help="Epochs without a better dev loss [2].")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed [0].")] = None,
    documents: Annotated[
        list[str] | None,
        typer.Option(help="Documents to train on, by name ('alice/*'); repeatable [all]."),
    ] = None,
    sweep: Annotated[
        Path | None,
        typer.Option(help="TOML or YAML file of many runs ([grid], [[runs]]): all into OUT."),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    memory: Annotated[
        str | None,
        typer.Option(help="Bytes of the device to keep within, such as 1GB [all that is free]."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print the plan, train nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Stage two."""
    from embedcache.base.taps import parse_taps
    from embedcache.errors import UsageError
    from embedcache.training.config import TrainConfig, read_settings
    from embedcache.training.distributed import is_leader
    from embedcache.training.sweep import merged, read_sweep
    from embedcache.training.train import preview, train
    from embedcache.units import bytes_of

    budget = None if memory is None else bytes_of(memory)
    settings: dict[str, Any] = {} if config is None else read_settings(config)
    carryon = {
        "width": width,
        "blocks": blocks,
        "gate": gate,
        "token_input": token_input,
        "taps": None if taps is None else list(parse_taps(taps)),
        "bridge_bits": bridge_bits,
    }
    training = {
        "epochs": epochs,
        "lr": lr,
        "batch_tokens": batch_tokens,
        "loss": loss,
        "patience": patience,
        "seed": seed,
        "documents": documents or None,
    }
    flags: dict[str, Any] = {key: value for key, value in training.items() if value is not None}
    if shape := {key: value for key, value in carryon.items() if value is not None}:
        flags["carryon"] = shape
    if sweep is not None:
        if config is not None:
            raise UsageError(
                f"--sweep {sweep} and --config {config} both give settings: write those of "
                f"{config} at the top of {sweep}"
            )
        runs = read_sweep(sweep, flags)
        run_sweep(cache, out, runs, device, memory=budget, dry_run=dry_run, as_json=as_json)
        return
    request = TrainConfig.from_dict(merged(settings, flags))
    if dry_run:
        plan = preview(cache, out=out, config=request, device=device, memory=budget)
        if as_json:
            print_json(asdict(plan))
        else:
            print_pairs(list(asdict(plan).items()))
        return
    result = train(
        cache, out=out, config=request, device=device, memory=budget, progress=own_progress()
    )
    if not is_leader():
        return
    if as_json:
        print_json(asdict(result))
        return
    pairs: list[tuple[str, object]] = [
        ("carry-on", result.out),
        ("parameters", f"{result.parameters:,}"),
        ("steps", f"{result.steps:,} in {result.epochs} epochs, kept epoch {result.best_epoch}"),
        (
            "loss",
            result.loss
            if result.shortlist_bias is None
            else f"{result.loss}, {result.shortlist_bias:+.4f} off the exact loss on dev",
        ),
    ]
    if result.base_dev is not None and result.best_dev is not None:
        pairs.append(
            (
                "dev",
                f"base {result.base_dev:.4f}, carry-on {result.best_dev:.4f} "
                f"({result.best_dev - result.base_dev:+.4f} nats a token)",
            )
        )
    pairs += [
        ("speed", f"{result.tokens_per_second:,.0f} tokens/s over {result.seconds:.1f} s"),
        *([] if result.memory is None else [("memory", result.memory)]),
        ("plot", f"{result.out}/loss.png"),
    ]
    print_pairs(pairs)
    typer.echo(f"\nNext: embedcache eval {result.out} {cache}")
