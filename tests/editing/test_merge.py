"""A merged cache holds exactly the sequences of its parts."""

from __future__ import annotations

import shutil
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support.cache_contents import Content, contents, names
from support.digest_tables import files_of, put_aside, quarantined
from support.fixtures_extract import (
    call_main,
    comparable_tree,
    corpus_config,
    flip_byte,
    small_settings,
    write_documents,
)
from support.forked import die_at, run_forked

from embedcache.cache.blocks.commit import BlockWriter
from embedcache.cache.cache import Cache
from embedcache.cache.format.layout import SPLITS
from embedcache.cache.manifest.manifest import read_manifest
from embedcache.cache.verify import verify
from embedcache.editing.delete import delete
from embedcache.editing.merge import merge
from embedcache.errors import CacheError, EmbedcacheError, IdentityError, OutputError, UsageError
from embedcache.extraction.extract import extract
from embedcache.info import describe


def extracted(folder: Path, base: Path, out: Path, **changes: Any) -> Path:
    settings = small_settings(**{"codec": "int8", "taps": ("final", "layer_1")} | changes)
    extract(corpus_config(folder), base=str(base), out=out, settings=settings, device="cpu")
    return out


@pytest.fixture(scope="session")
def pairs(
    caches: dict[str, Path],
    tiny_base: Path,
    more: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, tuple[Path, Path]]:
    """Two int8 caches; two halves of one transform cache, which share its calibration."""
    root = tmp_path_factory.mktemp("pairs")
    found = {"int8": (caches["int8"], extracted(more, tiny_base, root / "int8"))}
    halves = [shutil.copytree(caches["transform"], root / half) for half in ("one", "two")]
    every = [name for split in SPLITS for name in names(halves[0], split)]
    for number, half in enumerate(halves):
        delete(half, every[number::2])
    found["transform"] = halves[0], halves[1]
    return found


def expected(one: Path, two: Path) -> Content:
    """Return the sequences of both caches, under their names in the merged cache."""
    first, second = contents(one), contents(two)
    taken = {name for _, name, _ in first}
    renamed = {
        (split, f"{name}@2" if name in taken else name, place): value
        for (split, name, place), value in second.items()
    }
    assert not first.keys() & renamed.keys()
    return first | renamed


@pytest.mark.parametrize("codec", ["int8", "transform"])
def test_the_merged_cache_holds_the_sequences_of_its_parts(
    pairs: dict[str, tuple[Path, Path]], codec: str, tmp_path: Path
) -> None:
    one, two = pairs[codec]
    before = [comparable_tree(path) for path in (one, two)]
    summary = merge([str(one), two], str(tmp_path / "both"))
    both = tmp_path / "both"
    assert contents(both) == expected(one, two)
    assert verify(both, deep=True).faults == ()
    assert [comparable_tree(path) for path in (one, two)] == before
    assert [path.name for path in tmp_path.iterdir()] == ["both"]
    opened = Cache(both)
    parts = [Cache(path) for path in (one, two)]
    for name in SPLITS:
        for key in ("sequences", "tokens", "targets", "documents", "blocks"):
            summed = sum(getattr(part.manifest.splits[name], key) for part in parts)
            assert getattr(opened.manifest.splits[name], key) == summed
        assert summary.tokens[name] == opened.manifest.splits[name].tokens
    corpora = opened.attributes.corpus["parts"]
    assert [part["config"] for part in corpora] == [p.attributes.corpus["config"] for p in parts]
    assert [part["manifest"] for part in corpora] == [part.manifest.hash for part in parts]
    assert describe(both)["complete"]
    gone = names(two, "train")[0]
    gone = f"{gone}@2" if any(gone in names(one, split) for split in SPLITS) else gone
    delete(both, [gone])
    assert contents(both) == {k: v for k, v in expected(one, two).items() if k[1] != gone}
    assert verify(both, deep=True).faults == ()


def test_three_caches_and_a_quarantined_sequence(
    pairs: dict[str, tuple[Path, Path]], tiny_base: Path, tmp_path: Path
) -> None:
    third = extracted(write_documents(tmp_path / "c", 6, seed=2), tiny_base, tmp_path / "third")
    one, two = (shutil.copytree(path, tmp_path / path.parent.name) for path in pairs["int8"])
    writer = BlockWriter(two)
    writer.renew("train", 0, files_of(two, "train")[0], quarantined=(0,), generation=1)
    writer.close()
    put_aside(two, "train", 0, (0,))
    merge([one, two], tmp_path / "both")
    merge([tmp_path / "both", third], tmp_path / "nested")
    merge([one, two, third], tmp_path / "all")
    assert contents(tmp_path / "nested") == contents(tmp_path / "all")
    assert len(contents(tmp_path / "all")) == sum(len(contents(p)) for p in (one, two, third))
    (number,) = quarantined(tmp_path / "all", "train")
    assert number == read_manifest(one).splits["train"].sequences
    assert verify(tmp_path / "all", deep=True).faults == ()
    assert len(Cache(tmp_path / "nested").attributes.corpus["parts"]) == 3


def test_a_document_of_two_caches_is_refused(caches: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"'\d+.txt' in .* trained on twice.*`embedcache.delete\(\)`"
    ):
        merge([caches["int8"], caches["int8"]], tmp_path / "both")
    assert not list(tmp_path.iterdir())


def test_a_document_of_train_and_test_is_refused_whatever_its_names(
    caches: dict[str, Path], corpus: Path, tiny_base: Path, tmp_path: Path
) -> None:
    tested = names(caches["int8"], "test")[0]
    folder = write_documents(tmp_path / "corpus", 3, seed=3)
    shutil.copy(corpus / tested, folder / "elsewhere.txt")
    other = tmp_path / "other"
    config = replace(corpus_config(folder), dev_fraction=0.0, test_fraction=0.0)
    settings = small_settings(codec="int8", taps=("final", "layer_1"))
    extract(config, base=str(tiny_base), out=other, settings=settings, device="cpu")
    with pytest.raises(
        UsageError, match=rf"'{tested}' in test of .*'elsewhere.txt' in train of .*was trained on"
    ):
        merge([caches["int8"], other], tmp_path / "both")
    delete(other, ["elsewhere.txt"])
    merge([caches["int8"], other], tmp_path / "both")


def test_incompatible_caches_are_refused(
    caches: dict[str, Path],
    pairs: dict[str, tuple[Path, Path]],
    more: Path,
    tiny_base: Path,
    tmp_path: Path,
) -> None:
    other = extracted(more, tiny_base, tmp_path / "other", codec="transform")
    longer = extracted(more, tiny_base, tmp_path / "longer", block_tokens=512)
    for pair, why in (
        ((caches["transform"], other), "different calibrations"),
        ((caches["int8"], caches["bf16"]), "the same `codec=`, found 'int8'"),
        ((caches["int8"], longer), "the same `block_tokens=`, found 256"),
    ):
        with pytest.raises(IdentityError, match=why):
            merge(pair, tmp_path / "both")
    with pytest.raises(UsageError, match="two or more caches"):
        merge([caches["int8"]], tmp_path / "both")
    with pytest.raises(OutputError, match=r"`out=` to be a new or empty folder"):
        merge(pairs["int8"], tmp_path / "other")
    assert not (tmp_path / "both").exists()


@pytest.mark.parametrize("file", ["train/embeddings/final/c/1/0", "base/head/weight/c/0/0"])
def test_a_damaged_cache_is_refused_and_leaves_nothing_behind(
    copied: Path, pairs: dict[str, tuple[Path, Path]], file: str
) -> None:
    flip_byte(copied / file)
    with pytest.raises(CacheError, match=r"is damaged.*Nothing was merged"):
        merge([copied, pairs["int8"][1]], copied.parent / "both")
    assert [path.name for path in copied.parent.iterdir()] == ["cache"]


def test_a_merged_cache_is_trained_from_and_not_extracted_again(
    pairs: dict[str, tuple[Path, Path]],
    corpus: Path,
    tiny_base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    both, paths = tmp_path / "both", [str(path) for path in pairs["int8"]]
    assert call_main(monkeypatch, "merge", *paths, "--out", str(both), "--dry-run") == 0
    assert not list(tmp_path.iterdir())
    assert call_main(monkeypatch, "merge", *paths, "--out", str(both)) == 0
    assert "\ntrain " in capsys.readouterr().out
    assert call_main(monkeypatch, "info", str(both)) == 0
    assert str(corpus) in capsys.readouterr().out
    with pytest.raises(EmbedcacheError, match="was merged from 2 caches"):
        extract(
            corpus_config(corpus),
            base=str(tiny_base),
            out=both,
            settings=small_settings(codec="int8", taps=("final", "layer_1")),
            device="cpu",
        )
    carryon = tmp_path / "carryon"
    sizes = ["--epochs", "1", "--width", "32", "--device", "cpu"]
    assert call_main(monkeypatch, "train", str(both), "--out", str(carryon), *sizes) == 0
    assert call_main(monkeypatch, "eval", str(carryon), str(both), "--device", "cpu") == 0
    assert call_main(monkeypatch, "info", str(carryon)) == 0


@pytest.mark.parametrize(
    ("module", "name"),
    [
        pytest.param("edit", "marker_path", marks=pytest.mark.slow, id="a block is copied"),
        pytest.param("edit", "publish_manifest", marks=pytest.mark.slow, id="all is copied"),
        pytest.param("merge", "fsync_tree", id="all is built"),
        pytest.param("merge", "fsync_path", id="the folder is renamed"),
    ],
)
def test_a_killed_merge_is_whole_or_absent_and_runs_again(
    pairs: dict[str, tuple[Path, Path]], tmp_path: Path, module: str, name: str
) -> None:
    both = tmp_path / "both"
    merging = partial(merge, pairs["int8"], both)
    assert run_forked(die_at, f"embedcache.editing.{module}", name, merging) == -signal.SIGKILL
    assert both.exists() == (name == "fsync_path")
    if not both.exists():
        merge(pairs["int8"], both)
        assert [path.name for path in tmp_path.iterdir()] == ["both"]
    assert verify(both, deep=True).faults == ()
    assert contents(both) == expected(*pairs["int8"])
