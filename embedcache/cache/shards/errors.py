"""Errors of damaged files: what Zarr and its codecs raise, as one `CacheError`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from embedcache.errors import CacheError

REPAIR_HINT = (
    "`embedcache.verify(cache, deep=True)` lists the damage; `embedcache.repair()`, with the "
    "corpus and the settings of the cache, repairs it."
)
"""How the messages of readers end."""


def damaged_error(path: Path, fault: str) -> CacheError:
    """Return the error for a file that is not as it was written."""
    return CacheError(f"{path} {fault}: the cache is damaged. {REPAIR_HINT}")


def unreadable_error(path: Path, why: object) -> CacheError:
    """Return the error for a file, or files under ``path``, that cannot be decoded."""
    return CacheError(f"{path} is damaged ({why}). {REPAIR_HINT}")


def changed_error(path: Path, fault: str) -> CacheError:
    """Return the error for a file that has changed since its cache was opened."""
    return CacheError(
        f"{path} {fault}: either documents were added or deleted since the cache was opened (then "
        f"open it again), or the cache is damaged. {REPAIR_HINT}"
    )


@contextmanager
def translate_read_errors(path: Path) -> Iterator[None]:
    """Raise ``CacheError`` naming ``path`` for whatever Zarr and its codecs raise in the block.

    zarr-python raises many kinds of exception for metadata that is not the expected JSON and for
    chunks that fail their checksum.
    """
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError, OSError) as error:
        raise unreadable_error(path, error) from error
