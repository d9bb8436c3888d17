"""Disk usage: the bytes of each array of a cache."""

from __future__ import annotations

import os
from collections import Counter
from contextlib import suppress
from pathlib import Path

from embedcache.cache.format.layout import COMMITS, DIGESTS, SPLITS
from embedcache.store.files import LOCK, STAGING
from embedcache.store.lease import LEASES

SHARED = "shared"
"""Stands for a split where a file belongs to none: the head, the codec, the manifest."""
WHOLE = ("tokens", "documents")
"""Groups of a split that count as one array."""


def bytes_by_array(cache: Path) -> dict[str, Counter[str]]:
    """Return the bytes on disk by split (or ``SHARED``), then by array; metadata included.

    A split has ``embeddings/<tap>``, ``scale/<tap>``, ``tokens``, ``documents``, ``markers`` and
    ``digest_table``; the others are ``head``, ``token_embedding``, ``manifest.json`` and the like.
    """
    found: dict[str, Counter[str]] = {name: Counter() for name in (*SPLITS, SHARED)}
    for path in cache.rglob("*"):
        if path.is_file() and path.name != LOCK:
            place, array = _owner(path.relative_to(cache).parts)
            found[place][array] += path.stat().st_size
    return found


def used_bytes(cache: Path) -> int:
    """Return the bytes of a cache's files, without leases and files that are staged."""
    found = 0
    for top in cache.iterdir():
        if top.name in (STAGING, LEASES):
            continue
        within = (Path(at) / name for at, _, names in os.walk(top) for name in names)
        for path in within if top.is_dir() else [top]:
            with suppress(FileNotFoundError):  # renamed just now
                found += path.stat().st_size
    return found


def _owner(parts: tuple[str, ...]) -> tuple[str, str]:
    """Return the place and array of a file.

    >>> _owner(("train", "embeddings", "final", "c", "0", "0")), _owner(("base", "zarr.json"))
    (('train', 'embeddings/final'), ('shared', 'groups'))
    """
    top, *folders = parts[:-1] or (parts[0],)
    if top in (COMMITS, DIGESTS) and folders and folders[0] in SPLITS:
        return folders[0], "markers" if top == COMMITS else "digest_table"
    if top in SPLITS:
        if not folders:
            return top, "groups"
        if folders[0] in WHOLE:
            return top, folders[0]
        return top, "/".join(folders[:2]) if len(folders) > 1 else "groups"
    if top == "base":
        return SHARED, folders[0] if folders else "groups"
    return SHARED, top
