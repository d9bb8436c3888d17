"""Files of a finished cache replaced all together, or not at all.

What is new is staged whole. Publishing the plan commits it: from then on the manifest is taken
away, the files are moved into place, idempotently, by whoever holds the writer's lock, and the new
manifest comes last. A kill before the commit leaves the cache as it was; after it readers refuse
the cache, for want of a manifest, until the rewrite is finished.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from embedcache.cache.layout import MANIFEST, STAGING
from embedcache.cache.seal import fsync_tree
from embedcache.files import fsync_path, make_folder, publish_json

_FOLDER = f"{STAGING}/rewrite"
_FILES = "files"
_PLAN = "plan.json"


def begin_rewrite(cache: Path) -> Path:
    """Return an empty folder in which to lay the new files, by their paths inside the cache.

    Call under the writer's lock, after `finish_rewrite`.
    """
    folder = cache / _FOLDER
    shutil.rmtree(folder, ignore_errors=True)
    make_folder(folder / _FILES)
    return folder / _FILES


def commit_rewrite(cache: Path, *, remove: list[str], about: dict[str, Any]) -> None:
    """Put the staged files in place, a manifest among them, and remove others.

    ``about`` is what `finish_rewrite` returns to whoever finishes it.
    """
    folder = cache / _FOLDER
    fsync_tree(folder)
    for path in (folder, folder.parent):
        fsync_path(path.parent)
    publish_json(folder / _PLAN, {"remove": remove, "about": about})
    finish_rewrite(cache)


def finish_rewrite(cache: Path) -> dict[str, Any] | None:
    """Go on with a rewrite that was committed and cut short; return what it is about, if any.

    Call with the cache to itself.
    """
    folder = cache / _FOLDER
    if not (folder / _PLAN).is_file():
        return None
    plan = json.loads((folder / _PLAN).read_text())
    staged = folder / _FILES
    if (staged / MANIFEST).is_file():
        (cache / MANIFEST).unlink(missing_ok=True)
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
