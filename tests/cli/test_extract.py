"""``embedcache extract``: what it prints, on which stream, and its exit codes."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support.fixtures_extract import call_main, small_flags, start_command, write_documents
from support.tiny import tiny_base_directory


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, session_home: None) -> Path:
    return tiny_base_directory(tmp_path_factory.mktemp("cli") / "base")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_documents(tmp_path_factory.mktemp("cli") / "corpus")


Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Call:
    """Run the command's ``main``; return its exit code, stdout and stderr, of all libraries."""

    def run(*arguments: str) -> tuple[int, str, str]:
        capfd.readouterr()
        code = call_main(monkeypatch, *arguments)
        return code, *capfd.readouterr()

    return run


def test_json_is_alone_on_stdout_of_the_real_command(
    tmp_path: Path, corpus: Path, base: Path
) -> None:
    process = start_command(*small_flags(corpus, base, tmp_path / "cache"), "--json")
    printed, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    found = json.loads(printed)
    assert found["out"] == str(tmp_path / "cache")
    assert found["tokens"]["train"] > 0
    assert found["quarantined"] == 0
    # no bar where there is no terminal, but what is to come
    assert re.fullmatch(r"[\d,]+ tokens to go: about .* to write .*; .* of disk free\n", said), said


def test_the_result_is_printed_as_pairs(
    tmp_path: Path, corpus: Path, base: Path, call: Call
) -> None:
    code, printed, _ = call(*small_flags(corpus, base, tmp_path / "cache"))
    assert code == 0
    for name in ("cache ", "tokens", "blocks ", "self-check ", "Next: embedcache train "):
        assert name in printed
    again, printed, _ = call(*small_flags(corpus, base, tmp_path / "cache"), "--json")
    assert again == 0
    found = json.loads(printed)
    assert found["resumed_blocks"] == found["blocks"] > 0


@pytest.mark.parametrize("as_json", [False, True])
def test_dry_run_writes_nothing(
    tmp_path: Path, corpus: Path, base: Path, call: Call, as_json: bool
) -> None:
    flags = [*small_flags(corpus, base, tmp_path / "made/cache"), "--dry-run"]
    code, printed, _ = call(*flags, *(["--json"] if as_json else []))
    assert code == 0
    assert not list(tmp_path.iterdir())
    if as_json:
        found = json.loads(printed)
        assert found["estimate"]["tokens"] == found["corpus"]["tokens"]
    else:
        for name in ("estimated size", "estimated time", "free disk"):
            assert name in printed


def no_such_field(root: Path, base: Path) -> list[str]:
    (root / "a.jsonl").write_text('{"body": "one two three"}\n' * 3)
    return [str(root / "a.jsonl"), "--text-field", "text"]


def empty_corpus(root: Path, base: Path) -> list[str]:
    (root / "empty").mkdir()
    (root / "empty" / "a.txt").write_text("")
    return [str(root / "empty")]


def not_utf8(root: Path, base: Path) -> list[str]:
    (root / "latin.txt").write_bytes(("caf\xe9 " * 50).encode("latin-1"))
    return [str(root / "latin.txt")]


def missing_path(root: Path, base: Path) -> list[str]:
    return [str(root / "nowhere")]


def bert_base(root: Path, base: Path) -> list[str]:
    from transformers import BertConfig, BertForMaskedLM

    small = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=64)
    BertForMaskedLM(small).save_pretrained(root / "bert")
    return ["CORPUS", "--base", str(root / "bert")]


def missing_base(root: Path, base: Path) -> list[str]:
    return ["CORPUS", "--base", str(root / "no-base")]


FAULTS = {
    "no such field": (no_such_field, 1, ["'text'", "body"]),
    "empty corpus": (empty_corpus, 1, ["no training text"]),
    "not UTF-8": (not_utf8, 1, ["latin.txt", "byte 3", "--encoding"]),
    "missing path": (missing_path, 1, ["nowhere"]),
    "BERT": (bert_base, 1, ["BertForMaskedLM", "causal"]),
    "missing base": (missing_base, 1, ["no-base"]),
    "no such tap": (lambda *_: ["CORPUS", "--taps", "final,9"], 1, ["3 layers", "--taps"]),
    "no tap": (lambda *_: ["CORPUS", "--taps", "last"], 2, ["'last'", "--taps"]),
    "codec": (lambda *_: ["CORPUS", "--codec", "int7"], 2, ["bf16, int8", "'int8'?"]),
    "block": (
        lambda *_: ["CORPUS", "--block-tokens", "63"],
        2,
        ["--block-tokens", "--context (64)"],
    ),
    "batch": (lambda *_: ["CORPUS", "--batch-tokens", "0"], 2, ["--batch-tokens"]),
    "device": (lambda *_: ["CORPUS", "--device", "tpu9"], 2, ["cpu, cuda"]),
    "dtype": (lambda *_: ["CORPUS", "--dtype", "float23"], 2, ["float32"]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_error_is_one_line_and_writes_nothing(
    tmp_path: Path, corpus: Path, base: Path, call: Call, fault: str
) -> None:
    make, expected, words = FAULTS[fault]
    source, *flags = make(tmp_path, base)
    source = str(corpus) if source == "CORPUS" else source
    before = sorted(tmp_path.rglob("*"))
    code, printed, said = call(*small_flags(Path(source), base, tmp_path / "out"), *flags)
    assert code == expected, said
    assert printed == ""
    assert said.startswith("embedcache: ")
    assert said.count("\n") == 1, said
    assert "Traceback" not in said
    for word in words:
        assert word in said
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_with_other_files_is_refused(
    tmp_path: Path, corpus: Path, base: Path, call: Call
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    code, _, said = call(*small_flags(corpus, base, tmp_path / "out"))
    assert code == 1
    assert "thesis.txt" in said
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_a_small_disk_is_refused_before_the_base_runs(
    tmp_path: Path, corpus: Path, base: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = type(shutil.disk_usage(tmp_path))(2**40, 2**40, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: small)
    code, _, said = call(*small_flags(corpus, base, tmp_path / "out"))
    assert code == 1
    assert "GB free" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("without_trial")
def test_a_disk_that_fills_up_is_one_line_and_the_run_can_be_resumed(
    tmp_path: Path, corpus: Path, base: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    from embedcache.cache.blocks import commit

    real, calls = commit.write_shard, []

    def full(path: Path, *arguments: object) -> tuple[int, str]:
        calls.append(path)
        if len(calls) > 2:
            raise OSError(28, "No space left on device", str(path))
        return real(path, *arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(commit, "write_shard", full)
        code, _, said = call(*small_flags(corpus, base, tmp_path / "out"))
    assert code == 1
    prediction, message = said.splitlines()
    assert "tokens to go" in prediction
    assert message.startswith("embedcache: expected room on the disk of ")
    code, _, said = call(*small_flags(corpus, base, tmp_path / "out"))
    assert (code, said.split(",")[0]) == (0, "resuming: 2 blocks are there")


def test_a_changed_setting_is_refused_by_name(
    tmp_path: Path, corpus: Path, base: Path, call: Call
) -> None:
    flags = small_flags(corpus, base, tmp_path / "out")
    assert call(*flags)[0] == 0
    code, _, said = call(*flags, "--codec", "int8")
    assert code == 1
    assert "codec was 'bf16', now 'int8'" in said


def test_a_missing_option_is_a_usage_error(call: Call) -> None:
    code, _, said = call("extract", "somewhere")
    assert code == 2
    assert "--out" in said
