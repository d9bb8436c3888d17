"""SHA-256 of large files, read once: 60 GB of weights take minutes to hash and never change."""

from __future__ import annotations

import json
import re
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from embedcache.base.home import home
from embedcache.store.files import hash_file, publish_json

_SETTLED_NS = 2_000_000_000


def weight_hash(path: Path) -> str:
    """Return the SHA-256 of ``path`` as 64 hex digits, reading its bytes only if they are new.

    A symlink of the hub's cache into ``blobs/`` is named by its own hash. Any other hash is kept
    in ``home()/hashes.json`` by real path, size and modification time.
    """
    real = path.resolve()
    if path.is_symlink() and real.parent.name == "blobs" and _is_sha256(real.name):
        return real.name
    status = real.stat()
    key = {"size": status.st_size, "mtime_ns": status.st_mtime_ns}
    known = _read_hashes().get(str(real))
    if isinstance(known, dict) and {name: known.get(name) for name in key} == key:
        sha256 = known.get("sha256")
        if isinstance(sha256, str) and _is_sha256(sha256):
            return sha256
    started_ns = time.time_ns()
    sha256 = hash_file(real)
    # A file that was written a moment ago could be written again within the clock's tick, and
    # look the same: its hash is taken afresh until the file has settled.
    if started_ns - status.st_mtime_ns > _SETTLED_NS:
        with suppress(OSError):  # it only saves time: a home that takes nothing stops no work
            publish_json(_store(), {**_read_hashes(), str(real): {**key, "sha256": sha256}})
    return sha256


def _store() -> Path:
    return home() / "hashes.json"


def _read_hashes() -> dict[str, Any]:
    try:
        stored = json.loads(_store().read_bytes())
    except (OSError, ValueError):
        # Damaged or not to be read: it only saves time, and the next hash writes it whole again.
        return {}
    return stored if isinstance(stored, dict) else {}


def _is_sha256(name: str) -> bool:
    return re.fullmatch(r"[0-9a-f]{64}", name) is not None
