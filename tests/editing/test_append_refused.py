"""What cannot be added is refused, and leaves the cache byte for byte as it was."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.cache_contents import contents, names
from support.fixtures_append import added, every_byte
from support.fixtures_extract import corpus_config, flip_byte, write_documents
from support.tiny import tiny_base_directory

import embedcache.editing.append as verb
from embedcache.cache.cache import Cache
from embedcache.cache.verify import verify
from embedcache.editing.append import append
from embedcache.editing.delete import delete
from embedcache.errors import (
    BaseModelError,
    CacheError,
    CorpusError,
    IdentityError,
    OutputError,
    UsageError,
)
from embedcache.extraction.extract import extract
from embedcache.store.lease import Leases


@pytest.fixture
def untouched(old: Path) -> Iterator[Path]:
    """A cache that must be, in the end, byte for byte what it was."""
    before = every_byte(old)
    yield old
    assert every_byte(old) == before
    assert not (old / ".staging").exists()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"codec": "bf16"}, "--codec int8, .* found --codec bf16. Leave --codec out"),
        ({"taps": ("final",)}, "--taps final,layer_1, .* found --taps final"),
        ({"context": 128}, "--context 64, .* found --context 128"),
        ({"block_tokens": 512}, "--block-tokens 256, .* found --block-tokens 512"),
        ({"bits": 2.0}, "--bits left out, .* found --bits 2.0"),
    ],
)
def test_another_setting_is_refused_with_both(
    untouched: Path, more: Path, asked: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        added(untouched, more, settings=asked)


def test_another_context_base_or_type_is_refused(
    untouched: Path, more: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"--context 64, .* found --context 32"):
        append(corpus_config(more, context=32), out=untouched)
    with pytest.raises(UsageError, match=r"computed in float32, .* found --dtype bfloat16"):
        append(corpus_config(more), out=untouched, dtype="bfloat16")
    with pytest.raises(BaseModelError, match=r"no base at 'gone'.*--base with where it is now"):
        added(untouched, more, base="gone")
    other = tiny_base_directory(tmp_path / "other", seed=1)
    with pytest.raises(IdentityError, match=r"the cache .* and --base .*differ in: weights"):
        added(untouched, more, base=str(other))


def test_bad_input_leaves_the_cache_as_it_was(untouched: Path, tmp_path: Path) -> None:
    folder = write_documents(tmp_path / "bad", 3, seed=4)
    (folder / "zzz.txt").write_bytes(b"good to begin with \xff\xfe and then not")
    with pytest.raises(CorpusError):
        added(untouched, folder)
    with pytest.raises(CorpusError, match="nothing there"):
        added(untouched, tmp_path / "none")
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(CorpusError, match="Expected text"):
        added(untouched, tmp_path / "short.txt")


def test_while_another_writes_it_is_refused(untouched: Path, more: Path) -> None:
    with Leases(untouched) as other:
        assert other.take("coordinator")
        with pytest.raises(OutputError, match=r"--append needs .* alone.*process \d+"):
            added(untouched, more)


def test_others_are_refused_meanwhile(
    old: Path, more: Path, corpus: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused: list[str] = []

    def trying(*arguments: Any, **named: Any) -> Any:
        for what in (
            lambda: added(old, more),
            lambda: delete(old, ["000.txt"]),
            lambda: extract(
                corpus_config(corpus),
                base=str(tiny_base),
                out=old,
                settings=Cache(old).attributes.settings,
                device="cpu",
                repair=True,
            ),
        ):
            with pytest.raises(OutputError, match="alone, and it is being written by") as caught:
                what()
            refused.append(str(caught.value).split()[0])
        return extract(*arguments, **named)

    monkeypatch.setattr(verb, "extract", trying)
    added(old, more)
    assert refused == ["--append", "delete", "--repair"]
    assert verify(old, deep=True).faults == ()


def test_an_unfinished_cache_or_none_is_refused(old: Path, more: Path, tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="no such cache"):
        append(corpus_config(more), out=tmp_path / "none")
    assert not (tmp_path / "none").exists()
    (old / "manifest.json").unlink()
    with pytest.raises(CacheError, match="is not complete"):
        added(old, more)


class StoppedError(Exception):
    """Stands for a computer that was switched off while it computed."""


def begin(cache: Path, more: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave an append of ``more`` half done."""

    def stopped(*_: Any, **__: Any) -> None:
        raise StoppedError

    with monkeypatch.context() as patch:
        patch.setattr("embedcache.extraction.pipeline.BlockWriter.commit", stopped)
        with pytest.raises(StoppedError):
            added(cache, more)


def test_one_that_was_begun_goes_on_or_is_dropped(
    old: Path, more: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(old)
    begin(old, more, monkeypatch)
    assert contents(old) == before
    with pytest.raises(OutputError, match=r"append of .* begun and is not finished.*rm -r") as told:
        added(old, write_documents(tmp_path / "new", 2, seed=5))
    assert str(more) in str(told.value)
    reads: list[Any] = []
    monkeypatch.setattr(verb, "write_tokens", lambda *a, **k: reads.append(a))
    assert sum(added(old, more).documents.values()) == 9
    assert not reads  # tokens were sealed the first time


def test_one_that_was_begun_on_what_the_cache_was_begins_anew(
    old: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, gone = write_documents(tmp_path / "new", 3, seed=5), names(old, "train")[0]
    shutil.copy(corpus / gone, folder / "once-more.txt")
    begin(old, folder, monkeypatch)
    staged = shutil.copytree(old / ".staging/append", tmp_path / "staged")
    delete(old, [gone])
    assert not (old / ".staging").exists()
    shutil.copytree(staged, old / ".staging/append")
    told = added(old, folder)
    assert (sum(told.documents.values()), told.already_there) == (4, 0)
    assert verify(old, deep=True).faults == ()


def test_new_blocks_that_were_damaged_meanwhile_are_not_added(
    old: Path, more: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(old)

    def damaging(*arguments: Any, **named: Any) -> Any:
        done = extract(*arguments, **named)
        flip_byte(named["out"] / "train/embeddings/final/c/0/0")
        return done

    with monkeypatch.context() as patch:
        patch.setattr(verb, "extract", damaging)
        with pytest.raises(CacheError, match=r"nothing was added. Type: rm -r (\S*), then") as told:
            added(old, more)
    assert contents(old) == before
    shutil.rmtree(str(told.value).split("rm -r ")[1].split(",")[0])
    assert sum(added(old, more).documents.values()) == 9
