"""An append that is suspended past the expiry of its leases harms nothing when it wakes up."""

from __future__ import annotations

import shutil
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from support.cache_contents import contents
from support.fixtures_append import added
from support.fixtures_extract import write_documents
from support.fixtures_paused import DELETED, Pause

import embedcache.editing.append as appending
from embedcache.cache.verify import verify
from embedcache.editing import edit
from embedcache.editing.delete import delete
from embedcache.errors import EmbedcacheError, OutputError
from embedcache.store import transaction as rewrite
from embedcache.store.lease import COORDINATOR, Leases

STEPS = [
    pytest.param(appending, "write_tokens", 1, id="it begins"),
    pytest.param(appending, "extract", 1, id="tokens are sealed"),
    pytest.param(appending, "require_compatible", 1, id="all is computed"),
    pytest.param(edit, "split_manifest", 2, id="digest_tables are being staged"),
    pytest.param(rewrite, "fsync_tree", 1, id="all is staged"),
    pytest.param(rewrite, "finish_transaction", 1, id="it is committed"),
    pytest.param(rewrite, "make_folder", 2, id="files are being moved"),
]


@pytest.mark.parametrize(("module", "name", "call"), STEPS)
@pytest.mark.parametrize("other", ["append", "delete"])
def test_a_suspended_append_mixes_with_no_other_change(
    place: Path,
    tmp_path: Path,
    pause: Pause,
    other: str,
    module: Any,
    name: str,
    call: int,
) -> None:
    out = shutil.copytree(place / "whole", tmp_path / "cache")
    more = write_documents(tmp_path / "more", 3, seed=1)
    gone = {DELETED} if other == "delete" else set()
    expected = {key[:2] for key in contents(out) if key[1] not in gone}

    def meanwhile() -> None:
        if other == "delete":
            delete(out, [DELETED])
        else:
            added(out, more)

    pause(module, name, call, meanwhile)
    with suppress(EmbedcacheError):
        added(out, more)
    assert verify(out, deep=True).faults == ()
    added(out, more)
    assert verify(out, deep=True).faults == ()
    found = {key[:2] for key in contents(out)}
    assert expected < found
    assert len(found) == len(expected) + 3
    assert not (out / ".staging").exists()


@pytest.mark.parametrize(
    ("module", "name"), [(appending, "require_compatible"), (edit, "publish_manifest")]
)
def test_an_append_changes_nothing_while_another_process_coordinates(
    place: Path,
    tmp_path: Path,
    pause: Pause,
    module: Any,
    name: str,
) -> None:
    """The other process is still reading the cache. What a third has staged is left alone, too."""
    out = shutil.copytree(place / "whole", tmp_path / "cache")
    more = write_documents(tmp_path / "more", 3, seed=1)
    with ExitStack() as stack:
        other, third = Leases(out), Leases(out)

        def meanwhile() -> None:
            stack.enter_context(other)
            stack.enter_context(third)
            assert other.take(COORDINATOR)
            third.staging.mkdir(parents=True)
            (third.staging / "staged").touch()

        pause(module, name, 1, meanwhile)
        with pytest.raises(OutputError, match="was taken over"):
            added(out, more)
        assert contents(out) == contents(place / "whole")
        assert (third.staging / "staged").exists()
