"""Describing a cache or a carry-on, as JSON-ready values.

Axes: N tokens, H hidden.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from embedcache.cache.blocks.commit import newest_generations
from embedcache.cache.cache import Cache, read_attributes
from embedcache.cache.calibration import load_calibration
from embedcache.cache.format.layout import CODEC, MANIFEST, SPLITS, CacheAttributes
from embedcache.cache.manifest.manifest import Manifest, read_manifest
from embedcache.cache.split_reader import SplitReader
from embedcache.cache.tokens.reader import SplitTokens
from embedcache.cache.usage import SHARED, bytes_by_array
from embedcache.carryon.saving import CONFIG_FILE, read_record
from embedcache.errors import UsageError

DEAD = 1e-3
"""A component is dead below this share of the median standard deviation."""
OUTLIER = 10.0
"""A component is an outlier above this many times the median standard deviation."""
SAMPLED_ROWS = 8192


def describe(path: str | Path) -> dict[str, Any]:
    """Describe a cache or a carry-on; ``kind`` says which.

    Args:
        path: the folder of a cache, finished or not, or of a carry-on.

    Returns:
        JSON-ready values: identities, settings, counts and sizes.

    Raises:
        UsageError: the path is neither.
    """
    path = Path(path)
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
    """Return the corpora that were added to the finished cache, and when, if recorded."""
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
    """Return the step of each tap's codec, and the rate and quality measured at calibration."""
    if not (path / CODEC).is_dir():
        return None
    found = {tap: load_calibration(path, tap) for tap in attributes.settings.taps}
    return {tap: {"step": each.step, **each.measured} for tap, each in found.items()}


def _arrays(
    used: dict[str, Counter[str]], splits: dict[str, dict[str, Any]]
) -> dict[str, dict[str, dict[str, float]]]:
    """Return bytes, and bytes a token, by split and array; for shared arrays, by all tokens."""
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
    """Return the bits a value of each tap, by split; scales and indexes are included."""
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Components:
    """Components of a tap's embeddings that stand out, in a sample of decoded ones.

    A dead component carries nothing and costs a codec nothing. An outlier takes the range of a
    per-token scale for itself (Dettmers et al., arXiv 2208.07339).

    Attributes:
        count: the number of components, the hidden size.
        sampled_tokens: the size of the sample.
        median_std: the median standard deviation of the components that are not dead.
        dead: the dead components.
        outliers: by component, the standard deviation over the median; the largest first.
    """

    count: int
    sampled_tokens: int
    median_std: float
    dead: tuple[int, ...]
    outliers: dict[int, float]


def describe_components(split: SplitReader) -> dict[str, Components]:
    """Return the components of every tap, from a readable block in the middle of the split.

    The result is empty if every sequence is quarantined.
    """
    count = split.manifest.blocks
    for number in sorted(range(count), key=lambda block: abs(2 * block + 1 - count)):
        if len(split.sequences(number)[0]):
            block = split.block(number)
            rows = torch.cat([torch.arange(a, b) for a, b in block.rows_S2.tolist()])
            rows = rows[:: -(-len(rows) // SAMPLED_ROWS)]
            return {tap: _stand_out(x_NH[rows]) for tap, x_NH in block.x_NH.items()}
    return {}


def _stand_out(x_NH: torch.Tensor) -> Components:
    std_H = x_NH.float().std(dim=0, correction=0)
    # The median of all would be that of dead components if most are dead.
    alive_H = std_H[std_H > DEAD * std_H.max()]
    median = alive_H.median().item() if len(alive_H) else 0.0
    ratio_H = std_H / median if median else torch.zeros_like(std_H)
    largest = ratio_H.argsort(descending=True)
    return Components(
        count=len(std_H),
        sampled_tokens=len(x_NH),
        median_std=median,
        dead=tuple((ratio_H <= DEAD).nonzero().flatten().tolist()),
        outliers={
            int(i): round(ratio_H[i].item(), 2) for i in largest.tolist() if ratio_H[i] > OUTLIER
        },
    )
