"""What a cache or a carry-on is, as JSON-ready values."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from embedcache.cache.commit import committed_blocks
from embedcache.cache.layout import MANIFEST, SPLITS
from embedcache.cache.manifest import read_manifest
from embedcache.cache.reader import read_attributes
from embedcache.cache.tokens import SplitTokens
from embedcache.carryon.store import CONFIG_FILE, read_record
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
            splits[name]["committed_blocks"] = len(committed_blocks(path, name))
            continue
        split = manifest.splits[name]
        splits[name] |= {
            "bytes": split.bytes,
            "bytes_per_token": round(split.bytes / max(1, split.tokens), 1),
            "quarantined": len(split.quarantined),
        }
    return {
        "kind": "cache",
        "path": str(path),
        "complete": complete,
        "manifest": None if manifest is None else manifest.hash,
        "base": attributes.base,
        "corpus": attributes.corpus,
        "settings": asdict(attributes.settings),
        "environment": attributes.environment,
        "splits": splits,
        "extracted": None if manifest is None else manifest.extracted,
        "bytes": sum(file.stat().st_size for file in path.rglob("*") if file.is_file()),
    }
