"""The user's embedcache directory: converted bases, and the SHA-256 of large weight files."""

from __future__ import annotations

import json
import os
import re
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from embedcache.store.files import hash_file, publish_json

_SETTLED_NS = 2_000_000_000
"""Age of a file from which its hash is stored."""


def home() -> Path:
    """Return the directory for files that can be made again; it may not exist yet.

    The directory is ``$EMBEDCACHE_HOME``, else ``$XDG_CACHE_HOME/embedcache``, else
    ``~/.cache/embedcache``. An empty variable counts as unset.
    """
    if own := os.environ.get("EMBEDCACHE_HOME"):
        return Path(own).expanduser()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared).expanduser() / "embedcache"
    return Path.home() / ".cache" / "embedcache"


def weight_hash(path: Path) -> str:
    """Return the SHA-256 of a weight file as 64 hex digits, and read the file only if it changed.

    A symlink into ``blobs/`` of the hub's cache already has its hash as its target's name. Every
    other hash is stored in ``home()/hashes.json`` by real path, size and modification time.
    """
    real = path.resolve()
    if path.is_symlink() and real.parent.name == "blobs" and _is_sha256(real.name):
        return real.name
    status = real.stat()
    key = {"size": status.st_size, "mtime_ns": status.st_mtime_ns}
    stored = _read_hashes().get(str(real))
    if isinstance(stored, dict) and {name: stored.get(name) for name in key} == key:
        sha256 = stored.get("sha256")
        if isinstance(sha256, str) and _is_sha256(sha256):
            return sha256
    started_ns = time.time_ns()
    sha256 = hash_file(real)
    # Two writes within one tick of the file system's clock leave the same size and time, so the
    # hash of a file that was just written is not stored.
    if started_ns - status.st_mtime_ns > _SETTLED_NS:
        with suppress(OSError):  # The stored hashes only save time.
            publish_json(_hashes_path(), {**_read_hashes(), str(real): {**key, "sha256": sha256}})
    return sha256


def _hashes_path() -> Path:
    return home() / "hashes.json"


def _read_hashes() -> dict[str, Any]:
    try:
        stored = json.loads(_hashes_path().read_bytes())
    except (OSError, ValueError):
        return {}  # A damaged file is written anew with the next hash.
    return stored if isinstance(stored, dict) else {}


def _is_sha256(name: str) -> bool:
    return re.fullmatch(r"[0-9a-f]{64}", name) is not None
