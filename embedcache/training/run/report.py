"""What a run reports: its summary, the plot of its losses, and its model card."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedcache.cache.format.layout import sources_of
from embedcache.carryon.saving import CarryOnRecord
from embedcache.store.files import publish_bytes

PLOT_FILE = "loss.png"
CARD_FILE = "README.md"


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class TrainSummary:
    """The outcome of a training run. Cross-entropies are in nats a token.

    Attributes:
        out: folder of the carry-on.
        parameters: number of trained parameters.
        steps: optimiser steps, and ``tokens`` and ``epochs`` that were trained on.
        best_epoch: epoch whose weights were kept, from 1.
        loss: ``exact`` or ``shortlist``.
        base_dev: the base's cross-entropy on dev; None without a dev split.
        best_dev: the carry-on's cross-entropy on dev at the epoch that was kept.
        shortlist_bias: the shortlists' estimate of ``best_dev`` minus ``best_dev``; None where the
            loss is exact.
        seconds: time of the steps, without evaluation; ``tokens_per_second`` refers to that time.
        resumed_at_step: step of the checkpoint that the run was resumed from; 0 for a new run.
        data_wait: share of ``seconds`` that was spent waiting for batches; on a GPU, the share in
            which the device had no work left.
        memory: the plan for the run's memory budget; None without a budget.
    """

    out: str
    parameters: int
    steps: int
    tokens: int
    epochs: int
    best_epoch: int
    loss: str
    base_dev: float | None
    best_dev: float | None
    shortlist_bias: float | None
    seconds: float
    tokens_per_second: float
    resumed_at_step: int
    data_wait: float = 0.0
    memory: str | None = None

    def __repr__(self) -> str:
        """Return the folder, the steps and the losses on dev."""
        dev = ""
        if self.base_dev is not None and self.best_dev is not None:
            dev = f", base_dev={self.base_dev:.4f}, best_dev={self.best_dev:.4f}"
        return f"TrainSummary(out={self.out!r}, epochs={self.epochs}, steps={self.steps}{dev})"


def publish_report(folder: Path, rows: list[dict[str, Any]], record: CarryOnRecord) -> None:
    """Write the plot and the model card into the folder of a run."""
    publish_bytes(folder / PLOT_FILE, plot(rows, record.results["base_dev"]))
    publish_bytes(folder / CARD_FILE, card(record).encode())


def plot(rows: list[dict[str, Any]], base_dev: float | None) -> bytes:
    """Return a PNG of train and dev loss by step, against the base's dev loss."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=150)
    axes = figure.subplots()
    figure.subplots_adjust(left=0.11, right=0.98, top=0.97, bottom=0.12)
    steps = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    if steps:
        axes.plot(*zip(*steps, strict=True), color="0.75", linewidth=1, label="train, each step")
    epochs = [(row["step"], row["train_loss"]) for row in rows if "train_loss" in row]
    if epochs:
        axes.plot(*zip(*epochs, strict=True), "o-", color="tab:blue", label="train, each epoch")
    dev = [(row["step"], row["dev_loss"]) for row in rows if row.get("dev_loss") is not None]
    if dev:
        axes.plot(*zip(*dev, strict=True), "o-", color="tab:orange", label="dev")
    if base_dev is not None:
        axes.axhline(base_dev, color="black", linestyle="--", linewidth=1, label="base, dev")
    axes.set_xlabel("step")
    axes.set_ylabel("cross-entropy (nats a token)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def card(record: CarryOnRecord) -> str:
    """Return the model card as Markdown."""
    base, results, config = record.base, record.results, record.config
    lines = [
        f"# A carry-on for {base['name']}",
        "",
        f"A carry-on ({results['parameters']:,} parameters) on the frozen "
        f"embeddings of [{base['name']}], trained with embedcache from a cache, without the base. "
        "It works with that base only.",
        "",
        "| | |",
        "| --- | --- |",
        f"| base fingerprint | `{base['fingerprint']}` |",
        f"| kind | {config.describe()} |",
        f"| trained on | {', '.join(sources_of(record.cache['corpus']))} "
        f"({record.cache['tokens']['train']:,} tokens, codec {record.cache['codec']}) |",
        f"| training | {results['epochs']} epochs, {results['steps']} steps, loss "
        f"{results['loss']}{_bias(results)}, kept epoch {results['best_epoch']} |",
    ]
    if results["best_dev"] is not None and results["base_dev"] is not None:
        change = results["best_dev"] - results["base_dev"]
        lines += [
            f"| dev cross-entropy | base {results['base_dev']:.4f}, carry-on "
            f"{results['best_dev']:.4f} ({change:+.4f} nats a token) |"
        ]
    lines += [
        "",
        "![loss](loss.png)",
        "",
        "## Use",
        "",
        "    embedcache generate . --prompt 'Once upon a time'",
        "    embedcache eval . CACHE",
        "",
    ]
    return "\n".join(lines)


def _bias(results: dict[str, Any]) -> str:
    bias = results["shortlist_bias"]
    return "" if bias is None else f" (its estimate of the dev loss is {bias:+.4f} off)"
