"""Whether a cache is quiet: for one who looks at it without a lock."""

from __future__ import annotations

from pathlib import Path

from embedcache.cache.blocks.commit import committed_blocks
from embedcache.cache.format.layout import MANIFEST, SEALED, SPLITS
from embedcache.cache.manifest.digests import METADATA
from embedcache.errors import CacheError
from embedcache.store.lease import writers_of
from embedcache.store.transaction import is_rewriting


def state_of(cache: Path) -> tuple[object, ...]:
    """Return what is another once a writer has changed what a cache should hold."""
    markers = [path for split in SPLITS for path in committed_blocks(cache, split).values()]
    return (*markers, *(_identity(cache / name) for name in (MANIFEST, SEALED, METADATA)))


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns


def require_quiet(cache: Path, found: object) -> None:
    """Raise ``CacheError`` where a cache is being written, so that ``found`` is no damage yet."""
    if is_rewriting(cache):
        raise CacheError(
            f"documents are being deleted from {cache} or added to it, or that was stopped, and "
            f"not all of it matches yet ({found}): wait for it, or type the same 'embedcache "
            "delete' or 'embedcache extract' again to finish it, then verify again"
        )
    if writers := writers_of(cache):
        raise CacheError(
            f"{cache} is being written by {', '.join(map(str, writers))}, and not all of it "
            f"matches yet ({found}): wait for that, then verify again"
        )
