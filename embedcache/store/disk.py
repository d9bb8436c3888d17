"""A disk that is full, or not to be written to, as one error that says the way out."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from embedcache.errors import OutputError
from embedcache.units import size

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_CLOSED = (errno.EROFS, errno.EACCES, errno.EPERM)


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Raise ``OutputError`` where the block fails because nothing more can be written to ``out``.

    A full disk's own error names no file; one of another place, such as the corpus, is not told as
    one of ``out``'s. Any other ``OSError`` passes as it is.
    """
    try:
        yield
    except OSError as error:
        place = Path(error.filename) if isinstance(error.filename, str) else out
        if error.errno in _FULL:
            raise OutputError(
                f"expected room on the disk of {place}, found {_free(place)} free "
                f"({error.strerror}): make room there, then type the same again. What was finished "
                "is kept"
            ) from error
        if error.errno in _CLOSED and _leads_to(place.absolute(), out.absolute()):
            raise OutputError(
                f"expected to be allowed to write {place}, found that it is not "
                f"({error.strerror}): let it be written, then type the same again, or use another "
                "folder. What was finished is kept"
            ) from error
        raise


def _leads_to(place: Path, out: Path) -> bool:
    """Whether a place is inside ``out`` or above it."""
    return place.is_relative_to(out) or out.is_relative_to(place)


def _free(place: Path) -> str:
    existing = next(folder for folder in [place, *place.absolute().parents] if folder.exists())
    return size(shutil.disk_usage(existing).free)
