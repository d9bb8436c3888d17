"""``embedcache info``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from embedcache.units import format_bytes

from . import options
from .show import counted, formatted, print_json, print_pairs, print_table

EXAMPLES = """
embedcache info cache
embedcache info carryon --json
"""
MAX_COMPONENTS = 8
"""Most components listed of each kind."""


def info_command(
    path: Annotated[Path, typer.Argument(help="Folder of a cache or a carry-on.", metavar="PATH")],
    as_json: options.AsJson = False,
) -> None:
    """Describe a cache or a carry-on.

    Prints the base, corpus, settings, counts and sizes. For a cache, also bytes per token of each
    array, and the components of its embeddings that are always 0 (dead) or far larger than the
    others (outliers).
    """
    from embedcache.info import describe

    found = describe(path)
    if as_json:
        print_json(found)
        return
    if found["kind"] != "cache":
        print_pairs(_carryon_pairs(found))
        return
    print_pairs(_cache_pairs(found))
    if found["complete"]:
        typer.echo("")
        print_table(["bytes per token", "train", "dev", "test", "all", "size"], _array_rows(found))


def _base_pairs(base: dict[str, Any]) -> list[tuple[str, object]]:
    return [
        ("base", base["name"]),
        ("architecture", f"{base['architecture']}, {base['num_layers']} layers"),
        ("hidden, vocabulary", f"{base['hidden_size']:,}, {base['vocab_size']:,}"),
        ("fingerprint", base["fingerprint"]),
    ]


def _cache_pairs(found: dict[str, Any]) -> list[tuple[str, object]]:
    from embedcache.cache.format.layout import sources_of

    settings = found["settings"]
    pairs: list[tuple[str, object]] = [
        ("cache", found["path"]),
        (
            "complete",
            "yes" if found["complete"] else "no: run the same 'embedcache extract' again to resume",
        ),
        *_base_pairs(found["base"]),
        ("corpus", ", ".join(sources_of(found["corpus"]))),
        *_appended_pairs(found["appended"]),
        ("taps", ", ".join(settings["taps"])),
        ("codec", f"{settings['codec']} (dev and test: bf16)"),
        ("context", settings["context"]),
    ]
    for name, split in found["splits"].items():
        pairs.append(
            (
                name,
                ", ".join(
                    counted(split[unit], unit)
                    for unit in ("tokens", "sequences", "documents", "blocks")
                )
                + (f", {split['bytes_per_token']:,.0f} bytes/token" if "bytes" in split else ""),
            )
        )
    for tap, measured in (found["calibration"] or {}).items():
        rise = measured.get("rise")
        pairs.append(
            (
                f"calibration, {tap}",
                f"{measured['bits']:.2f} bits per value on held-out tokens"
                + ("" if rise is None else f"; changes the base's cross-entropy by {rise:+.3f}"),
            )
        )
    pairs += _component_pairs(found)
    pairs.append(("size", format_bytes(found["bytes"])))
    environment = found["environment"]
    pairs.append(
        (
            "made with",
            f"embedcache {environment['embedcache']}, torch {environment['torch']}, "
            f"{environment['device']}, {environment['dtype']}",
        )
    )
    return pairs


def _appended_pairs(appended: list[dict[str, Any]]) -> list[tuple[str, object]]:
    return [
        (
            "appended",
            f"{counted(sum(part['documents'].values()), 'documents')}, "
            f"{counted(sum(part['tokens'].values()), 'tokens')} from {', '.join(part['sources'])}"
            + (f", on {part['at']}" if part["at"] else ""),
        )
        for part in appended
    ]


def _array_rows(found: dict[str, Any]) -> list[list[str]]:
    """Return a row for each array: bytes per token in each split and in all, and its size."""
    arrays = found["arrays"]
    tokens = sum(split["tokens"] for split in found["splits"].values())
    total = dict.fromkeys((name for place in arrays.values() for name in place), 0)
    for place in arrays.values():
        for name, array in place.items():
            total[name] += array["bytes"]
    rows = []
    for name, count in sorted(total.items(), key=lambda item: -item[1]):
        by_split = [
            f"{arrays[split][name]['bytes_per_token']:,.2f}" if name in arrays[split] else ""
            for split in ("train", "dev", "test")
        ]
        rows.append([name, *by_split, f"{count / max(1, tokens):,.2f}", format_bytes(count)])
    return rows


def _component_pairs(found: dict[str, Any]) -> list[tuple[str, object]]:
    pairs: list[tuple[str, object]] = []
    for split, taps in (found["bits_per_value"] or {}).items():
        bits = ", ".join(f"{tap} {value:.2f}" for tap, value in taps.items())
        pairs.append((f"bits per value, {split}", bits))
    for tap, seen in (found["components"] or {}).items():
        outliers = [f"{number} ({ratio:.0f}x)" for number, ratio in seen["outliers"].items()]
        pairs.append(
            (
                f"components, {tap}",
                f"{seen['count']:,}: {_some('dead', [str(n) for n in seen['dead']])}, "
                f"{_some('outliers', outliers)} (measured on {seen['sampled_tokens']:,} tokens)",
            )
        )
    return pairs


def _some(word: str, names: list[str]) -> str:
    if not names:
        return f"no {word}"
    more = " …" if len(names) > MAX_COMPONENTS else ""
    return f"{len(names)} {word}: {' '.join(names[:MAX_COMPONENTS])}{more}"


def _carryon_pairs(found: dict[str, Any]) -> list[tuple[str, object]]:
    from embedcache.cache.format.layout import sources_of

    config, results = found["carryon"], found["results"]
    pairs: list[tuple[str, object]] = [
        ("carry-on", found["path"]),
        *_base_pairs(found["base"]),
        ("parameters", f"{results['parameters']:,}"),
        ("shape", ", ".join(f"{key} {formatted(value)}" for key, value in config.items())),
        ("trained on", ", ".join(sources_of(found["cache"]["corpus"]))),
        ("epochs", f"{results['epochs']}, kept epoch {results['best_epoch']}"),
    ]
    if results["base_dev"] is not None:
        pairs.append(("dev", f"base {results['base_dev']:.4f}, carry-on {results['best_dev']:.4f}"))
    return pairs
