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
"""The key for files that belong to no split, such as the head, the codec and the manifest."""
SINGLE_ENTRY_GROUPS = ("tokens", "documents")
"""Groups of a split whose arrays are counted together."""


def bytes_by_array(cache: Path) -> dict[str, Counter[str]]:
    """Return the bytes on disk by split (or `SHARED`), then by array, including metadata.

    The keys of a split are ``embeddings/<tap>``, ``scale/<tap>``, ``tokens``, ``documents``,
    ``markers``, ``digest_table`` and ``groups`` (the metadata of its groups). The keys of `SHARED`
    are ``groups``, ``head``, ``token_embedding``, and the names of files and folders of the cache,
    such as ``manifest.json``.
    """
    found: dict[str, Counter[str]] = {name: Counter() for name in (*SPLITS, SHARED)}
    for path in cache.rglob("*"):
        if path.is_file() and path.name != LOCK:
            split, array = _split_and_array(path.relative_to(cache).parts)
            found[split][array] += path.stat().st_size
    return found


def used_bytes(cache: Path) -> int:
    """Return the bytes of a cache's files, without leases and staged files."""
    found = 0
    for top in cache.iterdir():
        if top.name in (STAGING, LEASES):
            continue
        paths = (Path(at) / name for at, _, names in os.walk(top) for name in names)
        for path in paths if top.is_dir() else [top]:
            with suppress(FileNotFoundError):  # renamed or removed in the meantime
                found += path.stat().st_size
    return found


def _split_and_array(parts: tuple[str, ...]) -> tuple[str, str]:
    """Return the split (or `SHARED`) and the array that a file is counted under.

    >>> _split_and_array(("train", "embeddings", "final", "c", "0", "0"))
    ('train', 'embeddings/final')
    >>> _split_and_array(("base", "zarr.json"))
    ('shared', 'groups')
    """
    top, *folders = parts[:-1] or (parts[0],)
    if top in (COMMITS, DIGESTS) and folders and folders[0] in SPLITS:
        return folders[0], "markers" if top == COMMITS else "digest_table"
    if top in SPLITS:
        if not folders:
            return top, "groups"
        if folders[0] in SINGLE_ENTRY_GROUPS:
            return top, folders[0]
        return top, "/".join(folders[:2]) if len(folders) > 1 else "groups"
    if top == "base":
        return SHARED, folders[0] if folders else "groups"
    return SHARED, top
