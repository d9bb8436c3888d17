"""What a cache or a carry-on is, as JSON-ready values."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from embedcache.cache.blocks.commit import newest_generations
from embedcache.cache.cache import Cache, read_attributes
from embedcache.cache.codecs.transform import Calibration
from embedcache.cache.components import describe_components
from embedcache.cache.format.layout import CODEC, MANIFEST, SPLITS, CacheAttributes
from embedcache.cache.manifest.manifest import Manifest, read_manifest
from embedcache.cache.tokens.reader import SplitTokens
from embedcache.cache.usage import SHARED, bytes_by_array
from embedcache.carryon.saving import CONFIG_FILE, read_record
from embedcache.errors import UsageError


def describe(path: Path) -> dict[str, Any]:
    """Return a description with ``kind`` "cache" or "carry-on".

    Raises ``UsageError`` if the path is neither.
    """
    if (path / CONFIG_FILE).is_file():
        record = read_record(path)
        return {
            "kind": "carry-on",
            "path": str(path),
            "carryon": record.config.to_dict(),
            "base": record.base,
            "training": record.training,
            "cache": record.cache,
            "results": record.results,
        }
    if (path / "zarr.json").is_file():
        return _describe_cache(path)
    found = "nothing is there" if not path.exists() else "it holds neither"
    raise UsageError(
        f"expected a cache (zarr.json) or a carry-on ({CONFIG_FILE}) at {path}, but {found}"
    )


def _describe_cache(path: Path) -> dict[str, Any]:
    attributes = read_attributes(path)
    complete = (path / MANIFEST).is_file()
    manifest = read_manifest(path) if complete else None
    splits: dict[str, dict[str, Any]] = {}
    for name in SPLITS:
        tokens = SplitTokens(path, name, attributes.settings.block_tokens)
        splits[name] = {**tokens.totals, "blocks": tokens.blocks}
        if manifest is None:
            splits[name]["committed_blocks"] = len(newest_generations(path, name))
            continue
        split = manifest.splits[name]
        splits[name] |= {
            "bytes": split.bytes,
            "bytes_per_token": round(split.bytes / max(1, split.tokens), 1),
            "quarantined": split.quarantined.rows,
        }
    used = bytes_by_array(path)
    return {
        "kind": "cache",
        "path": str(path),
        "complete": complete,
        "manifest": None if manifest is None else manifest.hash,
        "base": attributes.base,
        "corpus": attributes.corpus,
        "appended": _appended(attributes, manifest),
        "settings": asdict(attributes.settings),
        "environment": attributes.environment,
        "splits": splits,
        "extracted": None if manifest is None else manifest.extracted,
        "bytes": sum(array.total() for array in used.values()),
        "arrays": _arrays(used, splits) if complete else None,
        "bits_per_value": _bits(used, splits, attributes) if complete else None,
        "calibration": _calibration(path, attributes),
        "components": _components(path) if complete else None,
    }


def _appended(attributes: CacheAttributes, manifest: Manifest | None) -> list[dict[str, Any]]:
    """Return what was added to the finished cache, and when, where the manifest still says so."""
    times = {} if manifest is None else manifest.extracted.get("appended", {})
    return [
        {
            "at": times.get(part["onto"]),
            "sources": part["config"]["sources"],
            "documents": part["summary"]["documents"],
            "tokens": part["summary"]["tokens"],
            "already_there": part["summary"]["already_there"],
        }
        for part in attributes.corpus.get("appended", ())
    ]


def _calibration(path: Path, attributes: CacheAttributes) -> dict[str, dict[str, float]] | None:
    """Return the step of each tap's codec, and the rate and quality seen when it was calibrated."""
    if not (path / CODEC).is_dir():
        return None
    found = {tap: Calibration.load(path, tap) for tap in attributes.settings.taps}
    return {tap: {"step": each.step, **each.measured} for tap, each in found.items()}


def _arrays(
    used: dict[str, Counter[str]], splits: dict[str, dict[str, Any]]
) -> dict[str, dict[str, dict[str, float]]]:
    """Return bytes, and bytes a token, by split and array; what is shared, by token of all."""
    tokens = {name: split["tokens"] for name, split in splits.items()}
    tokens[SHARED] = sum(tokens.values())
    return {
        name: {
            array: {"bytes": count, "bytes_per_token": round(count / max(1, tokens[name]), 3)}
            for array, count in sorted(arrays.items(), key=lambda item: -item[1])
        }
        for name, arrays in used.items()
    }


def _bits(
    used: dict[str, Counter[str]], splits: dict[str, dict[str, Any]], attributes: CacheAttributes
) -> dict[str, dict[str, float]]:
    """Return the bits that a value of a tap takes, by split; scales and indexes included."""
    hidden = attributes.base["hidden_size"]
    return {
        name: {
            tap: round(
                8
                * sum(count for array, count in used[name].items() if array.endswith(f"/{tap}"))
                / (split["tokens"] * hidden),
                3,
            )
            for tap in attributes.settings.taps
        }
        for name, split in splits.items()
        if split["tokens"]
    }


def _components(path: Path) -> dict[str, dict[str, Any]]:
    cache = Cache(path)
    return {tap: asdict(found) for tap, found in describe_components(cache.split("train")).items()}
