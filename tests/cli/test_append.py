"""``embedcache extract --append``: settings, refusals and output."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from support.fixtures_extract import call_main, small_flags, write_documents
from support.tiny import tiny_base_directory


def test_only_typed_settings_must_equal_those_of_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base, cache = tiny_base_directory(tmp_path / "base"), str(tmp_path / "cache")
    corpus, more = (write_documents(tmp_path / name, 4, seed=len(name)) for name in ("one", "more"))

    def call(*arguments: str) -> tuple[int, str, str]:
        code = call_main(monkeypatch, "extract", *arguments)
        return (code, *capsys.readouterr())

    settings = ["--codec", "int8", "--taps", "final,layer_1", "--min-tokens", "20"]
    assert call(*small_flags(corpus, base, tmp_path / "cache")[1:], *settings)[0] == 0
    add = [str(more), "--out", cache, "--append", "--device", "cpu"]
    for wrong, message in (
        (["--codec", "bf16"], " int8, the setting of"),
        (["--context", "1024"], " 64, the setting of"),
        (["--repair"], "expected --repair or --append, found both"),
    ):
        code, printed, said = call(*add, *wrong)
        assert (code, printed) == (2, "")
        assert message in said
    assert call(*add, "--dry-run")[1].count("would be added") == 3
    same = ["--codec", "int8", "--context", "64", "--batch-tokens", "256", "--dtype", "float32"]
    copy = shutil.copytree(base, tmp_path / "elsewhere")
    code, printed, _ = call(*add, *same, "--base", str(copy))
    assert code == 0
    assert "embedcache train" in printed
    code, printed, _ = call(*add, "--json")
    found = json.loads(printed)
    assert (found["already_there"], found["dry_run"]) == (4, False)
    capsys.readouterr()
    assert call_main(monkeypatch, "info", cache) == 0
    printed = capsys.readouterr().out
    assert re.search(rf"appended +4 documents, \d+ tokens from {more}, on 20\d\d-", printed)
