"""A disk that is full or read-only: one clear message, nothing lost, and the same call goes on."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conftest import World
from support.cache_contents import contents, names
from support.cache_faults import served
from support.failing_disk import failing_disk
from support.fixtures_extract import (
    call_main,
    comparable_tree,
    content,
    corpus_config,
    small_flags,
    small_settings,
    write_documents,
)
from support.tiny import tiny_base_directory

from embedcache.cache.blocks.commit import committed_blocks
from embedcache.cache.format.layout import SPLITS
from embedcache.carryon.branch.config import BranchConfig
from embedcache.carryon.saving import CONFIG_FILE, WEIGHTS_FILE
from embedcache.editing.delete import delete
from embedcache.editing.merge import merge
from embedcache.editing.repair import repair as repair_cache
from embedcache.errors import CacheError, OutputError
from embedcache.extraction.extract import extract
from embedcache.store.files import translate_write_errors
from embedcache.training.config import TrainConfig
from embedcache.training.run import run as run_module
from embedcache.training.train import train

MESSAGES = {
    errno.ENOSPC: r"expected room on the disk of .*, found .* free .*run the same call again",
    errno.EROFS: r"expected permission to write .*Read-only file system.*run the same call again",
}
SHORT = TrainConfig(
    carryon=BranchConfig(width=32, blocks=1), epochs=2, batch_tokens=512, samples=50
)
GONE = "000.txt"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, session_home: None) -> Path:
    """A base, a corpus of some six blocks, and their cache."""
    root = tmp_path_factory.mktemp("full")
    tiny_base_directory(root / "base")
    write_documents(root / "corpus", 6, words=100)
    write_documents(root / "other", 4, words=100, seed=1)
    for source, codec in (("corpus", "bf16"), ("corpus", "transform"), ("other", "bf16")):
        run_extract(root, root / f"{source}-{codec}", source=source, codec=codec)
    return root


def run_extract(place: Path, out: Path, source: str = "corpus", **settings: Any) -> Any:
    return extract(
        corpus_config(place / source),
        base=str(place / "base"),
        out=out,
        settings=small_settings(**settings),
        device="cpu",
    )


@dataclass(frozen=True)
class Job:
    """A job: its input, what it does, its result, and what must hold after it failed."""

    begin: Callable[[Path], object]
    run: Callable[[Path], object]
    result: Callable[[Path], object]
    stopped: Callable[[Path], bool]


def damaged(place: Path, out: Path) -> None:
    shutil.copytree(place / "corpus-bf16", out)
    for name in ("train/embeddings/final/c/0/0", "base/head/weight/c/0/0", "dev/zarr.json"):
        (out / name).unlink()
    (out / "train/tokens/ids/c/1").write_bytes(b"")
    (out / "commits/train/00000001.0.json").unlink()


def repair(place: Path, out: Path) -> None:
    repair_cache(
        out,
        corpus_config(place / "corpus"),
        base=str(place / "base"),
        settings=small_settings(),
        device="cpu",
    )


def as_before_or_refused(place: Path, out: Path) -> bool:
    """Whether a reader gets the old content or the new, or is refused."""
    try:
        return served(out) in (served(place / "corpus-bf16"), deleted(place))
    except CacheError:
        return True


def deleted(place: Path) -> dict[str, bytes]:
    without = place / "deleted"
    if not without.exists():
        shutil.copytree(place / "corpus-bf16", without)
        delete(without, [GONE])
    return served(without)


def no_half_file(out: Path) -> bool:
    return not list(out.rglob("*.partial"))


def resumable(place: Path, out: Path) -> bool:
    """Whether the files of every committed block exist."""
    if not (out / "zarr.json").is_file():
        return not out.exists()
    marked = [path for split in SPLITS for path in committed_blocks(out, split).values()]
    files = [record["path"] for path in marked for record in json.loads(path.read_text())["files"]]
    staged = [path.as_posix() for path in out.glob(".staging/*/**/*") if path.is_file()]
    return no_half_file(out) and all(
        (out / name).is_file() or any(path.endswith(name) for path in staged) for name in files
    )


def weights(out: Path) -> tuple[bytes, Any]:
    record = json.loads((out / CONFIG_FILE).read_text())
    timed = ("out", "seconds", "tokens_per_second", "data_wait", "resumed_at_step")
    results = {key: value for key, value in record["results"].items() if key not in timed}
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md",
        WEIGHTS_FILE,
        CONFIG_FILE,
        "loss.png",
        "metrics.jsonl",
    ]
    return (out / WEIGHTS_FILE).read_bytes(), results


@pytest.fixture
def job(
    request: pytest.FixtureRequest, place: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> Job:
    def nothing(out: Path) -> None:
        pass

    match request.param:
        case "extract" | "extract transform" as name:
            codec = name.removeprefix("extract").strip() or "bf16"
            run = partial(run_extract, place, codec=codec)
            return Job(nothing, run, comparable_tree, partial(resumable, place))
        case "repair":
            return Job(partial(damaged, place), partial(repair, place), content, no_half_file)
        case "delete":
            begin = partial(shutil.copytree, place / "corpus-bf16")
            assert GONE in names(place / "corpus-bf16", "train")
            return Job(
                begin,
                lambda out: GONE in names_or_none(out) and delete(out, [GONE]),
                contents,
                partial(as_before_or_refused, place),
            )
        case "merge":
            parts = [place / "corpus-bf16", place / "other-bf16"]
            return Job(
                nothing,
                lambda out: merge(parts, out),
                contents,
                lambda out: not out.exists(),
            )
        case "train":
            monkeypatch.setattr(run_module, "CHECKPOINT_SECONDS", 0.0)
            return Job(
                nothing,
                lambda out: train(world.cache_path, out=out, config=SHORT, device="cpu"),
                weights,
                no_half_file,
            )
    raise AssertionError


def names_or_none(out: Path) -> list[str]:
    """Return the train documents; if a deletion is unfinished, the one that is deleted."""
    try:
        return names(out, "train")
    except CacheError:
        return [GONE]


JOBS = [
    "extract",
    pytest.param("extract transform", marks=pytest.mark.slow),
    "repair",
    "delete",
    "merge",
    "train",
]
FEW, MANY = 3, 90


@pytest.mark.parametrize("job", JOBS, indirect=True)
@pytest.mark.parametrize(
    "code",
    [errno.ENOSPC, pytest.param(errno.EROFS, marks=pytest.mark.slow)],
    ids=errno.errorcode.get,
)
@pytest.mark.parametrize(
    "moments", [FEW, pytest.param(MANY, marks=pytest.mark.slow)], ids=["few steps", "many steps"]
)
def test_a_job_that_the_disk_stopped_says_so_and_goes_on(
    job: Job, tmp_path: Path, code: int, moments: int
) -> None:
    whole = tmp_path / "disk/whole"
    (tmp_path / "disk").mkdir()
    job.begin(whole)
    with failing_disk(tmp_path / "disk") as counted:
        job.run(whole)
    expected, failed = job.result(whole), 0
    for step in range(1, counted.steps, max(1, counted.steps // moments)):
        out = tmp_path / "disk/out"
        job.begin(out)
        try:
            with failing_disk(tmp_path / "disk", step, code):
                job.run(out)
        except OutputError as error:
            failed += 1
            assert len(str(error).splitlines()) == 1
            with pytest.raises(OutputError, match=MESSAGES[code]):
                raise
        for beat in out.glob("leases/writers/*"):  # that process has ended
            os.utime(beat, (1, 1))
        if code == errno.ENOSPC and not finished(job, out):
            assert job.stopped(out), step
        if not finished(job, out):
            job.run(out)
        assert job.result(out) == expected, step
        shutil.rmtree(out)
    assert failed >= min(moments, counted.steps) - 2


def finished(job: Job, out: Path) -> bool:
    """Whether a merge or a training is finished: its result exists."""
    return (out / CONFIG_FILE).is_file() or (
        (out / "manifest.json").is_file() and "parts" in (out / "zarr.json").read_text()
    )


MOUNTED = """
import json, subprocess, sys
from support.forked import ForkedCommand
disk, small, arguments = sys.argv[1], sys.argv[2], sys.argv[3:]
def mount(options, *more):
    subprocess.run(["mount", *more, "-o", options, disk], check=True)
def run():
    command = ForkedCommand(*arguments)
    said = command.communicate()[1]
    return command.returncode, said
mount(f"size={small}", "-t", "tmpfs", "tmpfs")
said = [run()]
mount("remount,size=64m")
mount("remount,ro")
said.append(run())
mount("remount,rw")
said.append(run())
print(json.dumps(said))
subprocess.run(["cp", "-r", f"{disk}/cache", f"{disk}.kept"], check=True)
"""


def mountable() -> list[str]:
    """Return a command prefix that runs in a mount namespace of its own, or skip."""
    for flags in (["-m"], ["-rm"]):
        command = ["unshare", *flags, "sh", "-c", "mount -t tmpfs -o size=1m tmpfs /mnt"]
        if shutil.which("unshare") and subprocess.run(command, capture_output=True).returncode == 0:
            return ["unshare", *flags]
    pytest.skip("mounting is not permitted here")


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.3, 0.8])
def test_a_real_disk_that_is_too_small_then_read_only_then_neither(
    place: Path, tmp_path: Path, share: float
) -> None:
    """A tmpfs that holds ``share`` of the finished cache."""
    disk = tmp_path / "disk"
    disk.mkdir()
    files = [p for p in (place / "corpus-bf16").rglob("*") if p.is_file()]
    pages = [-(-p.stat().st_size // 4096) for p in files]
    done = subprocess.run(
        [
            *mountable(),
            *(sys.executable, "-c", MOUNTED, str(disk), str(int(share * 4096 * sum(pages)))),
            *small_flags(place / "corpus", place / "base", disk / "cache"),
        ],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent.parent), *sys.path]),
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (full, said_full), (closed, said_closed), (last, said_last) = json.loads(done.stdout)
    for said in (said_full, said_closed):
        message = said.splitlines()[-1]
        assert message.startswith("embedcache: ")
        assert said.count("embedcache: ") == 1
        assert "Traceback" not in said
    assert (full, closed, last) == (1, 1, 0), said_last
    assert "expected room on the disk" in said_full or "GB free: give another --out" in said_full
    assert "Read-only file system" in said_closed
    assert comparable_tree(Path(f"{disk}.kept")) == comparable_tree(place / "corpus-bf16")


def test_the_command_prints_one_line_and_exits_with_1(
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "disk/cache"
    (tmp_path / "disk").mkdir()
    flags = small_flags(place / "corpus", place / "base", out)
    for step, code in ((300, errno.ENOSPC), (1, errno.EROFS)):
        with failing_disk(tmp_path / "disk", step, code):
            assert call_main(monkeypatch, *flags) == 1
        shown = capsys.readouterr()
        assert shown.out == ""
        (line,) = [text for text in shown.err.splitlines() if not text.endswith("disk free")]
        assert line.startswith("embedcache: expected ")
        assert "run the same command again" in line


def test_a_folder_without_write_permission(place: Path, tmp_path: Path) -> None:
    """Root may write everywhere, so this runs only for other users."""
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    if os.access(closed, os.W_OK):
        pytest.skip("root may write everywhere")
    with pytest.raises(OutputError, match=r"expected permission to write .*Permission denied"):
        run_extract(place, closed / "cache")


@pytest.mark.parametrize(
    ("path", "code"), [("corpus/a.txt", errno.EACCES), ("disk/cache/x", errno.EIO), (None, None)]
)
def test_errors_of_another_kind_or_place_pass_unchanged(
    tmp_path: Path, path: str | None, code: int | None
) -> None:
    error = OSError("a socket") if code is None else OSError(code, "so", str(tmp_path / str(path)))
    with (
        pytest.raises(OSError, match=r"so|a socket") as told,
        translate_write_errors(tmp_path / "disk/cache"),
    ):
        raise error
    assert told.value is error
