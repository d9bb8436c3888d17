"""What ``inspect`` lays open, against transformers' own logits."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import World, make_world
from support.digest_tables import put_aside
from support.fixtures_extract import call_main, small_settings
from support.tiny import tiny_base_directory
from transformers import AutoModelForCausalLM, AutoTokenizer

from embedcache import inspection
from embedcache.corpus.config import CorpusConfig
from embedcache.errors import BaseModelError, CacheError, IdentityError, UsageError
from embedcache.extraction.extract import extract
from embedcache.inspection import inspect_sequence

KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "int8": {"codec": "int8"},
    "gemma3": {"arch": "gemma3_text", "tied": False, "taps": ("layer_1", "final")},
    "phi": {"arch": "phi", "tied": False},
    "cohere": {"arch": "cohere"},
}


@pytest.fixture(scope="module", params=list(KINDS))
def kind(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    """A cache whose head is tied or not, has a bias, a scale or a soft-cap; or of codec int8."""
    return make_world(tmp_path_factory.mktemp("inspection") / "world", **KINDS[request.param])


def log_p_tolerance(model: Any, x_TH: torch.Tensor, codec: str) -> torch.Tensor:
    """Return, for each row, how far a codec's rounding may move a log-probability."""
    step_TH = x_TH.abs() * 2**-8
    if codec == "int8":
        step_TH = step_TH + x_TH.abs().amax(dim=1, keepdim=True) / 254
    weight = model.get_output_embeddings().weight.abs()
    return 2 * (step_TH @ weight.T).amax(dim=1) + 1e-4


@pytest.mark.parametrize(("split", "sequence"), [("train", 0), ("train", 17), ("test", 3)])
def test_choices_are_those_of_transformers(kind: World, split: str, sequence: int) -> None:
    found = inspect_sequence(kind.cache_path, sequence, split=split)
    model: Any = AutoModelForCausalLM.from_pretrained(kind.base_path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(kind.base_path)
    ids = [position.id for position in found.positions]
    with torch.no_grad():
        output = model(torch.tensor([ids]), output_hidden_states=True)
    log_p_TV = output.logits[0].log_softmax(dim=1)
    x_TH = output.hidden_states[-1][0]
    tolerance_T = log_p_tolerance(model, x_TH, found.codec).tolist()
    assert found.codec == (kind.cache().attributes.settings.codec if split == "train" else "bf16")
    for t, position in enumerate(found.positions):
        assert position.text == tokenizer.decode([position.id])
        assert position.norm["final"] == pytest.approx(x_TH[t].norm().item(), rel=0.02)
        assert len({choice.id for choice in position.choices}) == 3
        order = [choice.probability for choice in position.choices]
        assert order == sorted(order, reverse=True)
        for rank, choice in enumerate(position.choices):
            stated = torch.tensor(choice.probability).log().item()
            assert abs(stated - log_p_TV[t, choice.id].item()) <= tolerance_T[t]
            kth = log_p_TV[t].topk(rank + 1).values[-1].item()
            assert abs(stated - kth) <= tolerance_T[t]
            assert choice.text == tokenizer.decode([choice.id])
        if t + 1 < len(ids):
            assert position.next_probability is not None
            stated = torch.tensor(position.next_probability).log().item()
            assert abs(stated - log_p_TV[t, ids[t + 1]].item()) <= tolerance_T[t]
    assert found.positions[-1].next_probability is None
    targets = [t for t in range(1, len(ids)) if found.positions[t].target]
    expected = -sum(log_p_TV[t - 1, ids[t]].item() for t in targets) / len(targets)
    slack = sum(tolerance_T) / len(tolerance_T)
    assert found.cross_entropy == pytest.approx(expected, abs=slack)
    if "layer_1" in found.positions[0].norm:
        norms = output.hidden_states[1][0].norm(dim=1)
        shown = [position.norm["layer_1"] for position in found.positions]
        assert shown == pytest.approx(norms.tolist(), rel=0.01)


def test_the_loss_is_of_the_answers_alone(tmp_path: Path, session_home: None) -> None:
    base = tiny_base_directory(tmp_path / "base")
    pairs = [{"q": f"What is {n} dogs?", "a": f"the fox number {n * 7919}"} for n in range(6)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(json.dumps(pair) for pair in pairs))
    corpus = CorpusConfig(
        sources=(str(tmp_path / "pairs.jsonl"),),
        prompt="{q} ",
        completion="{a}",
        context=64,
        dev_fraction=0,
        test_fraction=0,
    )
    settings = small_settings()
    extract(corpus, base=str(base), out=tmp_path / "cache", settings=settings, device="cpu")
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    for sequence in range(6):
        found = inspect_sequence(tmp_path / "cache", sequence)
        ids = [position.id for position in found.positions]
        with torch.no_grad():
            log_p_TV = model(torch.tensor([ids])).logits[0].log_softmax(dim=1)
        mask = [position.target for position in found.positions]
        answer = "".join(position.text or "" for position in found.positions if position.target)
        assert answer.startswith("the fox number ")
        assert 0 < sum(mask) < len(mask) - 1
        losses = [-log_p_TV[t - 1, ids[t]].item() for t in range(len(ids)) if mask[t]]
        assert found.cross_entropy == pytest.approx(sum(losses) / len(losses), rel=0.01)


def test_rows_are_taken_a_few_at_a_time(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = inspect_sequence(world.cache_path, 0)
    monkeypatch.setattr(inspection, "ROWS", 7)
    for one, other in zip(
        inspect_sequence(world.cache_path, 0).positions, whole.positions, strict=True
    ):
        assert [c.id for c in one.choices] == [c.id for c in other.choices]
        if other.next_probability is None:
            assert one.next_probability is None
        else:
            assert one.next_probability == pytest.approx(other.next_probability, rel=1e-4)


def test_every_sequence_is_the_corpus_own(world: World) -> None:
    """The spans cut each token's text out of the document that is named."""
    manifest = world.cache().manifest.splits["train"]
    for sequence in range(manifest.sequences):
        found = inspect_sequence(world.cache_path, sequence)
        assert found.sequences == manifest.sequences
        text = (world.corpus / Path(found.document).name).read_bytes()
        assert not found.positions[0].target
        for position in found.positions:
            first, stop = position.span
            if first < stop:
                assert text[first:stop].decode() == position.text


def test_without_the_base_tokens_are_ids(world: World, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    before = inspect_sequence(world.cache_path, 1)
    hidden = world.base_path.with_name("hidden")
    world.base_path.rename(hidden)
    try:
        found = inspect_sequence(world.cache_path, 1)
        shutil.copytree(hidden, moved)
        there = inspect_sequence(world.cache_path, 1, base=str(moved))
    finally:
        hidden.rename(world.base_path)
    assert there == before
    assert found.note is not None
    assert found.note.startswith("tokens are shown as ids: ")
    for one, other in zip(found.positions, before.positions, strict=True):
        assert one.text is None
        assert one.id == other.id
        assert [choice.id for choice in one.choices] == [choice.id for choice in other.choices]
        assert one.next_probability == other.next_probability


def test_the_hub_is_not_asked(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    def refused(*_: Any, **__: Any) -> Any:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "getaddrinfo", refused)
    monkeypatch.setattr(socket.socket, "connect", refused)
    with pytest.raises(BaseModelError, match=r"neither a directory here.*`base=`"):
        inspect_sequence(world.cache_path, 0, base="some/base")


def test_another_tokenizer_is_refused(world: World, tmp_path: Path) -> None:
    other = tiny_base_directory(tmp_path / "other", vocab_size=320)
    with pytest.raises(IdentityError, match="another tokenizer"):
        inspect_sequence(world.cache_path, 0, base=str(other))


def test_without_the_final_tap_there_are_no_choices(tmp_path: Path, session_home: None) -> None:
    world = make_world(tmp_path / "world", taps=("layer_1",))
    found = inspect_sequence(world.cache_path, 0)
    assert found.note == "no choices: the tap final is not stored"
    assert found.cross_entropy is None
    for position in found.positions:
        assert position.choices == ()
        assert list(position.norm) == ["layer_1"]


class TestRefused:
    @pytest.mark.parametrize("sequence", [-1, 10**6])
    def test_a_number_out_of_range(self, world: World, sequence: int) -> None:
        last = world.cache().manifest.splits["train"].sequences - 1
        with pytest.raises(UsageError, match=rf"expects 0 to {last}, .*found {sequence}"):
            inspect_sequence(world.cache_path, sequence)

    def test_an_unknown_split(self, world: World) -> None:
        with pytest.raises(UsageError, match=r"found 'trian'.*Did you mean 'train'"):
            inspect_sequence(world.cache_path, 0, split="trian")

    def test_a_quarantined_sequence(self, world: World, tmp_path: Path) -> None:
        path = shutil.copytree(world.cache_path, tmp_path / "cache")
        put_aside(path, "train", 0, (2,))
        with pytest.raises(CacheError, match=r"sequence 2 of train is quarantined"):
            inspect_sequence(path, 2)
        assert inspect_sequence(path, 3) == replace(
            inspect_sequence(world.cache_path, 3), cache=str(path)
        )

    def test_an_unfinished_cache(self, world: World, tmp_path: Path) -> None:
        path = shutil.copytree(world.cache_path, tmp_path / "cache")
        (path / "manifest.json").unlink()
        with pytest.raises(CacheError, match="not complete"):
            inspect_sequence(path, 0)


def test_the_command_prints_a_table_or_json(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["inspect", str(world.cache_path), "--sequence", "5"]
    found = inspect_sequence(world.cache_path, 5)
    assert call_main(monkeypatch, *arguments, "--json") == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(asdict(found)))
    assert call_main(monkeypatch, *arguments) == 0
    printed = capsys.readouterr().out
    assert found.document in printed
    table = printed.split("\n\n", 1)[1].splitlines()[2:]
    assert len(table) == len(found.positions)
    for line, position in zip(table, found.positions, strict=True):
        assert line.startswith(repr(position.text))
        assert repr(position.choices[0].text) in line
    assert call_main(monkeypatch, "inspect", str(world.cache_path), "--sequence", "9999") == 2
    assert "sequences of the train split" in capsys.readouterr().err
