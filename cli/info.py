"""``embedcache info``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from embedcache.units import size

from .show import print_json, print_pairs, print_table


def info_command(
    path: Annotated[Path, typer.Argument(help="A cache or a carry-on.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Describe a cache or a carry-on."""
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
        print_table(["bytes a token", "train", "dev", "test", "all", "size"], _array_rows(found))


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
        ("complete", "yes" if found["complete"] else "no: run the same extract again to go on"),
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
                f"{split['tokens']:,} tokens, {split['sequences']:,} sequences, "
                f"{split['documents']:,} documents, {split['blocks']} blocks"
                + (f", {split['bytes_per_token']:,.0f} bytes a token" if "bytes" in split else ""),
            )
        )
    for tap, measured in (found["calibration"] or {}).items():
        rise = measured.get("rise")
        pairs.append(
            (
                f"calibrated, {tap}",
                f"{measured['bits']:.2f} bits a value on held-out rows"
                + ("" if rise is None else f"; the base's cross-entropy from it {rise:+.3f} nats"),
            )
        )
    pairs += _component_pairs(found)
    pairs.append(("size", size(found["bytes"])))
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
            "of it added later",
            f"{sum(part['documents'].values()):,} documents, "
            f"{sum(part['tokens'].values()):,} tokens of {', '.join(part['sources'])}"
            + (f", at {part['at']}" if part["at"] else ""),
        )
        for part in appended
    ]


def _array_rows(found: dict[str, Any]) -> list[list[str]]:
    """Return a row for each array: bytes a token of each split, of all, and its size."""
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
        rows.append([name, *by_split, f"{count / max(1, tokens):,.2f}", size(count)])
    return rows


def _component_pairs(found: dict[str, Any]) -> list[tuple[str, object]]:
    pairs: list[tuple[str, object]] = []
    for split, taps in (found["bits_per_value"] or {}).items():
        bits = ", ".join(f"{tap} {value:.2f}" for tap, value in taps.items())
        pairs.append((f"bits a value, {split}", bits))
    for tap, seen in (found["components"] or {}).items():
        outliers = [f"{number} ({ratio:.0f}x)" for number, ratio in seen["outliers"].items()]
        pairs.append(
            (
                f"components, {tap}",
                f"{seen['count']:,}: {_some('dead', [str(n) for n in seen['dead']])}, "
                f"{_some('outliers', outliers)}; over {seen['sampled_tokens']:,} train tokens",
            )
        )
    return pairs


def _some(word: str, names: list[str], most: int = 8) -> str:
    if not names:
        return f"no {word}"
    return f"{len(names)} {word}: {' '.join(names[:most])}{' …' if len(names) > most else ''}"


def _carryon_pairs(found: dict[str, Any]) -> list[tuple[str, object]]:
    from embedcache.cache.format.layout import sources_of

    config, results = found["carryon"], found["results"]
    pairs: list[tuple[str, object]] = [
        ("carry-on", found["path"]),
        *_base_pairs(found["base"]),
        ("parameters", f"{results['parameters']:,}"),
        ("shape", ", ".join(f"{key} {value}" for key, value in config.items())),
        ("trained on", ", ".join(sources_of(found["cache"]["corpus"]))),
        ("epochs", f"{results['epochs']}, kept {results['best_epoch']}"),
    ]
    if results["base_dev"] is not None:
        pairs.append(("dev", f"base {results['base_dev']:.4f}, carry-on {results['best_dev']:.4f}"))
    return pairs
