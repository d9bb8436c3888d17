"""An append that is refused leaves the cache as it was."""

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
from embedcache.editing.repair import repair as repair_cache
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
    """A cache that has to be, at the end, byte for byte what it was."""
    before = every_byte(old)
    yield old
    assert every_byte(old) == before
    assert not (old / ".staging").exists()


def test_another_setting_base_or_dtype_is_refused(
    untouched: Path, more: Path, tmp_path: Path
) -> None:
    for required, message in (
        ({"codec": "bf16"}, r"`codec=` int8, .* found bf16\. Leave `codec=` out"),
        ({"taps": ("final",)}, r"`taps=` final,layer_1, .* found final"),
        ({"bits": 2.0}, r"`bits=` None, .* found 2.0"),
        ({"context": 128}, r"`context=` 64, .* found 128"),
    ):
        with pytest.raises(UsageError, match=message):
            added(untouched, more, settings=required)
    with pytest.raises(UsageError, match=r"`context=` 64, .* found 32"):
        append(untouched, corpus_config(more, context=32))
    with pytest.raises(UsageError, match=r"`min_token=` .*Did you mean 'min_tokens'"):
        added(untouched, more, min_token=3)
    with pytest.raises(UsageError, match=r"`dtype=` float32, .* found bfloat16"):
        added(untouched, more, dtype="bfloat16")
    with pytest.raises(BaseModelError, match=r"no base at 'gone'.*its present place as `base=`"):
        added(untouched, more, base="gone")
    other = tiny_base_directory(tmp_path / "other", seed=1)
    with pytest.raises(IdentityError, match=r"the cache .* and `base=` .*differ in: weights"):
        added(untouched, more, base=str(other))


def test_a_corpus_that_cannot_be_read_is_refused(untouched: Path, tmp_path: Path) -> None:
    folder = write_documents(tmp_path / "bad", 3, seed=4)
    (folder / "zzz.txt").write_bytes(b"good to begin with \xff\xfe and then not")
    with pytest.raises(CorpusError):
        added(untouched, folder)
    with pytest.raises(CorpusError, match="nothing there"):
        added(untouched, tmp_path / "none")
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(CorpusError, match="Expected text"):
        added(untouched, tmp_path / "short.txt")


def test_an_append_is_refused_while_another_process_writes(untouched: Path, more: Path) -> None:
    with Leases(untouched) as other:
        assert other.take("turn")
        with pytest.raises(OutputError, match=r"append needs exclusive access.*process \d+"):
            added(untouched, more)


def test_other_edits_are_refused_during_an_append(
    old: Path, more: Path, corpus: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused: list[str] = []

    def trying(*arguments: Any, **named: Any) -> Any:
        for edit in (
            lambda: added(old, more),
            lambda: delete(old, ["000.txt"]),
            lambda: repair_cache(
                old,
                corpus_config(corpus),
                base=str(tiny_base),
                settings=Cache(old).attributes.settings,
                device="cpu",
            ),
        ):
            with pytest.raises(OutputError, match="exclusive access") as caught:
                edit()
            refused.append(str(caught.value).split()[0])
        return extract(*arguments, **named)

    monkeypatch.setattr(verb, "extract", trying)
    added(old, more)
    assert refused == ["append", "delete", "repair"]
    assert verify(old, deep=True).faults == ()


def test_an_unfinished_cache_and_no_cache_are_refused(
    old: Path, more: Path, tmp_path: Path
) -> None:
    with pytest.raises(CacheError, match="no such cache"):
        added(tmp_path / "none", more)
    assert not (tmp_path / "none").exists()
    (old / "manifest.json").unlink()
    with pytest.raises(CacheError, match="is not complete"):
        added(old, more)


def test_a_damaged_digest_table_is_refused(old: Path, more: Path) -> None:
    before = every_byte(old)
    for name in ("tokens", "embeddings"):
        path = f"digests/train/{name}"
        flip_byte(old / path)
        with pytest.raises(
            CacheError, match=rf"{path} .*the cache is damaged.*`embedcache\.repair\(\)`"
        ):
            added(old, more)
        after = {k: data for k, data in every_byte(old).items() if not k.startswith(".staging/")}
        assert [key for key in before if after[key] != before[key]] == [path]
        assert after.keys() == before.keys()
        flip_byte(old / path)


class StoppedError(Exception):
    """Stands for a computer that is switched off during the extraction."""


def begin(cache: Path, more: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave an append of ``more`` half done."""

    def stopped(*_: Any, **__: Any) -> None:
        raise StoppedError

    with monkeypatch.context() as patch:
        patch.setattr("embedcache.extraction.pipeline.BlockWriter.commit", stopped)
        with pytest.raises(StoppedError):
            added(cache, more)


def test_an_unfinished_append_is_resumed_and_another_is_refused(
    old: Path, more: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(old)
    begin(old, more, monkeypatch)
    assert contents(old) == before
    with pytest.raises(
        OutputError, match=r"the unfinished append .*first call again.*or remove"
    ) as e:
        added(old, write_documents(tmp_path / "new", 2, seed=5))
    assert str(more) in str(e.value)
    reads: list[Any] = []
    monkeypatch.setattr(verb, "write_tokens", lambda *a, **k: reads.append(a))
    assert sum(added(old, more).documents.values()) == 9
    assert not reads  # the first call has written the tokens


def test_an_unfinished_append_begins_anew_if_the_cache_was_edited_since(
    old: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, gone = write_documents(tmp_path / "new", 3, seed=5), names(old, "train")[0]
    shutil.copy(corpus / gone, folder / "once-more.txt")
    begin(old, folder, monkeypatch)
    staged = shutil.copytree(old / ".staging/append", tmp_path / "staged")
    delete(old, [gone])
    assert not (old / ".staging").exists()
    shutil.copytree(staged, old / ".staging/append")
    summary = added(old, folder)
    assert (sum(summary.documents.values()), summary.already_there) == (4, 0)
    assert verify(old, deep=True).faults == ()


def test_new_blocks_that_are_damaged_are_not_added(
    old: Path, more: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(old)

    def damaging(*arguments: Any, **named: Any) -> Any:
        done = extract(*arguments, **named)
        flip_byte(named["out"] / "train/embeddings/final/c/0/0")
        return done

    monkeypatch.setattr(verb, "extract", damaging)
    with pytest.raises(CacheError, match=r"Nothing was added\. Remove the folder (\S*) and run"):
        added(old, more)
    assert contents(old) == before
