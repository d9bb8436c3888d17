"""The head compared with transformers' logits, bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny import ARCHITECTURES, tiny_base_directory
from transformers import AutoModelForCausalLM

from embedcache.base.head import Head
from embedcache.base.taps import final_embeddings, is_tied
from embedcache.errors import BaseModelError

IDS_BT = torch.randint(0, 384, (2, 20), generator=torch.Generator().manual_seed(0))


def load(directory: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
@torch.no_grad()
def test_head_gives_the_models_logits(
    tmp_path: Path, arch: str, tied: bool, dtype: torch.dtype
) -> None:
    model = load(tiny_base_directory(tmp_path, arch, tied=tied), dtype)
    expected = model(IDS_BT).logits
    head = Head.from_model(model)
    x_BTH = final_embeddings(model, IDS_BT)
    assert torch.equal(head(x_BTH), expected)
    assert is_tied(model) is tied

    again = Head.from_parts(head.weight_VH.clone(), head.bias_V, head.settings)
    assert torch.equal(again(x_BTH), expected)


@torch.no_grad()
def test_granite_divides_as_transformers_does(tmp_path: Path) -> None:
    """The inverse of a divisor such as 6 (Granite 1B) is not exact, so multiplying differs."""
    model = load(tiny_base_directory(tmp_path, "granite"))
    model.config.logits_scaling = 6.0
    head = Head.from_model(model)
    x_BTH = final_embeddings(model, IDS_BT)
    assert torch.equal(head(x_BTH), model(IDS_BT).logits)
    multiplied = Head(head.weight_VH, logit_scale=head.logit_scale)(x_BTH)
    assert not torch.equal(multiplied, head(x_BTH))
    torch.testing.assert_close(multiplied, head(x_BTH))


def test_tiny_bases_have_settings_that_matter(tmp_path: Path) -> None:
    """The tests above would show nothing with a setting of 1 or None."""
    for arch, expected in {
        "gemma2": {"logit_scale": 1.0, "logit_divisor": None, "softcap": 2.0},
        "cohere": {"logit_scale": 0.0625, "logit_divisor": None, "softcap": None},
        "granite": {"logit_scale": 0.125, "logit_divisor": 8.0, "softcap": None},
    }.items():
        head = Head.from_model(load(tiny_base_directory(tmp_path / arch, arch)))
        assert head.settings == expected
    phi = Head.from_model(load(tiny_base_directory(tmp_path / "phi", "phi")))
    assert phi.bias_V is not None
    assert phi.bias_V.abs().max() > 0


def test_head_is_frozen_and_shares_the_weights(tmp_path: Path) -> None:
    model = load(tiny_base_directory(tmp_path))
    head = Head.from_model(model)
    assert head.weight_VH.data_ptr() == model.get_output_embeddings().weight.data_ptr()
    assert list(head.parameters()) == []
    assert head.state_dict() == {}
    x = torch.randn(4, 32, requires_grad=True)
    head(x).sum().backward()
    assert x.grad is not None
    assert head.weight_VH.grad is None


def test_unknown_setting_is_refused() -> None:
    with pytest.raises(BaseModelError, match=r"'softcaps'.*Did you mean 'softcap'"):
        Head.from_parts(torch.zeros(3, 2), None, {"softcaps": 1.0})


def test_quantised_head_is_refused(tmp_path: Path) -> None:
    model = load(tiny_base_directory(tmp_path, tied=False))
    model.lm_head.weight = torch.nn.Parameter(
        model.lm_head.weight.to(torch.int8), requires_grad=False
    )
    with pytest.raises(BaseModelError, match="floating-point weight"):
        Head.from_model(model)
