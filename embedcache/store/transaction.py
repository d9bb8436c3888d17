"""Files of a finished cache replaced all together, or not at all.

What is new is staged whole, by one attempt. Renaming its folder commits it: from then on the
manifest is taken away, the files are moved into place, idempotently, by whoever has the cache to
itself, and the new manifest comes last. A kill before the commit leaves the cache as it was; after
it readers refuse the cache, for want of a manifest, until the rewrite is finished. An attempt that
was taken for dead finds its folder gone (see `clear_staging`), and can commit nothing.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from embedcache.cache.format.layout import MANIFEST, STAGING
from embedcache.cache.tokens.writer import fsync_tree
from embedcache.store.files import fsync_path, make_folder

_FOLDER = f"{STAGING}/rewrite"
_FILES = "files"
_PLAN = "plan.json"
_OLD = "old.json"


def begin_rewrite(staging: Path) -> Path:
    """Return an empty folder in which to lay the new files, by their paths inside the cache.

    ``staging`` is the attempt's own folder, made here. Call with the cache to itself, after
    `finish_rewrite`.
    """
    make_folder(staging / _FILES)
    (staging / _PLAN).touch()
    return staging / _FILES


def commit_rewrite(cache: Path, staging: Path, *, remove: list[str], about: dict[str, Any]) -> None:
    """Put the files staged since `begin_rewrite` in place, a manifest among them; remove others.

    ``about`` is what `finish_rewrite` returns to whoever finishes it. Raises ``FileNotFoundError``
    where this attempt was taken for dead.
    """
    with (staging / _PLAN).open("r+") as file:  # made before all else: gone if that is
        file.write(json.dumps({"remove": remove, "about": about}))
        file.flush()
        os.fsync(file.fileno())
    fsync_tree(staging)
    staging.replace(cache / _FOLDER)
    for path in (cache / _FOLDER, cache / STAGING):
        fsync_path(path.parent)
    finish_rewrite(cache)


def is_rewriting(cache: Path) -> bool:
    """Whether a rewrite was committed and is not finished."""
    return (cache / _FOLDER / _PLAN).is_file()


def finish_rewrite(cache: Path) -> dict[str, Any] | None:
    """Go on with a rewrite that was committed and cut short; return what it is about, if any.

    Call with the cache to itself.
    """
    folder = cache / _FOLDER
    if not is_rewriting(cache):
        return None
    plan = json.loads((folder / _PLAN).read_text())
    staged = folder / _FILES
    if (staged / MANIFEST).is_file():
        if (cache / MANIFEST).is_file():  # into the folder: whoever comes late harms no new one
            (cache / MANIFEST).replace(folder / _OLD)
        fsync_path(cache)
        names = [path.relative_to(staged) for path in sorted(staged.rglob("*")) if path.is_file()]
        names.remove(Path(MANIFEST))
        for name in names:
            make_folder((cache / name).parent)
            (staged / name).replace(cache / name)
        for parent in {cache / name.parent for name in names}:
            fsync_path(parent)
        for gone in plan["remove"]:
            (cache / gone).unlink(missing_ok=True)
        (staged / MANIFEST).replace(cache / MANIFEST)
        fsync_path(cache)
    shutil.rmtree(staged, ignore_errors=True)
    (folder / _PLAN).unlink()  # last: until then whoever comes next is told what was done
    shutil.rmtree(folder, ignore_errors=True)
    return plan["about"]
