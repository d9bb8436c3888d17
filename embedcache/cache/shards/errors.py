"""What Zarr raises for a damaged file, as the one error that a reader raises."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from embedcache.errors import CacheError

WAY_OUT = (
    "Run 'embedcache verify CACHE --deep' to see what is damaged, then the same 'embedcache "
    "extract' with --repair (of a merged cache: 'embedcache extract --repair --out CACHE')."
)
"""What a reader's message ends in."""


def damaged(path: Path, fault: str) -> CacheError:
    """Return the error for a file that is not as it was written."""
    return CacheError(f"{path} {fault}: the cache is damaged. {WAY_OUT}")


def unreadable(path: Path, why: object) -> CacheError:
    """Return the error for a file, or files under ``path``, that cannot be made sense of."""
    return CacheError(f"{path} is damaged ({why}). {WAY_OUT}")


def rewritten(path: Path, fault: str) -> CacheError:
    """Return the error for a file that is not what it was when its cache was opened."""
    return CacheError(
        f"{path} {fault}: documents were added to the cache, or deleted, since it was opened, or "
        f"the cache is damaged. Open it again. {WAY_OUT}"
    )


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Raise ``CacheError`` naming ``path`` for whatever Zarr and its codecs raise in the block.

    Metadata that is no JSON, or JSON of another shape, and chunks that fail their checksum come
    out of zarr-python as many kinds of exception.
    """
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError, OSError) as error:
        raise unreadable(path, error) from error
