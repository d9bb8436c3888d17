"""Several processes extract into one cache; the result is that of a single process."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from support.fixtures_extract import (
    comparable_tree,
    corpus_config,
    extract_small,
    small_flags,
    small_settings,
    write_documents,
)
from support.forked import FORKS, ForkedCommand
from support.tiny import tiny_base_directory

from embedcache.base.forward import BlockForward
from embedcache.editing.repair import repair
from embedcache.errors import OutputError
from embedcache.extraction import prepare
from embedcache.extraction.estimate import Trial
from embedcache.extraction.extract import ExtractSummary, extract
from embedcache.extraction.request import Request
from embedcache.store.lease import Leases, lease_name


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, session_home: None) -> Path:
    """A base, a corpus of about fifty blocks, and the cache that one process makes of it."""
    root = tmp_path_factory.mktemp("writers")
    tiny_base_directory(root / "base")
    write_documents(root / "corpus", 50, words=150)
    run(root, root / "alone")
    return root


def run(place: Path, out: Path, **more: Any) -> ExtractSummary:
    return extract(
        corpus_config(place / "corpus"),
        base=str(place / "base"),
        out=out,
        settings=small_settings(),
        device="cpu",
        dtype="float32",  # as in this process, so in those it starts
        **more,
    )


def start(place: Path, out: Path) -> ForkedCommand:
    return ForkedCommand(*small_flags(place / "corpus", place / "base", out), "--json")


def finished(process: ForkedCommand) -> dict[str, Any]:
    printed, said = process.communicate()
    assert process.returncode == 0, said
    found: dict[str, Any] = json.loads(printed)
    return found


def wait_for(ready: Callable[[], bool], process: ForkedCommand) -> None:
    deadline = time.monotonic() + 60
    while not ready():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)


def markers(out: Path) -> int:
    return sum(1 for _ in out.glob("commits/*/*.json"))


def attempts(out: Path) -> set[str]:
    return {json.loads(path.read_text())["attempt"] for path in out.glob("commits/*/*.json")}


def extract_after_all_have_claimed(place: Path, out: Path, meeting: Any, answers: Any) -> None:
    """Extract, but compute no block before every process at the ``meeting`` has leased one."""

    class Patient(BlockForward):
        met = False

        def __call__(self, *arguments: Any) -> Any:
            if not self.met:
                self.met = True
                meeting.wait(120)
            return super().__call__(*arguments)

    # Measuring, too, would compute: before anything is claimed.
    vars(prepare).update(BlockForward=Patient, run_trial=lambda *_, **__: Trial())
    answers.put(asdict(run(place, out)))


def test_three_processes_share_the_blocks_of_one_cache(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "cache"
    meeting, answers = FORKS.Barrier(3), FORKS.Queue()
    processes = [
        FORKS.Process(
            target=extract_after_all_have_claimed, args=(place, out, meeting, answers), daemon=True
        )
        for _ in range(3)
    ]
    for process in processes:
        process.start()
    found = [answers.get(timeout=180) for _ in processes]
    for process in processes:
        process.join()
    assert comparable_tree(out) == comparable_tree(place / "alone")
    assert not {"leases", ".staging"} & {path.name for path in out.iterdir()}
    computed = [summary["computed_blocks"] for summary in found]
    assert min(computed) >= 1
    assert sum(computed) == found[0]["blocks"] > 30
    assert len(attempts(out)) == 3
    for summary in found:
        shares = ("resumed_blocks", "computed_blocks", "others_blocks")
        assert sum(summary[share] for share in shares) == summary["blocks"]


def test_others_finish_what_a_killed_process_began(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "cache"
    victim, other = start(place, out), start(place, out)
    wait_for(lambda: markers(out) >= 8, victim)
    victim.kill()
    victim.communicate()
    assert not (out / "manifest.json").exists()
    assert finished(other)["blocks"] > 30
    assert comparable_tree(out) == comparable_tree(place / "alone")
    assert not {"leases", ".staging"} & {path.name for path in out.iterdir()}


def test_a_late_process_changes_nothing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_base(*_: Any, **__: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(Request, "load_base", load_base)
    before = comparable_tree(place / "alone")
    summary = run(place, place / "alone")
    assert (summary.computed_blocks, summary.others_blocks) == (0, 0)
    assert comparable_tree(place / "alone") == before


def test_a_late_process_clears_up_after_one_killed_at_the_end(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    shutil.copytree(place / "alone", out)
    left = out / ".staging" / "0123abcd" / "manifest" / "manifest.json"
    left.parent.mkdir(parents=True)
    left.write_text("{}")
    run(place, out)
    assert not left.parents[2].exists()
    assert comparable_tree(out) == comparable_tree(place / "alone")
    left.parents[1].mkdir(parents=True)  # one was killed when its manifest had been moved
    run(place, out)
    assert not left.parents[2].exists()
    # What an append or a repair that was killed has staged is not its own to remove.
    staged = [out / ".staging" / name for name in ("append/zarr.json", "89ef/train/embeddings/0")]
    for path in (left, *staged):
        path.parent.mkdir(parents=True)
        path.write_text("{}")
    run(place, out)
    assert not left.exists()
    assert all(path.is_file() for path in staged)


def test_repair_refuses_while_another_writes(place: Path, tmp_path: Path) -> None:
    with (
        Leases(place / "alone") as other,
        pytest.raises(OutputError, match=r"repair needs exclusive access"),
    ):
        other.take(lease_name("train", 0))
        repair(place / "alone", base=place / "base")


def killed_and_resumed(place: Path, folder: Path, times: int, seed: int) -> None:
    """Kill extractions at random moments; each finished cache must equal an undisturbed one."""
    draw, killed, finished = random.Random(seed), 0, 0
    while killed < times:
        out = folder / str(finished)
        process = FORKS.Process(target=extract_small, args=(place, out))
        process.start()
        if draw.random() < 0.7:  # among the blocks; else anywhere, mostly in what comes before
            before = markers(out)
            while process.is_alive() and markers(out) == before:
                time.sleep(0.001)
            time.sleep(draw.uniform(0, 0.1))
        else:
            time.sleep(draw.uniform(0, 1.5))
        process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
        if process.exitcode != -signal.SIGKILL or killed == times:
            extract_small(place, out)
            assert comparable_tree(out) == comparable_tree(place / "alone")
            assert not {"leases", ".staging"} & {path.name for path in out.iterdir()}
            finished += 1
        assert finished <= 3 * times


def test_an_extraction_killed_six_times_gives_the_same_cache(place: Path, tmp_path: Path) -> None:
    killed_and_resumed(place, tmp_path, 6, seed=0)


@pytest.mark.slow
def test_an_extraction_killed_fifty_times_gives_the_same_cache(place: Path, tmp_path: Path) -> None:
    killed_and_resumed(place, tmp_path, 50, seed=1)
