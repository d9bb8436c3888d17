"""The public names of `embedcache`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import World

import embedcache

HEAVY = ("numpy", "torch", "transformers", "zarr", "pydantic")


def test_importing_embedcache_imports_nothing_heavy():
    code = f"import embedcache, sys; print(sorted(set({HEAVY}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", [name for name in embedcache.__all__ if name != "__version__"])
def test_every_public_name_is_there_and_documented(name):
    value = getattr(embedcache, name)
    assert value.__name__ == name
    assert value.__doc__
    assert name in dir(embedcache)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = embedcache.trian


def test_from_text_to_generated_text(world: World, tmp_path: Path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(12):
        (folder / f"{number}.txt").write_text(f"the quick brown fox jumps over dog {number} " * 8)
    base = str(world.base_path)
    embedcache.extract(str(folder), base=base, out=str(tmp_path / "cache"), device="cpu")
    embedcache.train(
        str(tmp_path / "cache"), out=str(tmp_path / "carryon"), epochs=2, width=32, device="cpu"
    )
    found = embedcache.evaluate(tmp_path / "carryon", tmp_path / "cache", device="cpu")
    assert f"{found.base_cross_entropy:.4f}" in str(found)
    with embedcache.load(tmp_path / "carryon", base, device="cpu") as model:
        text = embedcache.generate(model, "the quick", max_new_tokens=5)
        plain = embedcache.generate(model, "the quick", max_new_tokens=5, alpha=0.0)
        assert isinstance(text, str)
        assert model.alpha == 1.0
        ids = model.base.tokenizer("the quick", return_tensors="pt")
        own = model.base.tokenizer.decode
        model.alpha = 0.0
        output = model.model.generate(**ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
        assert own(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True) == plain
        with pytest.raises(embedcache.UsageError, match="Did you mean 'max_new_tokens'"):
            embedcache.generate(model, "the quick", max_new_token=5)
