"""``embedcache extract``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from embedcache.units import format_bytes, format_seconds

from . import options
from .append import append_documents
from .errors import option
from .show import TerminalProgress, print_json, print_pairs, split_pairs

if TYPE_CHECKING:
    from embedcache.extraction.estimate import Estimate
    from embedcache.extraction.run import ExtractSummary

EXAMPLES = r"""
embedcache extract docs/ --out cache --dry-run
embedcache extract docs/ --base HuggingFaceTB/SmolLM2-1.7B --out cache --taps final,20
embedcache extract docs/ --out cache --codec transform --bits 1.5
embedcache extract qa.jsonl --out qa --prompt 'Q: {question}\nA: ' --completion '{answer}'
embedcache extract new-docs/ --out cache --append
embedcache extract docs/ --out cache --repair
"""
EXISTING = "Existing caches"


def extract_command(
    ctx: typer.Context,
    out: Annotated[Path, typer.Option(help="Folder of the cache.")],
    sources: options.Sources = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Read the corpus, run a few batches, print the estimated size and time, and "
            "write nothing.",
        ),
    ] = False,
    as_json: options.AsJson = False,
    base: options.ExtractBase = "builtin:smollm2-135m",
    revision: options.Revision = None,
    device: options.BaseDevice = "auto",
    dtype: options.BaseDtype = "auto",
    batch_tokens: options.ForwardTokens = None,
    taps: options.StoredTaps = "final",
    codec: options.Codec = "bf16",
    bits: options.Bits = None,
    quality: options.Quality = None,
    top_ids: options.TopIds = 0,
    block_tokens: options.BlockTokens = 16384,
    max_quarantined: options.MaxQuarantined = 0.01,
    dev_sources: options.DevSources = None,
    test_sources: options.TestSources = None,
    split_file: options.SplitFile = None,
    dev_fraction: options.DevFraction = 0.05,
    test_fraction: options.TestFraction = 0.1,
    split_seed: options.SplitSeed = 0,
    text_field: options.TextField = None,
    prompt: options.PromptTemplate = None,
    completion: options.CompletionTemplate = None,
    messages_field: options.MessagesField = None,
    dataset_config: options.DatasetConfig = None,
    dataset_split: options.DatasetSplit = "train",
    encoding: options.Encoding = "utf-8",
    undecodable: options.Undecodable = "error",
    context: options.Context = 1024,
    min_tokens: options.MinTokens = 16,
    limit_documents: options.LimitDocuments = None,
    limit_tokens: options.LimitTokens = None,
    max_tokens_per_document: options.MaxTokensPerDocument = None,
    append: Annotated[
        bool,
        typer.Option(
            "--append",
            help="Add the documents of CORPUS to the finished cache OUT. Options that are not "
            "typed keep the settings of the cache.",
            rich_help_panel=EXISTING,
        ),
    ] = False,
    repair: Annotated[
        bool,
        typer.Option(
            "--repair",
            help="Verify the cache OUT and compute damaged parts again. A merged cache is repaired "
            "without CORPUS.",
            rich_help_panel=EXISTING,
        ),
    ] = False,
) -> None:
    """Stage one: run the base once over a corpus into a cache.

    The cache holds the base's embedding of every token, and the corpus's token ids. Run the same
    command again to resume an extraction that was stopped. Several processes may run it at once;
    they share the work.
    """
    from embedcache.base.taps import parse_taps
    from embedcache.cache.format.layout import ExtractSettings
    from embedcache.corpus.config import CorpusConfig
    from embedcache.device import resolve_device
    from embedcache.errors import UsageError
    from embedcache.extraction.extract import estimate_extraction, extract
    from embedcache.extraction.request import BATCH_TOKENS

    if not sources and not repair:
        raise UsageError("expected a CORPUS to extract, found none: name a file or a folder")
    if repair and append:
        raise UsageError(
            "expected --repair or --append, found both: repair the cache first, with the command "
            "that made it, then append"
        )
    if repair and dry_run:
        raise UsageError(
            "expected --repair or --dry-run, found both: 'embedcache verify "
            f"{out} --deep' lists what a repair would compute again"
        )
    ctx.params["taps"] = parse_taps(taps)
    if append:
        append_documents(
            options.settings(ctx, CorpusConfig, typed_only=True),
            out=out,
            base=base if options.was_typed(ctx, "base") else None,
            revision=revision,
            settings=options.settings(ctx, ExtractSettings, typed_only=True),
            device=device,
            dtype=dtype,
            max_quarantined=max_quarantined,
            dry_run=dry_run,
            as_json=as_json,
        )
        return
    corpus = settings = None
    if sources:
        corpus = CorpusConfig.from_dict(options.settings(ctx, CorpusConfig))
        if batch_tokens is None:
            ctx.params["batch_tokens"] = BATCH_TOKENS[resolve_device(device).type]
        settings = ExtractSettings(**options.settings(ctx, ExtractSettings))
    elif typed := [
        name
        for config in (CorpusConfig, ExtractSettings)
        for name in options.settings(ctx, config, typed_only=True)
    ]:
        raise UsageError(
            "a repair without CORPUS takes all settings from the cache; found "
            f"{option(typed[0])}: leave it out, or name the CORPUS"
        )
    place: dict[str, Any] = {
        "base": base,
        "settings": settings,
        "revision": revision,
        "device": device,
        "dtype": dtype,
        "progress": TerminalProgress(),
    }
    if dry_run and corpus is not None:
        estimate, summary = estimate_extraction(corpus, out=out, **place)
        if as_json:
            print_json({"estimate": asdict(estimate), "corpus": summary})
        else:
            print_pairs([*_corpus_pairs(summary), *_estimate_pairs(estimate)])
        return
    place["max_quarantined"] = max_quarantined
    if repair:
        from embedcache.editing.repair import repair as repair_cache

        result = repair_cache(out, corpus, **place)
    else:
        result = extract(corpus, out=out, **place)
    if as_json:
        print_json(asdict(result))
        return
    print_pairs(_result_pairs(result))
    typer.echo(
        "\nThe cache contains the corpus: its token ids, and embeddings from which text can be "
        f"recovered.\nNext: embedcache train {result.out} --out CARRYON"
    )


def _result_pairs(result: ExtractSummary) -> list[tuple[str, object]]:
    counts = {key: getattr(result, key) for key in ("tokens", "sequences", "documents")}
    blocks = {
        "written earlier": result.resumed_blocks,
        "computed here": result.computed_blocks,
        "by other processes": result.others_blocks,
    }
    parts = ", ".join(f"{count:,} {where}" for where, count in blocks.items() if count)
    pairs: list[tuple[str, object]] = [
        ("cache", result.out),
        ("base", result.base),
        *_corpus_pairs(result.corpus | counts),
        ("blocks", f"{result.blocks:,} ({parts or 'complete before'})"),
    ]
    if result.quarantined:
        pairs.append(
            ("quarantined", f"{result.quarantined:,} sequences with values that are not finite")
        )
    return [
        *pairs,
        (
            "self-check",
            f"batched and single sequences differ by at most {result.self_check:.1e}, relative",
        ),
        (
            "size",
            f"{format_bytes(result.bytes)} (estimated {format_bytes(result.estimated_bytes)}), "
            f"{result.bytes_per_token:,.0f} bytes a token without the base's head",
        ),
        (
            "speed",
            f"{result.tokens_per_second:,.0f} tokens/s over {format_seconds(result.seconds)} "
            f"(estimated {format_seconds(result.estimated_seconds)})",
        ),
    ]


def _corpus_pairs(summary: dict[str, Any]) -> list[tuple[str, object]]:
    pairs = split_pairs(summary, ("tokens", "sequences", "documents"))
    left_out = [
        f"{summary[key]:,} {words}"
        for key, words in (
            ("dropped_short", "short sequences"),
            ("dropped_without_target", "sequences without a target"),
            ("skipped_undecodable", "undecodable files"),
            ("unlisted", "documents not in the split file"),
        )
        if summary[key]
    ]
    if left_out:
        pairs.append(("left out", ", ".join(left_out)))
    if count := summary["near_duplicates_across_splits"]:
        pairs.append(("warning", f"{count:,} near-duplicates of documents in another split"))
    return pairs


def _estimate_pairs(estimate: Estimate) -> list[tuple[str, object]]:
    written = estimate.bytes - estimate.bytes_to_go
    return [
        (
            "estimated size",
            format_bytes(estimate.bytes)
            + (f", {format_bytes(written)} of it already written" if written else ""),
        ),
        (
            "estimated time",
            f"{format_seconds(estimate.seconds)} at {estimate.tokens_per_second:,.0f} tokens/s, "
            f"measured on {estimate.measured_tokens:,} tokens; excludes loading the base",
        ),
        ("free disk", format_bytes(estimate.free_bytes)),
    ]
