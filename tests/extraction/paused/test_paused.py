"""A process that is suspended past the expiry of its leases harms nothing when it wakes up."""

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
from support.fixtures_paused import DELETED, Pause, finishes, nothing_is_left, repaired, run
from support.stopping import KilledError, killed

import embedcache.editing.delete as deleting
from embedcache.cache.blocks import commit
from embedcache.cache.format.layout import SPLITS
from embedcache.cache.tokens import writer as seal
from embedcache.cache.verify import verify
from embedcache.editing import edit, repair
from embedcache.editing.delete import delete
from embedcache.errors import OutputError
from embedcache.extraction import plan, prepare, publish
from embedcache.extraction import run as stage_one
from embedcache.extraction.request import Request
from embedcache.store import transaction as rewrite
from embedcache.store.files import STAGING
from embedcache.store.lease import COORDINATOR, Leases

pytestmark = pytest.mark.usefixtures("without_trial")

STEPS = [
    pytest.param(plan, "tokenise", 1, id="pass 0 begins"),
    pytest.param(Path, "rename", 4, id="splits are in place"),
    pytest.param(prepare, "run_trial", 1, id="the base is loaded"),
    pytest.param(prepare, "store_calibrations", 1, id="the base is in place"),
    pytest.param(commit, "chunks_crc32c", 2, id="a block is staged"),
    pytest.param(commit, "promote", 2, id="a marker is linked"),
    pytest.param(publish, "split_manifest", 1, id="all blocks are committed"),
    pytest.param(publish, "fsync_path", 6, id="the digest tables are in place"),
    pytest.param(stage_one, "clear_staging", 2, id="the manifest is in place"),
]
MORE_STEPS = [
    pytest.param(seal, "fsync_tree", 1, id="pass 0 is staged"),
    pytest.param(seal, "publish_digests", 1, id="pass 0 is to be moved into place"),
    pytest.param(Path, "rename", 2, id="a split of pass 0 is in place"),
    pytest.param(Path, "rename", 5, id="the digests of pass 0 are in place"),
    pytest.param(stage_one, "drop_superseded", 1, id="pass 0 is complete"),
    pytest.param(prepare, "fsync_tree", 1, id="the base is staged"),
    pytest.param(stage_one, "BlockEncoder", 1, id="blocks are to be leased"),
    pytest.param(commit, "write_shard", 2, id="a block is to be staged"),
    pytest.param(commit, "make_folder", 3, id="a marker is to be linked"),
    pytest.param(publish, "publish_manifest", 1, id="the manifest is to be staged"),
    pytest.param(publish, "fsync_path", 1, id="a digest table is in place"),
    pytest.param(publish, "fsync_path", 7, id="the manifest is being published"),
]
ALL_STEPS = [
    *STEPS,
    *(pytest.param(*step.values, id=step.id, marks=pytest.mark.slow) for step in MORE_STEPS),
]


@pytest.mark.parametrize(("module", "name", "call"), ALL_STEPS)
def test_others_finish_the_work_of_a_suspended_process(
    place: Path, tmp_path: Path, pause: Pause, module: Any, name: str, call: int
) -> None:
    out = tmp_path / "cache"
    pause(module, name, call, lambda: run(place, out))
    finishes(run, place, out)
    assert comparable_tree(out) == comparable_tree(place / "whole")
    assert finishes(run, place, out)
    assert comparable_tree(out) == comparable_tree(place / "whole")
    assert nothing_is_left(out)


@pytest.mark.parametrize(
    ("module", "name", "call"),
    [
        pytest.param(*s.values, id=s.id, marks=() if s in STEPS[3::2] else pytest.mark.slow)
        for s in [*STEPS, *MORE_STEPS]
    ],
)
def test_documents_deleted_meanwhile_do_not_come_back(
    place: Path, tmp_path: Path, pause: Pause, module: Any, name: str, call: int
) -> None:
    out = tmp_path / "cache"

    def meanwhile() -> None:
        run(place, out)
        delete(out, [DELETED])

    pause(module, name, call, meanwhile)
    finishes(run, place, out)
    assert verify(out, deep=True).faults == ()
    assert contents(out) == contents(place / "deleted")
    assert nothing_is_left(out)


@pytest.mark.slow
@pytest.mark.parametrize(("module", "name", "call"), ALL_STEPS)
def test_a_suspended_process_wakes_up_after_its_successor_died(
    place: Path, tmp_path: Path, pause: Pause, module: Any, name: str, call: int
) -> None:
    """The process that took over cleared up, began anew and died."""
    out = tmp_path / "cache"

    def meanwhile() -> None:
        with pytest.MonkeyPatch.context() as patch, suppress(KilledError):
            patch.setattr(Request, "load_base", killed)
            run(place, out)

    pause(module, name, call, meanwhile)
    if not finishes(run, place, out):
        assert finishes(run, place, out)
    assert comparable_tree(out) == comparable_tree(place / "whole")
    assert nothing_is_left(out)


REPAIRING = [
    pytest.param(repair, "verify_idle", 1, id="damage is looked for"),
    pytest.param(repair, "newest_generations", 2, id="markers are renewed"),
    pytest.param(repair.shutil, "rmtree", 1, id="the base is to be dropped"),
    pytest.param(repair, "fsync_path", 1, id="the manifest is dropped"),
    pytest.param(prepare, "fsync_tree", 1, id="the base is staged"),
    pytest.param(commit, "promote", 1, id="a marker is linked"),
    pytest.param(publish, "publish_manifest", 1, id="the manifest is to be published"),
    pytest.param(publish, "publish_manifest", 2, id="the manifest is to be amended"),
]


@pytest.mark.parametrize(("module", "name", "call"), REPAIRING)
@pytest.mark.parametrize(
    "others", [pytest.param("repair", marks=pytest.mark.slow), "repair and delete"]
)
def test_a_suspended_repair_undoes_no_other_change(
    place: Path, tmp_path: Path, pause: Pause, others: str, module: Any, name: str, call: int
) -> None:
    out = shutil.copytree(place / "whole", tmp_path / "cache")
    for damaged in ("train/embeddings/final/c/1/0", "base/head/weight/c/0/0"):
        (out / damaged).unlink()
    (out / "commits/train/00000002.0.json").unlink()

    def meanwhile() -> None:
        repaired(place, out)
        if "delete" in others:
            delete(out, [DELETED])

    pause(module, name, call, meanwhile)
    finishes(repaired, place, out)
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
def test_a_suspended_deletion_mixes_with_no_other(
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


def test_a_deletion_is_not_committed_while_another_process_coordinates(
    place: Path, tmp_path: Path, pause: Pause
) -> None:
    """The other process is still reading the cache, which must not change meanwhile."""
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


@pytest.mark.parametrize(
    ("module", "name"),
    [(stage_one, "SplitTokens"), (prepare, "run_trial"), (publish, "publish_manifest")],
)
def test_an_extraction_changes_nothing_while_another_process_coordinates(
    place: Path, tmp_path: Path, pause: Pause, module: Any, name: str
) -> None:
    """The staging folder of a third process is left alone, too."""
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

        pause(module, name, 1, meanwhile)
        with pytest.raises(OutputError, match="was taken over"):
            run(place, out)
        assert published() == found[0]


@pytest.mark.parametrize("module", [deleting, repair], ids=["delete", "repair"])
def test_staging_folders_of_dead_processes_are_removed_before_a_change(
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
        repaired(place, out)
    assert set(seen) == {False}


def test_a_process_that_is_stopped_and_continued_by_signals(place: Path, tmp_path: Path) -> None:
    """With real signals. The leases are made old instead of waiting for their expiry."""
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
