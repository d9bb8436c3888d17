"""``embedcache extract``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from embedcache.units import duration, size

from .append import append_documents
from .show import TerminalProgress, print_json, print_pairs

if TYPE_CHECKING:
    from embedcache.extraction.estimate import Estimate


PARAMETERS = {"sources": "corpus", "dev_sources": "dev", "test_sources": "test"}
"""What is typed for settings of another name."""


def extract_command(
    ctx: typer.Context,
    out: Annotated[Path, typer.Option(help="Folder of the cache.")],
    corpus: Annotated[
        list[str] | None,
        typer.Argument(
            help="Text files, folders, globs, .jsonl/.csv/.parquet, hf:org/name, or stdlib: (the "
            "Python standard library).",
            metavar="CORPUS...",
        ),
    ] = None,
    base: Annotated[
        str, typer.Option(help="Hub id, local folder, GGUF file, or builtin:NAME.")
    ] = "builtin:smollm2-135m",
    revision: Annotated[str | None, typer.Option(help="Hub revision of the base.")] = None,
    dev: Annotated[list[str] | None, typer.Option(help="A corpus that is all dev.")] = None,
    test: Annotated[list[str] | None, typer.Option(help="A corpus that is all test.")] = None,
    split_file: Annotated[
        str | None, typer.Option(help="JSON of document names by split: train, dev, test.")
    ] = None,
    dev_fraction: Annotated[float, typer.Option(help="Share of documents for dev.")] = 0.05,
    test_fraction: Annotated[float, typer.Option(help="Share of documents for test.")] = 0.1,
    split_seed: Annotated[int, typer.Option(help="Seed of the split.")] = 0,
    text_field: Annotated[str | None, typer.Option(help="Field of records that is text.")] = None,
    prompt: Annotated[
        str | None,
        typer.Option(help="Template of the prompt, such as 'Question: {question}\\nAnswer: '."),
    ] = None,
    completion: Annotated[
        str | None, typer.Option(help="Template of the completion, such as '{answer}'.")
    ] = None,
    messages_field: Annotated[
        str | None, typer.Option(help="Field of records that is a list of chat messages.")
    ] = None,
    dataset_config: Annotated[
        str | None, typer.Option(help="Configuration of an hf: data set.")
    ] = None,
    dataset_split: Annotated[str, typer.Option(help="Split of an hf: data set.")] = "train",
    encoding: Annotated[str, typer.Option(help="Encoding of text files.")] = "utf-8",
    undecodable: Annotated[
        str, typer.Option(help="What to do with files that are not: error or skip.")
    ] = "error",
    context: Annotated[int, typer.Option(help="Tokens of a sequence at most.")] = 1024,
    min_tokens: Annotated[int, typer.Option(help="Shorter pieces of text are dropped.")] = 16,
    limit_documents: Annotated[int | None, typer.Option(help="Stop after so many.")] = None,
    limit_tokens: Annotated[int | None, typer.Option(help="Stop after so many.")] = None,
    max_tokens_per_document: Annotated[
        int | None, typer.Option(help="Keep so many of each document.")
    ] = None,
    taps: Annotated[str, typer.Option(help="Layers to keep, such as final,22,15.")] = "final",
    codec: Annotated[
        str, typer.Option(help="For train: bf16 (lossless), int8, or transform (about 1.5 bits).")
    ] = "bf16",
    bits: Annotated[
        float | None, typer.Option(help="transform: bits a value to come to [1.5].")
    ] = None,
    quality: Annotated[
        float | None,
        typer.Option(help="transform: permitted rise of the base's cross-entropy, in nats."),
    ] = None,
    top_ids: Annotated[
        int,
        typer.Option(
            help="Of each position, keep so many of the tokens that the base thinks likely: "
            "shortlists need far fewer others, then. 8 is good; takes the head's logits."
        ),
    ] = 0,
    block_tokens: Annotated[int, typer.Option(help="Rows of a block.")] = 16384,
    batch_tokens: Annotated[
        int | None, typer.Option(help="Padded tokens of a forward pass [2048; on CUDA 16384].")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    max_quarantined: Annotated[
        float, typer.Option(help="Share of sequences that may be put aside as not finite.")
    ] = 0.01,
    repair: Annotated[
        bool,
        typer.Option(
            "--repair",
            help="Verify the cache first and make anew what is damaged. A merged one is repaired "
            "without CORPUS.",
        ),
    ] = False,
    append: Annotated[
        bool,
        typer.Option(
            "--append",
            help="Add documents to the finished cache OUT; what is not typed is as there.",
        ),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Read the corpus, measure a few batches, predict; write nothing."
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Stage one."""
    from embedcache.base.taps import parse_taps
    from embedcache.cache.format.layout import ExtractSettings
    from embedcache.corpus.config import CorpusConfig
    from embedcache.device import resolve_device
    from embedcache.editing.repair import repair as repair_cache
    from embedcache.errors import UsageError
    from embedcache.extraction.extract import estimate_extraction, extract
    from embedcache.extraction.request import BATCH_TOKENS

    if not corpus and not repair:
        raise UsageError("expected a CORPUS to extract, found none: name a file or a folder")
    if repair and append:
        raise UsageError(
            "expected --repair or --append, found both. Repair the cache first, by the command "
            "that made it, then append"
        )
    if repair and dry_run:
        raise UsageError(
            "expected --repair or --dry-run, found both. What a repair would make anew is what "
            f"this names: embedcache verify {out} --deep"
        )
    of_corpus: dict[str, Any] = {
        "sources": tuple(corpus or ()),
        "dev_sources": tuple(dev or ()),
        "test_sources": tuple(test or ()),
        "split_file": split_file,
        "dev_fraction": dev_fraction,
        "test_fraction": test_fraction,
        "split_seed": split_seed,
        "text_field": text_field,
        "prompt": _unescape(prompt),
        "completion": _unescape(completion),
        "messages_field": messages_field,
        "dataset_config": dataset_config,
        "dataset_split": dataset_split,
        "encoding": encoding,
        "undecodable": undecodable,
        "min_tokens": min_tokens,
        "limit_documents": limit_documents,
        "limit_tokens": limit_tokens,
        "max_tokens_per_document": max_tokens_per_document,
    }
    of_settings: dict[str, Any] = {
        "taps": parse_taps(taps),
        "codec": codec,
        "bits": bits,
        "quality": quality,
        "top_ids": top_ids,
        "context": context,
        "block_tokens": block_tokens,
        "batch_tokens": batch_tokens,
    }
    if append:
        append_documents(
            _typed(ctx, of_corpus),
            out=out,
            base=base if _typed(ctx, {"base": base}) else None,
            revision=revision,
            settings=_typed(ctx, of_settings),
            device=device,
            dtype=dtype,
            max_quarantined=max_quarantined,
            dry_run=dry_run,
            as_json=as_json,
        )
        return
    progress = TerminalProgress()
    config = settings = None
    if corpus:
        config = CorpusConfig(**of_corpus, context=context)
        if batch_tokens is None:
            of_settings["batch_tokens"] = BATCH_TOKENS[resolve_device(device).type]
        settings = ExtractSettings(**of_settings)
    elif typed := _typed(ctx, of_corpus | of_settings):
        raise UsageError(
            "a repair without CORPUS takes all settings from the cache, expected none, found "
            f"--{PARAMETERS.get(name := next(iter(typed)), name).replace('_', '-')}: leave it out, "
            "or name the CORPUS"
        )
    if dry_run and config is not None and settings is not None:
        prediction, summary = estimate_extraction(
            config,
            base=base,
            out=out,
            settings=settings,
            revision=revision,
            device=device,
            dtype=dtype,
            progress=progress,
        )
        if as_json:
            print_json({"prediction": asdict(prediction), "corpus": summary})
            return
        print_pairs([*_corpus_pairs(summary), *_prediction_pairs(prediction)])
        return
    request: dict[str, Any] = {
        "base": base,
        "settings": settings,
        "revision": revision,
        "device": device,
        "dtype": dtype,
        "max_quarantined": max_quarantined,
        "progress": progress,
    }
    result = repair_cache(out, config, **request) if repair else extract(config, out=out, **request)
    if as_json:
        print_json(asdict(result))
        return
    print_pairs(
        [
            ("cache", result.out),
            ("base", result.base),
            *_corpus_pairs(
                result.corpus
                | {key: getattr(result, key) for key in ("tokens", "sequences", "documents")}
            ),
            (
                "blocks",
                f"{result.blocks} ({result.resumed_blocks} from before, {result.computed_blocks} "
                f"computed here, {result.others_blocks} by other processes)",
            ),
            ("quarantined", f"{result.quarantined} sequences with values that are not finite"),
            ("self-check", f"batched against alone: {result.self_check:.1e} relative, at most"),
            (
                "size",
                f"{size(result.bytes)} (predicted {size(result.predicted_bytes)}), "
                f"{result.bytes_per_token:,.0f} bytes a token besides the head",
            ),
            (
                "speed",
                f"{result.tokens_per_second:,.0f} tokens/s over {result.seconds:.1f} s "
                f"(predicted {result.predicted_seconds:.1f} s)",
            ),
        ]
    )
    typer.echo("\nThe cache holds the corpus: its token ids, and embeddings text can be read from.")
    typer.echo(f"Next: embedcache train {result.out} --out CARRYON")


def _typed(ctx: typer.Context, settings: dict[str, Any]) -> dict[str, Any]:
    """Return those of the settings that were typed, whatever their defaults are."""

    def is_typed(name: str) -> bool:
        source = ctx.get_parameter_source(PARAMETERS.get(name, name))
        return source is not None and source.name == "COMMANDLINE"

    return {name: value for name, value in settings.items() if is_typed(name)}


def _corpus_pairs(summary: dict[str, Any]) -> list[tuple[str, object]]:
    pairs: list[tuple[str, object]] = [
        (
            split,
            f"{summary['tokens'][split]:,} tokens, {summary['sequences'][split]:,} sequences, "
            f"{summary['documents'][split]:,} documents",
        )
        for split in ("train", "dev", "test")
    ]
    left_out = [
        f"{summary[key]:,} {words}"
        for key, words in (
            ("dropped_short", "short pieces"),
            ("dropped_without_target", "sequences without a target"),
            ("skipped_undecodable", "undecodable files"),
            ("unlisted", "documents not in the split file"),
        )
        if summary[key]
    ]
    if left_out:
        pairs.append(("left out", ", ".join(left_out)))
    if summary["near_duplicates_across_splits"]:
        pairs.append(
            ("warning", f"{summary['near_duplicates_across_splits']} near-duplicates across splits")
        )
    return pairs


def _prediction_pairs(prediction: Estimate) -> list[tuple[str, object]]:
    written = prediction.bytes - prediction.bytes_to_go
    speed = f"{prediction.tokens_per_second:,.0f} tokens/s"
    return [
        (
            "predicted size",
            size(prediction.bytes) + (f", {size(written)} of it there already" if written else ""),
        ),
        (
            "predicted time",
            f"{duration(prediction.seconds)} at {speed}, measured on "
            f"{prediction.measured_tokens:,} tokens; loading the base comes before it",
        ),
        ("free disk", size(prediction.free_bytes)),
    ]


def _unescape(template: str | None) -> str | None:
    r"""Turn a typed ``\n`` or ``\t`` into the character, as shells do not."""
    return None if template is None else template.replace("\\n", "\n").replace("\\t", "\t")
