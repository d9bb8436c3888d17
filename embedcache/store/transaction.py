"""A transaction: files of a folder are replaced all together, or not at all.

The new files are staged whole, by one attempt. Renaming the staging folder commits the transaction.
After that, the file that is published ``last`` (a cache's manifest) is removed, the others are
moved into place, and the new ``last`` follows.

A kill before the commit leaves the folder as it was. After a kill behind the commit, readers refuse
the folder, which lacks ``last``, until `finish_transaction` has moved the rest; any process may
call it, repeatedly. An attempt whose staging folder others have removed, because it seemed dead,
can commit nothing.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from embedcache.store.files import STAGING, fsync_path, fsync_tree, make_folder

_FOLDER = f"{STAGING}/transaction"
_FILES = "files"
_PLAN = "plan.json"
_OLD = "old"


def begin_transaction(staging: Path) -> Path:
    """Return an empty folder for the new files, by their paths inside the root.

    Call with the root to oneself, after `finish_transaction`.

    Args:
        staging: the attempt's own folder; made here.
    """
    make_folder(staging / _FILES)
    (staging / _PLAN).touch()
    return staging / _FILES


def commit_transaction(
    root: Path, staging: Path, *, last: str, remove: list[str], about: dict[str, Any]
) -> None:
    """Put the files that were staged since `begin_transaction` in place.

    Args:
        root: the folder whose files are replaced.
        staging: as given to `begin_transaction`.
        last: the staged file that is published last; readers need it.
        remove: files that are removed, by their paths inside the root.
        about: JSON-ready values that `finish_transaction` returns.

    Raises:
        FileNotFoundError: the staging folder was removed, because this process seemed dead.
    """
    with (staging / _PLAN).open("r+") as file:  # made by begin: missing if the folder was removed
        json.dump({"last": last, "remove": remove, "about": about}, file)
        file.flush()
        os.fsync(file.fileno())
    fsync_tree(staging)
    staging.replace(root / _FOLDER)
    for path in (root / _FOLDER, root / STAGING):
        fsync_path(path.parent)
    finish_transaction(root)


def transaction_pending(root: Path) -> bool:
    """Whether a transaction was committed and is not finished."""
    return (root / _FOLDER / _PLAN).is_file()


def finish_transaction(root: Path) -> dict[str, Any] | None:
    """Finish a transaction that was committed and interrupted; return its ``about``.

    Returns None where there is none. Call with the root to oneself.
    """
    folder = root / _FOLDER
    if not transaction_pending(root):
        return None
    plan = json.loads((folder / _PLAN).read_text())
    staged, last = folder / _FILES, Path(plan["last"])
    if (staged / last).is_file():
        if (root / last).is_file():  # moved, not removed: a late process cannot remove a newer one
            (root / last).replace(folder / _OLD)
        fsync_path(root)
        names = [path.relative_to(staged) for path in sorted(staged.rglob("*")) if path.is_file()]
        names.remove(last)
        for name in names:
            make_folder((root / name).parent)
            (staged / name).replace(root / name)
        for parent in {root / name.parent for name in names}:
            fsync_path(parent)
        for name in plan["remove"]:
            (root / name).unlink(missing_ok=True)
        (staged / last).replace(root / last)
        fsync_path(root)
    shutil.rmtree(staged, ignore_errors=True)
    (folder / _PLAN).unlink()  # last: until then another process can still return ``about``
    shutil.rmtree(folder, ignore_errors=True)
    return plan["about"]
