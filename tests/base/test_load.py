"""Loading a base, and the models that are refused."""

import json
from pathlib import Path

import pytest
import torch
from support.tiny import ARCHITECTURES, tiny_base_directory
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaForCausalLM

from embedcache.base.load import load_base, load_identity, load_tokenizer
from embedcache.base.taps import final_embeddings
from embedcache.errors import BaseModelError, NumericsError, UsageError

SMALL_BERT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 384,
}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_loaded_base_is_frozen_and_reproduces_its_logits(tmp_path: Path, arch: str) -> None:
    base = load_base(tiny_base_directory(tmp_path, arch), device="cpu")
    assert not base.model.training
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert (base.device.type, base.dtype) == ("cpu", torch.float32)
    assert base.head.weight_VH.dtype == torch.float32
    assert base.identity == load_identity(str(tmp_path))
    assert base.identity.name == str(tmp_path)
    ids = torch.tensor([base.tokenizer("The quick brown fox")["input_ids"]])
    assert torch.equal(base.head(final_embeddings(base.model, ids)), base.model(ids).logits)


def test_dtype_and_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = str(tiny_base_directory(tmp_path))
    base = load_base(directory, device="cpu", dtype="bfloat16")
    assert base.dtype == base.head.weight_VH.dtype == base.model.dtype == torch.bfloat16
    with pytest.raises(UsageError, match=r"found 'bfloat61'.*Did you mean 'bfloat16'"):
        load_base(directory, dtype="bfloat61")
    with pytest.raises(UsageError, match="found 'gpu'"):
        load_base(directory, device="gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert load_base(directory).device.type == "cpu"
    with pytest.raises(UsageError, match="no CUDA device"):
        load_base(directory, device="cuda")


def test_tokenizer_has_its_template(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny_base_directory(tmp_path))
    text = "Zwölf Boxkämpfer, 12 🦊"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat == "<|im_start|>user\nhi<|im_end|>\n"


def test_loading_prints_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load_base(tiny_base_directory(tmp_path))
    printed = capfd.readouterr()
    assert (printed.out, printed.err) == ("", "")


def test_models_without_a_causal_head_are_refused(tmp_path: Path) -> None:
    bert = AutoModel.from_config(AutoConfig.for_model("bert", **SMALL_BERT))
    bert.save_pretrained(tmp_path / "bert")
    with pytest.raises(BaseModelError, match="found BertModel"):
        load_base(str(tmp_path / "bert"))
    t5 = AutoConfig.for_model("t5", d_model=32, d_kv=8, d_ff=64, num_layers=1, vocab_size=384)
    t5.save_pretrained(tmp_path / "t5")
    with pytest.raises(BaseModelError, match=r"found t5 \(model type t5\)"):
        load_base(str(tmp_path / "t5"))
    headless = tiny_base_directory(tmp_path / "headless")
    AutoModel.from_pretrained(headless).save_pretrained(headless)
    with pytest.raises(BaseModelError, match="found LlamaModel"):
        load_base(str(headless))


def test_a_bidirectional_model_is_refused(tmp_path: Path) -> None:
    """Some embedding models have the class of a causal model but bidirectional attention."""
    config = tiny_base_directory(tmp_path, "gemma3_text") / "config.json"
    both_ways = json.loads(config.read_text()) | {"use_bidirectional_attention": True}
    config.write_text(json.dumps(both_ways))
    with pytest.raises(BaseModelError, match="a base must be causal: no token may see a later one"):
        load_base(str(tmp_path))


def test_code_beside_an_unknown_architecture_is_not_run(tmp_path: Path) -> None:
    directory = tiny_base_directory(tmp_path)
    config = json.loads((directory / "config.json").read_text())
    config |= {"model_type": "newest", "auto_map": {"AutoConfig": "evil.Config"}}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(BaseModelError, match="runs no code that comes with a model"):
        load_base(str(directory))
    assert not (tmp_path / "ran").exists()


def test_missing_weights_are_refused(tmp_path: Path) -> None:
    """transformers only warns about a missing head and initialises it at random."""
    from safetensors.torch import load_file, save_file

    weights = tiny_base_directory(tmp_path, tied=False) / "model.safetensors"
    tensors = load_file(weights)
    del tensors["lm_head.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(BaseModelError, match=r"1 are missing, such as lm_head\.weight"):
        load_base(str(tmp_path))


def test_weights_that_do_not_fit_the_config(tmp_path: Path) -> None:
    config = tiny_base_directory(tmp_path) / "config.json"
    config.write_text(config.read_text().replace('"vocab_size": 384', '"vocab_size": 500'))
    with pytest.raises(BaseModelError, match=r"should be \[500, 32\], found \[384, 32\]"):
        load_base(str(tmp_path))


def test_damaged_weights(tmp_path: Path) -> None:
    weights = tiny_base_directory(tmp_path) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(BaseModelError, match="cannot be loaded"):
        load_base(str(tmp_path))


def test_a_head_that_does_not_give_the_logits_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = str(tiny_base_directory(tmp_path))
    original = LlamaForCausalLM.forward

    def scaled(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        output = original(self, *args, **kwargs)
        output.logits = output.logits * 1.01
        return output

    monkeypatch.setattr(LlamaForCausalLM, "forward", scaled)
    for dtype in ("float32", "bfloat16"):
        with pytest.raises(BaseModelError, match="between the final norm and the logits"):
            load_base(directory, dtype=dtype)


def test_overflow_suggests_another_dtype(tmp_path: Path) -> None:
    directory = tiny_base_directory(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(directory)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(1e5)
    model.save_pretrained(directory)
    load_base(str(directory))
    with pytest.raises(NumericsError, match="Set `dtype=` to bfloat16"):
        load_base(str(directory), dtype="float16")
