"""What changes a base's identity, and how often its weights are read."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.tiny import tiny_base_directory

from embedcache.base import home
from embedcache.base.identity import BaseIdentity, identify
from embedcache.errors import BaseModelError, IdentityError
from embedcache.store.files import hash_file, publish_json


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny_base_directory(tmp_path / "base")


def edit_json(path: Path, change: Callable[[dict], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value, indent=4))


def flip_last_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def differing(one: BaseIdentity, other: BaseIdentity) -> list[str]:
    parts = ("weights", "config", "tokenizer", "chat_template")
    found = [part for part in parts if getattr(one, part) != getattr(other, part)]
    assert (one.fingerprint != other.fingerprint) is bool(found)
    return found


CHANGES: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "weights byte": (lambda d: flip_last_byte(d / "model.safetensors"), ["weights"]),
    "rope": (
        lambda d: edit_json(
            d / "config.json", lambda c: c["rope_parameters"].update(rope_theta=5.0)
        ),
        ["config"],
    ),
    "merge rule": (
        lambda d: edit_json(d / "tokenizer.json", lambda t: t["model"]["merges"].pop()),
        ["tokenizer"],
    ),
    "eos token": (
        lambda d: edit_json(
            d / "tokenizer_config.json", lambda t: t.update(eos_token="<|im_end|>")
        ),
        ["tokenizer"],
    ),
    "template byte": (lambda d: flip_last_byte(d / "chat_template.jinja"), ["chat_template"]),
    "library version": (
        lambda d: edit_json(d / "config.json", lambda c: c.update(transformers_version="4.0")),
        [],
    ),
    "saved dtype": (
        lambda d: edit_json(d / "config.json", lambda c: c.update(dtype="bfloat16")),
        [],
    ),
    "last truncation": (
        lambda d: edit_json(d / "tokenizer.json", lambda t: t.update(truncation={"max_length": 9})),
        [],
    ),
    "key order": (
        lambda d: (d / "config.json").write_text(
            json.dumps(dict(reversed(json.loads((d / "config.json").read_text()).items())))
        ),
        [],
    ),
    "readme": (lambda d: (d / "README.md").write_text("hello"), []),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_a_file_changes_its_part_of_the_identity(base: Path, change: str) -> None:
    make, expected = CHANGES[change]
    before = identify(base, name="a")
    make(base)
    assert differing(before, identify(base, name="a")) == expected


def test_identity_has_name_architecture_and_sizes(base: Path, tmp_path: Path) -> None:
    identity = identify(base, name="mine")
    assert identity.name == "mine"
    assert identity.architecture == "LlamaForCausalLM"
    assert (identity.hidden_size, identity.vocab_size, identity.num_layers) == (32, 384, 3)
    copied = identify(shutil.copytree(base, tmp_path / "copy"), name="other")
    assert copied.fingerprint == identity.fingerprint
    gpt2 = identify(tiny_base_directory(tmp_path / "gpt2", "gpt2"), name="gpt2")
    assert (gpt2.hidden_size, gpt2.vocab_size, gpt2.num_layers) == (32, 384, 3)


def test_sizes_missing_from_the_config_come_from_transformers(base: Path) -> None:
    edit_json(base / "config.json", lambda c: c.pop("vocab_size"))
    assert identify(base, name="a").vocab_size == 32000


def test_template_inside_the_tokenizer_config(base: Path) -> None:
    """Older directories store the template there; both places give the same identity."""
    template = base / "chat_template.jinja"
    before = identify(base, name="a")
    text = template.read_text()
    edit_json(base / "tokenizer_config.json", lambda t: t.update(chat_template=text))
    template.unlink()
    assert differing(before, identify(base, name="a")) == []


def test_vocabulary_files_without_a_tokenizer_json(base: Path) -> None:
    (base / "tokenizer.json").unlink()
    with pytest.raises(BaseModelError, match="needs its tokenizer"):
        identify(base, name="a")
    (base / "tokenizer.model").write_bytes(b"one")
    one = identify(base, name="a")
    (base / "tokenizer.model").write_bytes(b"two")
    assert differing(one, identify(base, name="a")) == ["tokenizer"]


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that are hashed, in order."""
    read: list[Path] = []

    def record(path: Path) -> str:
        read.append(path)
        return hash_file(path)

    monkeypatch.setattr(home, "hash_file", record)
    return read


def settle(path: Path) -> None:
    then = time.time() - 60
    os.utime(path, (then, then))


def test_weights_are_read_once(base: Path, hashed: list[Path], own_home: Path) -> None:
    weights = base / "model.safetensors"
    settle(weights)
    first = identify(base, name="a")
    assert hashed == [weights]
    assert identify(base, name="a") == first
    assert hashed == [weights]

    (own_home / "hashes.json").write_bytes(b'{"half a fi')
    assert identify(base, name="a") == first
    assert len(hashed) == 2
    assert identify(base, name="a") == first
    assert len(hashed) == 2

    flip_last_byte(weights)
    settle(weights)
    os.utime(weights, ns=(0, weights.stat().st_mtime_ns + 1))
    assert differing(first, identify(base, name="a")) == ["weights"]
    assert len(hashed) == 3


def test_a_damaged_stored_hash_is_ignored(base: Path, own_home: Path) -> None:
    settle(base / "model.safetensors")
    first = identify(base, name="a")
    store = own_home / "hashes.json"
    for damage in ("short", None, 7):
        stored = json.loads(store.read_text())
        (entry,) = stored.values()
        entry["sha256"] = damage
        publish_json(store, stored)
        assert identify(base, name="a") == first
    store.write_text("[]")
    assert identify(base, name="a") == first


def test_the_hash_of_a_new_file_is_not_stored(base: Path, hashed: list[Path]) -> None:
    """Two writes within one tick of the clock give the same size and time."""
    weights = base / "model.safetensors"
    before = weights.stat()
    first = identify(base, name="a")
    flip_last_byte(weights)
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert differing(first, identify(base, name="a")) == ["weights"]


def test_weights_in_the_hubs_cache_are_not_read(base: Path, hashed: list[Path]) -> None:
    before = identify(base, name="a")
    weights = base / "model.safetensors"
    blob = base.parent / "blobs" / hash_file(weights)
    blob.parent.mkdir()
    weights.rename(blob)
    weights.symlink_to(blob)
    hashed.clear()
    assert identify(base, name="a") == before
    assert hashed == []
    # A link to a file that is not named by its hash is read.
    elsewhere = blob.rename(base.parent / "blobs" / "weights")
    weights.unlink()
    weights.symlink_to(elsewhere)
    assert identify(base, name="a") == before
    assert hashed == [elsewhere.resolve()]


def test_to_dict_and_from_dict(base: Path) -> None:
    identity = identify(base, name="org/name@v1")
    d = json.loads(json.dumps(identity.to_dict()))
    assert BaseIdentity.from_dict(d) == identity
    with pytest.raises(IdentityError, match=r"'wieghts'.*Did you mean 'weights'"):
        BaseIdentity.from_dict({**d, "wieghts": "0"})
    with pytest.raises(IdentityError, match="changed by hand"):
        BaseIdentity.from_dict({**d, "weights": "0" * 64})
    del d["name"]
    with pytest.raises(IdentityError, match="missing are name"):
        BaseIdentity.from_dict(d)


def test_require_names_both_bases_and_the_differing_parts(base: Path, tmp_path: Path) -> None:
    one = identify(base, name="one")
    one.require(identify(base, name="another name"), this="the cache c", that="the base b")
    other = identify(tiny_base_directory(tmp_path / "b", seed=1), name="two")
    with pytest.raises(IdentityError) as caught:
        one.require(other, this="the cache c", that="the base b")
    message = str(caught.value)
    for words in (
        "the cache c has one",
        "the base b has two",
        "differ in: weights.",
        "`base=` to one",
    ):
        assert words in message
    assert other.fingerprint[:12] in message
    flip_last_byte(base / "chat_template.jinja")
    with pytest.raises(IdentityError, match=r"chat template\. The files of one have changed"):
        one.require(identify(base, name="one"), this="the cache c", that="the base b")


def test_pickles_are_refused(base: Path) -> None:
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    with pytest.raises(BaseModelError, match=r"only pytorch_model.bin, a pickle.*save_pretrained"):
        identify(base, name="a")
    (base / "pytorch_model.bin").unlink()
    with pytest.raises(BaseModelError, match="found none in"):
        identify(base, name="a")


def test_an_adapter_is_refused(base: Path) -> None:
    (base / "adapter_config.json").write_text("{}")
    with pytest.raises(BaseModelError, match="merge_and_unload"):
        identify(base, name="a")


def test_damaged_json_is_an_error(base: Path) -> None:
    (base / "config.json").write_text("{")
    with pytest.raises(BaseModelError, match=r"config\.json should hold JSON"):
        identify(base, name="a")
    (base / "config.json").write_text("[]")
    with pytest.raises(BaseModelError, match="found a list"):
        identify(base, name="a")


def test_imports_stay_light() -> None:
    modules = ["", ".identity", ".locate", ".home", ".gguf", ".pretrained"]
    code = "".join(f"import embedcache.base{name}\n" for name in modules)
    code += "import sys; print({'torch', 'transformers', 'huggingface_hub'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
