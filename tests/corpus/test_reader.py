"""Reading a corpus, from files to sequences."""

from __future__ import annotations

import json
import random
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedcache.corpus.config import CorpusConfig
from embedcache.corpus.reader import CorpusReader, DocumentSequences
from embedcache.corpus.sources import text_files
from embedcache.errors import CorpusError

WORDS = ["fox", "dog", "lazy", "quick", "Paris", "base", "learns", "日本"]


def prose(seed: int, words: int = 40) -> str:
    source = random.Random(seed)
    return " ".join(source.choice(WORDS) + str(source.randrange(99)) for _ in range(words))


def reader(tokenizer: Any, *sources: Path | str, **settings: Any) -> CorpusReader:
    config = CorpusConfig(sources=tuple(map(str, sources)), **{"context": 32, **settings})
    return CorpusReader(config, tokenizer)


def rows(found: list[DocumentSequences]) -> list[tuple[int, str, str, list[list[int]]]]:
    return [(d.index, d.name, d.split, [s.ids.tolist() for s in d.sequences]) for d in found]


@pytest.fixture
def folder(write: Any, tmp_path: Path) -> Path:
    for number in range(40):
        write(f"corpus/{number:02}.txt", prose(number))
    return tmp_path / "corpus"


def test_documents_in_order_with_all_their_tokens(tokenizer: Any, folder: Path) -> None:
    corpus = reader(tokenizer, folder, min_tokens=2)
    found = list(corpus)
    assert [document.index for document in found] == list(range(40))
    assert [document.name for document in found] == [f"{number:02}.txt" for number in range(40)]
    for document in found:
        text = (folder / document.name).read_text()
        ids = np.concatenate([sequence.ids for sequence in document.sequences])
        whole = [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        assert ids.tolist() == whole[: len(ids)]
        assert len(whole) - len(ids) < 2
        for sequence in document.sequences:
            assert (sequence.ids.dtype, sequence.span.dtype) == (np.uint32, np.uint32)
            assert sequence.loss_mask.tolist() == [False] + [True] * (len(sequence.ids) - 1)
            for token, (start, end) in zip(sequence.ids, sequence.span, strict=True):
                if token == tokenizer.eos_token_id:
                    assert start == end == len(text.encode())


def test_the_summary_counts_the_sequences(tokenizer: Any, folder: Path) -> None:
    corpus = reader(tokenizer, folder)
    counts: dict[str, list[int]] = {split: [0, 0, 0, 0] for split in ("train", "dev", "test")}
    for document in corpus:
        counts[document.split][0] += 1
        for sequence in document.sequences:
            counts[document.split][1] += 1
            counts[document.split][2] += len(sequence.ids)
            counts[document.split][3] += int(sequence.loss_mask.sum())
        summary = corpus.summary
        found = {
            str(split): [
                summary.documents[split],
                summary.sequences[split],
                summary.tokens[split],
                summary.target_tokens[split],
            ]
            for split in summary.documents
        }
        assert found == counts
    assert corpus.summary.files == 40
    assert json.loads(json.dumps(corpus.summary.to_dict()))["files"] == 40


def test_two_passes_give_the_same(tokenizer: Any, folder: Path) -> None:
    corpus = reader(tokenizer, folder)
    first, one = rows(list(corpus)), corpus.summary
    second, two = rows(list(corpus)), corpus.summary
    assert first == second
    assert one == two
    assert one is not two
    assert two.files == 40
    assert len(one.corpus_sha256) == 64


def test_the_hash_depends_on_the_corpus_but_not_on_its_location(
    tokenizer: Any, folder: Path, tmp_path: Path
) -> None:
    def digest(*sources: Path, **settings: Any) -> str:
        corpus = reader(tokenizer, *sources, **settings)
        list(corpus)
        return corpus.summary.corpus_sha256

    before = digest(folder)
    assert digest(folder, context=64) != before
    assert digest(folder, split_seed=5) != before
    moved = folder.rename(tmp_path / "moved")
    assert digest(moved) == before
    (moved / "07.txt").write_text(prose(7).swapcase())
    assert digest(moved) != before


def test_the_batch_size_does_not_matter(
    tokenizer: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = rows(list(reader(tokenizer, folder)))
    monkeypatch.setattr("embedcache.corpus.reader.BATCH_DOCUMENTS", 3)
    assert rows(list(reader(tokenizer, folder))) == before
    monkeypatch.setattr("embedcache.corpus.reader.BATCH_CHARACTERS", 1)
    assert rows(list(reader(tokenizer, folder))) == before


def test_every_sequence_starts_with_the_beginning_of_sequence_token(
    bos_tokenizer: Any, write: Any
) -> None:
    bos = bos_tokenizer.bos_token_id
    path = write("a.txt", prose(1))
    [document] = reader(bos_tokenizer, path)
    assert len(document.sequences) > 2
    for sequence in document.sequences:
        assert sequence.ids[0] == bos
        assert sequence.ids.tolist().count(bos) == 1
        assert not sequence.loss_mask[0]
        assert sequence.loss_mask[1:].all()
    chat = write(
        "chat.jsonl",
        [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}],
    )
    [document] = reader(bos_tokenizer, chat)
    # The template writes the token for each of the two messages; none is added.
    assert document.sequences[0].ids.tolist().count(bos) == 2
    assert document.sequences[0].ids[0] == bos


def test_short_text_is_dropped_and_counted(tokenizer: Any, write: Any) -> None:
    write("c/a.txt", prose(1))
    write("c/b.txt", "tiny")
    path = write("c/c.txt", "")
    corpus = reader(tokenizer, path.parent)
    [document] = corpus
    assert document.name == "a.txt"
    rest = (len(tokenizer(prose(1)).input_ids) + 1) % 32
    assert corpus.summary.dropped_short == 2 + (0 < rest < 16)


def test_pairs_without_a_target_are_dropped(tokenizer: Any, write: Any) -> None:
    long = "fox " * 40
    path = write(
        "a.jsonl", [{"prompt": long, "completion": "ok"}, {"prompt": "p", "completion": ""}]
    )
    corpus = reader(tokenizer, path, dev_fraction=0.0, test_fraction=0.0)
    first, second = corpus
    prompt = len(tokenizer(long, add_special_tokens=False).input_ids)
    assert prompt % 32 < 28  # so that the completion is in one sequence
    assert corpus.summary.dropped_without_target == prompt // 32 > 1
    assert len(first.sequences) == 1
    assert first.sequences[0].loss_mask.tolist().index(True) == prompt % 32
    assert second.sequences[0].loss_mask.tolist() == [False, True]


def test_chats_without_an_answer_are_dropped(tokenizer: Any, write: Any) -> None:
    question = [{"role": "user", "content": "hi"}]
    answer = [{"role": "assistant", "content": "yo"}]
    path = write("a.jsonl", [{"messages": question}, {"messages": question + answer}])
    corpus = reader(tokenizer, path)
    assert [document.name for document in corpus] == ["a.jsonl:2"]
    assert corpus.summary.dropped_without_target == 1


def test_explicit_dev_and_test_sources(tokenizer: Any, write: Any, folder: Path) -> None:
    dev = write("dev.txt", prose(100))
    test = write("test.txt", prose(101))
    corpus = reader(tokenizer, folder, dev_sources=(str(dev),), test_sources=(str(test),))
    splits = {document.name: document.split for document in corpus}
    assert splits.pop("dev.txt") == "dev"
    assert splits.pop("test.txt") == "test"
    assert set(splits.values()) == {"train"}
    only_test = reader(tokenizer, folder, test_sources=(str(test),))
    splits = {document.name: document.split for document in only_test}
    assert [name for name, split in splits.items() if split == "test"] == ["test.txt"]
    assert "dev" in splits.values()


def test_a_test_source_that_repeats_train_is_counted(
    tokenizer: Any, write: Any, folder: Path
) -> None:
    copy = write("other.txt", prose(5))
    corpus = reader(tokenizer, folder, dev_fraction=0.0, test_sources=(str(copy),))
    list(corpus)
    assert corpus.summary.near_duplicates_across_splits == 1


def test_a_split_file_decides(tokenizer: Any, write: Any, folder: Path) -> None:
    split = {"train": ["03.txt", "01.txt"], "dev": ["02.txt"], "test": ["39.txt"]}
    path = write("split.json", json.dumps(split))
    corpus = reader(tokenizer, folder, split_file=str(path))
    found = [(document.name, document.split) for document in corpus]
    assert found == [
        ("01.txt", "train"),
        ("02.txt", "dev"),
        ("03.txt", "train"),
        ("39.txt", "test"),
    ]
    assert corpus.summary.unlisted == 36
    write("split.json", json.dumps({**split, "dev": ["40.txt"]}))
    with pytest.raises(CorpusError, match=r"40\.txt"):
        list(reader(tokenizer, folder, split_file=str(path)))


def test_limits(tokenizer: Any, write: Any, folder: Path) -> None:
    assert len(list(reader(tokenizer, folder, limit_documents=7))) == 7
    corpus = reader(tokenizer, folder, limit_tokens=500)
    list(corpus)
    total = sum(corpus.summary.tokens.values())
    assert 500 <= total < 500 + 32
    test = write("test.jsonl", [{"text": prose(seed)} for seed in range(200, 220)])
    corpus = reader(tokenizer, folder, limit_documents=7, test_sources=(str(test),))
    list(corpus)
    assert sum(corpus.summary.documents.values()) == 14
    assert corpus.summary.documents["test"] == 7


def test_max_tokens_per_document(tokenizer: Any, folder: Path) -> None:
    whole = {document.name: document for document in reader(tokenizer, folder)}
    for document in reader(tokenizer, folder, max_tokens_per_document=50):
        ids = np.concatenate([sequence.ids for sequence in document.sequences])
        expected = np.concatenate([sequence.ids for sequence in whole[document.name].sequences])
        assert ids.tolist() == expected[:50].tolist()
        assert tokenizer.eos_token_id not in ids


def test_parts_of_a_large_file_are_in_one_split(
    tokenizer: Any, write: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(text_files, "WHOLE_BYTES", 600)
    monkeypatch.setattr(text_files, "PART_CHARACTERS", 600)
    for name in "abcd":
        lines = [prose(ord(name) * 100 + line, 10) for line in range(20)]
        write(f"c/{name}.txt", "\n".join(lines))
    found = list(reader(tokenizer, tmp_path / "c", min_tokens=2))
    splits: dict[str, set[str]] = {}
    for document in found:
        name, _, part = document.name.partition("#")
        assert int(part) >= 1
        splits.setdefault(name, set()).add(document.split)
    assert len(found) > 8
    expected = [{"train"}, {"dev"}, {"test"}]
    assert [splits[f"{name}.txt"] for name in "abc"] == expected
    ends = [tokenizer.eos_token_id in document.sequences[-1].ids for document in found]
    assert sum(ends) == 4
    short = list(reader(tokenizer, tmp_path / "c", max_tokens_per_document=40, min_tokens=2))
    assert [document.name for document in short] == [f"{name}.txt#1" for name in "abcd"]


def test_equal_names_are_numbered(tokenizer: Any, write: Any, tmp_path: Path) -> None:
    write("a/same.txt", prose(1))
    write("b/same.txt", prose(2))
    corpus = reader(tokenizer, tmp_path / "a", tmp_path / "b")
    assert [document.name for document in corpus] == ["same.txt", "same.txt@2"]


def test_broken_unicode_in_a_record(tokenizer: Any, write: Any) -> None:
    path = write("a.jsonl", [{"text": prose(1)}, {"text": "\ud83d" + prose(2)}])
    with pytest.raises(CorpusError, match=r"a\.jsonl:2.*surrogate"):
        list(reader(tokenizer, path))
    corpus = reader(tokenizer, path, undecodable="skip")
    assert [document.name for document in corpus] == ["a.jsonl:1"]
    assert corpus.summary.skipped_undecodable == 1


def test_nothing_to_train_on(tokenizer: Any, write: Any) -> None:
    path = write("a.txt", "tiny")
    with pytest.raises(CorpusError, match=r"no training text in 1 files: .*1 sequences below 16"):
        list(reader(tokenizer, path))


def test_a_pass_can_be_stopped_early(tokenizer: Any, folder: Path) -> None:
    iterator = iter(reader(tokenizer, folder))
    next(iterator)
    iterator.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", ["jsonl", "txt"])
def test_memory_does_not_grow_with_the_corpus(
    tokenizer: Any, write: Any, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr("embedcache.corpus.reader.BATCH_DOCUMENTS", 16)
    monkeypatch.setattr(text_files, "WHOLE_BYTES", 8192)
    monkeypatch.setattr(text_files, "PART_CHARACTERS", 8192)
    monkeypatch.setattr("embedcache.corpus.encoding.BLOCK_BYTES", 8192)
    monkeypatch.setattr("embedcache.corpus.reader.BATCH_CHARACTERS", 8192)

    def peak(count: int) -> int:
        texts = [prose(seed) for seed in range(count)]
        path = (
            write(f"{count}.jsonl", [{"text": text} for text in texts])
            if kind == "jsonl"
            else write(f"{count}.txt", "\n".join(texts))
        )
        del texts
        corpus = reader(tokenizer, path)
        tracemalloc.start()
        for _ in corpus:
            pass
        highest = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return highest

    peak(20)  # allocations that happen once
    small, large = peak(60), peak(480)
    assert large < 1.3 * small
