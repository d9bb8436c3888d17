from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from embedcache.carryon.branch.config import BranchConfig
from embedcache.carryon.branch.model import Branch
from embedcache.carryon.protocol import CarryOn
from embedcache.carryon.saving import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    CarryOnRecord,
    load_carryon,
    save_carryon,
)
from embedcache.errors import CarryOnError


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, CarryOn]:
    config = BranchConfig(width=32, taps=("final", "layer_1"), token_input=True)
    model = Branch(config, 16)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    torch.nn.init.normal_(model.mean_LH)
    record = CarryOnRecord(
        config=config, base={"hidden_size": 16}, training={"lr": 1}, cache={}, results={"a": [1]}
    )
    save_carryon(tmp_path / "c", model, record)
    return tmp_path / "c", model


def test_what_is_saved_is_loaded_bit_for_bit(saved):
    folder, model = saved
    loaded, record = load_carryon(folder)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert not loaded.training
    assert record.config == model.config
    assert (record.training, record.results) == ({"lr": 1}, {"a": [1]})
    assert sorted(path.name for path in folder.iterdir()) == [WEIGHTS_FILE, CONFIG_FILE]


def weights(change):
    def damage(folder: Path) -> None:
        values = load_file(folder / WEIGHTS_FILE)
        change(values)
        save_file(values, folder / WEIGHTS_FILE)

    return damage


def config(change):
    def damage(folder: Path) -> None:
        value = json.loads((folder / CONFIG_FILE).read_text())
        change(value)
        (folder / CONFIG_FILE).write_text(json.dumps(value))

    return damage


def cut(name: str, share: float):
    def damage(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(len(data) * share)])

    return damage


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (weights(lambda w: w.pop("gate.bias")), "gate.bias"),
        (weights(lambda w: w.update(more=torch.zeros(1))), "more"),
        (weights(lambda w: w.update({"norm.weight": torch.zeros(7)})), "norm.weight"),
        (weights(lambda w: w["norm.weight"].fill_(float("nan"))), "not finite"),
        (weights(lambda w: w["mean_LH"].fill_(float("inf"))), "not finite"),
        (cut(WEIGHTS_FILE, 0.9), WEIGHTS_FILE),
        (cut(WEIGHTS_FILE, 0.0), WEIGHTS_FILE),
        (lambda folder: (folder / WEIGHTS_FILE).unlink(), WEIGHTS_FILE),
        (lambda folder: (folder / CONFIG_FILE).unlink(), "not a finished carry-on"),
        (cut(CONFIG_FILE, 0.5), "damaged"),
        (lambda folder: (folder / CONFIG_FILE).write_text("[]"), "damaged"),
        (lambda folder: (folder / CONFIG_FILE).write_bytes(b"\xff\xfe"), "damaged"),
        (config(lambda c: c.update(format=2)), "upgrade"),
        (config(lambda c: c.pop("results")), "results"),
        (config(lambda c: c["base"].pop("hidden_size")), "hidden_size"),
        (config(lambda c: c.update(base=3)), "damaged"),
        (config(lambda c: c["carryon"].update(width=64)), WEIGHTS_FILE),
        (config(lambda c: c["carryon"].update(widht=64)), "width"),
    ],
)
def test_damage_is_an_error_that_names_the_file(saved, damage, words):
    folder, _ = saved
    damage(folder)
    with pytest.raises(CarryOnError, match=words):
        load_carryon(folder)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(CarryOnError, match="not a finished carry-on"):
        load_carryon(tmp_path / "none")
