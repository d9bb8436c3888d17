"""Taps compared with transformers' hidden states."""

from pathlib import Path

import pytest
import torch
from support.tiny import ARCHITECTURES, tiny_base_directory
from transformers import AutoModelForCausalLM

from embedcache.base.taps import (
    TapRecorder,
    check_taps,
    decoder_of,
    final_embeddings,
    layers_of,
    parse_taps,
    token_embedding_of,
)
from embedcache.errors import BaseModelError, UsageError

IDS_BT = torch.randint(0, 384, (2, 20), generator=torch.Generator().manual_seed(1))
ALL = ("layer_2", "final", "layer_0", "layer_1")


@pytest.mark.parametrize("arch", ARCHITECTURES)
@torch.no_grad()
def test_taps_are_transformers_hidden_states(tmp_path: Path, arch: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_base_directory(tmp_path, arch)).eval()
    mask = torch.ones_like(IDS_BT)
    mask[1, 15:] = 0
    inputs = {"attention_mask": mask, "position_ids": torch.arange(20).expand(2, 20)}
    # hidden_states holds the input of each layer, then the final embedding.
    expected = model(IDS_BT, output_hidden_states=True, **inputs).hidden_states
    with TapRecorder(model, ALL) as recorder:
        x_BTH = final_embeddings(model, IDS_BT, **inputs)
    assert set(recorder.taps) == set(ALL)
    for k in range(3):
        assert torch.equal(recorder.taps[f"layer_{k}"], expected[k])
    assert torch.equal(recorder.taps["final"], expected[3])
    assert torch.equal(x_BTH, expected[3])
    assert not torch.equal(expected[2], expected[3])


@torch.no_grad()
def test_recorder_records_a_whole_forward_and_removes_its_hooks(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_base_directory(tmp_path)).eval()
    with TapRecorder(model, ("final", "layer_1")) as recorder:
        model(IDS_BT)
        first = recorder.taps["final"]
        model(IDS_BT[:, :5])
        assert recorder.taps["final"].shape == (2, 5, 32)
    model(IDS_BT[:, :3])
    assert recorder.taps["layer_1"].shape == (2, 5, 32)
    assert first.shape == (2, 20, 32)
    assert recorder.taps["final"].shape == (2, 5, 32)


def test_final_embeddings_compute_no_logits(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_base_directory(tmp_path)).eval()

    def refuse(*args: object) -> None:
        raise AssertionError("the head ran")

    model.lm_head.register_forward_pre_hook(refuse)
    assert final_embeddings(model, IDS_BT).shape == (2, 20, 32)


def test_parts_of_a_model(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_base_directory(tmp_path, "gpt2")).eval()
    assert decoder_of(model) is model.transformer
    assert layers_of(model) is model.transformer.h
    assert token_embedding_of(model) is model.transformer.wte


def test_parse_taps() -> None:
    assert parse_taps("final,22,15") == ("final", "layer_22", "layer_15")
    assert parse_taps(" layer_3 , final") == ("layer_3", "final")
    for text, message in {
        "final,,2": "found ''",
        "finale": "found 'finale'",
        "3,layer_3": "layer_3 is repeated",
        "-1": "found '-1'",
    }.items():
        with pytest.raises(UsageError, match=message):
            parse_taps(text)


def test_check_taps_names_the_valid_range() -> None:
    check_taps(("final", "layer_0", "layer_29"), 30)
    with pytest.raises(BaseModelError, match=r"30 layers.*0 to 29.*found layer_30"):
        check_taps(("final", "layer_30"), 30)
    with pytest.raises(BaseModelError, match="found 'last'"):
        check_taps(("last",), 30)
