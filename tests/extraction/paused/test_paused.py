"""A process that stood still until others took it for dead harms nothing when it goes on."""

from __future__ import annotations

import os
import shutil
import signal
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from support.cache_contents import contents, names
from support.fixtures_extract import (
    comparable_tree,
    small_flags,
    start_command,
)
from support.fixtures_paused import DELETED, Pause, go_on, nothing_is_left, run
from support.stopping import KilledError, killed

import embedcache.editing.delete as deleting
import embedcache.extraction.extract
from embedcache.cache.blocks import commit
from embedcache.cache.format.layout import SPLITS
from embedcache.cache.tokens import writer as seal
from embedcache.cache.verify import verify
from embedcache.editing import edit, repair
from embedcache.editing.delete import delete
from embedcache.errors import OutputError
from embedcache.extraction import plan, store_base
from embedcache.extraction import run as stage_one
from embedcache.store import transaction as rewrite
from embedcache.store.files import STAGING
from embedcache.store.lease import COORDINATOR, Leases

pytestmark = pytest.mark.usefixtures("unrehearsed")

STEPS = [
    pytest.param(plan, "tokenise", 1, id="pass 0 begins"),
    pytest.param(seal, "fsync_tree", 1, id="pass 0 is staged"),
    pytest.param(seal, "publish_digests", 1, id="pass 0 is to be moved into place"),
    pytest.param(Path, "rename", 2, id="a split of pass 0 is in place"),
    pytest.param(Path, "rename", 4, id="splits are in place"),
    pytest.param(Path, "rename", 5, id="the seal of pass 0 is in place"),
    pytest.param(stage_one, "newest_generations", 1, id="pass 0 is sealed"),
    pytest.param(stage_one, "measure", 1, id="the base is loaded"),
    pytest.param(store_base, "fsync_tree", 1, id="the base is staged"),
    pytest.param(stage_one, "store_calibrations", 1, id="the base is in place"),
    pytest.param(stage_one, "BlockEncoder", 1, id="blocks are to be claimed"),
    pytest.param(commit, "write_shard", 2, id="a block is to be staged"),
    pytest.param(commit, "chunks_crc32c", 2, id="a block is staged"),
    pytest.param(commit, "make_folder", 3, id="a marker is to be linked"),
    pytest.param(commit, "promote", 2, id="a marker is linked"),
    pytest.param(stage_one, "split_manifest", 1, id="all blocks are there"),
    pytest.param(stage_one, "publish_manifest", 1, id="the manifest is to be staged"),
    pytest.param(stage_one, "fsync_path", 1, id="a digest table is in place"),
    pytest.param(stage_one, "fsync_path", 6, id="the digest tables are in place"),
    pytest.param(stage_one, "fsync_path", 7, id="the manifest is in place"),
    pytest.param(stage_one, "drop_superseded", 1, id="the manifest is there"),
    pytest.param(stage_one, "clear_staging", 2, id="staging is to be cleared"),
]


@pytest.mark.parametrize(("module", "name", "call"), STEPS)
def test_others_finish_what_one_that_sleeps_was_at(
    place: Path, tmp_path: Path, pause: Pause, module: Any, name: str, call: int
) -> None:
    out = tmp_path / "cache"
    pause(module, name, call, lambda: run(place, out))
    go_on(place, out)
    assert comparable_tree(out) == comparable_tree(place / "whole")
    assert go_on(place, out)
    assert comparable_tree(out) == comparable_tree(place / "whole")
    assert nothing_is_left(out)


@pytest.mark.parametrize(("module", "name", "call"), STEPS)
def test_what_was_deleted_meanwhile_does_not_come_back(
    place: Path, tmp_path: Path, pause: Pause, module: Any, name: str, call: int
) -> None:
    out = tmp_path / "cache"

    def meanwhile() -> None:
        run(place, out)
        delete(out, [DELETED])

    pause(module, name, call, meanwhile)
    go_on(place, out)
    assert verify(out, deep=True).faults == ()
    assert contents(out) == contents(place / "deleted")
    assert nothing_is_left(out)


@pytest.mark.slow
@pytest.mark.parametrize(("module", "name", "call"), STEPS)
def test_one_that_sleeps_wakes_up_after_its_follower_died(
    place: Path, tmp_path: Path, pause: Pause, module: Any, name: str, call: int
) -> None:
    """The follower cleared up and began anew, and left that as it was."""
    out = tmp_path / "cache"

    def meanwhile() -> None:
        with pytest.MonkeyPatch.context() as patch, suppress(KilledError):
            patch.setattr(embedcache.extraction.extract, "load_base", killed)
            run(place, out)

    pause(module, name, call, meanwhile)
    if not go_on(place, out):
        assert go_on(place, out)
    assert comparable_tree(out) == comparable_tree(place / "whole")
    assert nothing_is_left(out)


REPAIRING = [
    pytest.param(repair, "verify_idle", 1, id="damage is looked for"),
    pytest.param(repair, "_restore_tokens", 1, id="damage is found"),
    pytest.param(repair, "_mend_blocks", 2, id="markers are renewed"),
    pytest.param(store_base, "fsync_tree", 1, id="the base is staged"),
    pytest.param(store_base, "fsync_path", 1, id="the base is in place"),
    pytest.param(commit, "chunks_crc32c", 1, id="a block is staged"),
    pytest.param(commit, "promote", 1, id="a marker is linked"),
    pytest.param(stage_one, "publish_manifest", 1, id="the manifest is to be published"),
]


@pytest.mark.parametrize(("module", "name", "call"), REPAIRING)
@pytest.mark.parametrize(
    "others", [pytest.param("repair", marks=pytest.mark.slow), "repair and delete"]
)
def test_a_repair_that_sleeps_undoes_no_other(
    place: Path, tmp_path: Path, pause: Pause, others: str, module: Any, name: str, call: int
) -> None:
    out = shutil.copytree(place / "whole", tmp_path / "cache")
    for damaged in ("train/embeddings/final/c/1/0", "base/head/weight/c/0/0"):
        (out / damaged).unlink()
    (out / "commits/train/00000002.0.json").unlink()

    def meanwhile() -> None:
        run(place, out, repair=True)
        if "delete" in others:
            delete(out, [DELETED])

    pause(module, name, call, meanwhile)
    go_on(place, out, repair=True)
    assert verify(out, deep=True).faults == ()
    assert contents(out) == contents(place / ("deleted" if "delete" in others else "whole"))
    assert nothing_is_left(out)


DELETING = [
    pytest.param(deleting, "FinishedCache", 1, id="it is verified"),
    pytest.param(deleting, "write_shard", 1, id="blocks are being staged"),
    pytest.param(edit, "publish_manifest", 1, id="the manifest is to be staged"),
    pytest.param(rewrite, "fsync_tree", 1, id="all is staged"),
    pytest.param(rewrite, "finish_transaction", 1, id="it is committed"),
    pytest.param(rewrite, "make_folder", 2, id="files are being moved"),
    pytest.param(deleting, "drop_superseded", 1, id="it is done"),
]


@pytest.mark.parametrize(("module", "name", "call"), DELETING)
def test_a_deletion_that_sleeps_mixes_with_no_other(
    place: Path, tmp_path: Path, pause: Pause, module: Any, name: str, call: int
) -> None:
    out = shutil.copytree(place / "whole", tmp_path / "cache")
    before = contents(out)
    other = next(n for split in SPLITS for n in names(out, split) if n != DELETED)
    pause(module, name, call, lambda: delete(out, [other]))
    with suppress(OutputError):
        delete(out, [DELETED])
    assert verify(out, deep=True).faults == ()
    left = {key[1] for key in before} - {key[1] for key in contents(out)}
    assert other in left
    assert contents(out) == {key: value for key, value in before.items() if key[1] not in left}
    assert nothing_is_left(out)
    if DELETED not in left:
        delete(out, [DELETED])
    assert {key[1] for key in contents(out)} == {key[1] for key in before} - {other, DELETED}


def test_a_deletion_whose_turn_another_has_by_now_is_not_committed(
    place: Path, tmp_path: Path, pause: Pause
) -> None:
    """That one is still looking at the cache: it must not change under it."""
    out = shutil.copytree(place / "whole", tmp_path / "cache")
    with ExitStack() as stack:
        other = Leases(out)

        def meanwhile() -> None:
            stack.enter_context(other)
            assert other.take(COORDINATOR)

        pause(edit, "publish_manifest", 1, meanwhile)
        with pytest.raises(OutputError, match="was taken over"):
            delete(out, [DELETED])
        assert contents(out) == contents(place / "whole")


@pytest.mark.parametrize("name", ["SplitTokens", "measure", "publish_manifest"])
def test_an_extraction_whose_turn_another_has_by_now_changes_nothing(
    place: Path, tmp_path: Path, pause: Pause, name: str
) -> None:
    """That one goes on with what it found: a staging folder of a third is left alone, too."""
    out, found, own = tmp_path / "cache", [], list[str]()
    with ExitStack() as stack:
        other, third = Leases(out), Leases(out)

        def published() -> set[str]:
            passing = ("leases/", f"{STAGING}/{own[0]}/manifest/" if own else "leases/")
            return {name for name in comparable_tree(out) if not name.startswith(passing)}

        def meanwhile() -> None:
            own.extend(path.name for path in out.glob(f"{STAGING}/*"))
            stack.enter_context(other)
            stack.enter_context(third)
            assert other.take(COORDINATOR)
            third.staging.mkdir(parents=True)
            (third.staging / "staged").touch()
            found.append(published())

        pause(stage_one, name, 1, meanwhile)
        with pytest.raises(OutputError, match="was taken over"):
            run(place, out)
        assert published() == found[0]


@pytest.mark.parametrize("module", [deleting, repair], ids=["delete", "repair"])
def test_who_changes_a_finished_cache_first_takes_their_licence_from_the_dead(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: Any
) -> None:
    out = shutil.copytree(place / "whole", tmp_path / "cache")
    sleeper = commit.BlockWriter(out)
    name = "write_shard" if module is deleting else "verify_idle"
    real, seen = getattr(module, name), []

    def looking(*arguments: Any, **more: Any) -> Any:
        seen.append((out / ".staging" / sleeper.attempt).exists())
        return real(*arguments, **more)

    monkeypatch.setattr(module, name, looking)
    if module is deleting:
        delete(out, [DELETED])
    else:
        run(place, out, repair=True)
    assert set(seen) == {False}


def test_a_process_that_is_stopped_and_continued(place: Path, tmp_path: Path) -> None:
    """By the real signals; instead of waiting for its leases to expire they are made to be old."""
    out = tmp_path / "cache"
    process = start_command(*small_flags(place / "corpus", place / "base", out))
    try:
        deadline = time.monotonic() + 300
        while not list(out.glob("commits/*/*.json")):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.001)
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
        for beat in out.glob("leases/writers/*.json"):
            os.utime(beat, (1, 1))
        run(place, out)
        whole = comparable_tree(place / "whole")
        assert comparable_tree(out) == whole
    finally:
        process.send_signal(signal.SIGCONT)
    said = process.communicate(timeout=300)[1]
    message = said.splitlines()[-1]
    assert process.returncode in (0, 1), said
    assert process.returncode == 0 or "was taken over by another process" in message
    assert "Traceback" not in said
    assert comparable_tree(out) == whole
    run(place, out)
    assert nothing_is_left(out)
