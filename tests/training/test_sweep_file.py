"""Files that name many runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from embedcache.carryon.branch.config import BranchConfig
from embedcache.errors import UsageError
from embedcache.training.config import TrainConfig
from embedcache.training.sweep import read_sweep


def sweep(tmp_path: Path, text: str, **flags) -> dict[str, TrainConfig]:
    (tmp_path / "s.toml").write_text(text)
    return read_sweep(tmp_path / "s.toml", flags)


def test_a_grid_and_a_list_are_crossed(tmp_path):
    found = sweep(
        tmp_path,
        """
        epochs = 3
        carryon = { blocks = 1 }
        [grid]
        lr = [1e-3, 0.5]
        "carryon.width" = [32, 64]
        [[runs]]
        name = "alice"
        documents = ["alice/*"]
        [[runs]]
        name = "bob"
        documents = ["bob/*", "b.txt"]
        seed = 3
        """,
        patience=7,
    )
    assert list(found) == [
        f"{who}-lr={lr}-width={width}"
        for who in ("alice", "bob")
        for lr in ("0.001", "0.5")
        for width in (32, 64)
    ]
    assert found["bob-lr=0.5-width=32"] == TrainConfig(
        epochs=3,
        lr=0.5,
        seed=3,
        patience=7,
        documents=("bob/*", "b.txt"),
        carryon=BranchConfig(blocks=1, width=32),
    )


def test_yaml_and_names_from_settings(tmp_path):
    path = tmp_path / "s.yaml"
    path.write_text("runs:\n- {lr: 0.01}\n- {lr: 0.02, carryon.taps: [final, layer_1]}\n")
    assert list(read_sweep(path)) == ["lr=0.01", "lr=0.02-taps=final+layer_1"]


def test_flags_win_over_what_runs_share_not_over_the_grid(tmp_path):
    found = sweep(tmp_path, "lr = 0.5\nepochs = 9\n[grid]\nepochs = [1, 2]", lr=0.1, epochs=5)
    assert [(c.lr, c.epochs) for c in found.values()] == [(0.1, 1), (0.1, 2)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[grid]\nlearning_rate = [1]", "`learning_rate=` is no setting"),
        ("[grid]\nlrr = [0.1]", r"run 'lrr=0.1': `lrr=` is no setting .* Did you mean 'lr'"),
        ("[grid]\n'carryon.widht' = [64]", "Did you mean 'width'"),
        ("[gird]\nlr = [0.1]", "Did you mean 'grid'"),
        ("[grid]\nlr = 0.1", "a table of lists"),
        ("[grid]\nlr = []", "a table of lists"),
        ("grid = 3", "a table of lists"),
        ("runs = []", "a list of tables"),
        ("[runs]\nlr = 1.0", "a list of tables"),
        ("[[runs]]\nname = 'a'\n[[runs]]\nname = 'a'", "two runs are called 'a'"),
        ("[[runs]]\nname = 3", "must be text"),
        ("[grid]\nlr = [-1.0]", "run 'lr=-1': `lr=` should be greater than 0"),
        ("[grid]\nseed = [0, 0]", "two runs are called 'seed=0'"),
        ("[[runs]]\ndocuments = 3", "`documents=` should be a valid tuple"),
        (f"[grid]\nseed = {[0] * 200}\nlr = {[1] * 200}", "40,000"),
    ],
)
def test_files_that_cannot_be(tmp_path, text, words):
    with pytest.raises(UsageError, match=words):
        sweep(tmp_path, text)


def test_a_name_never_leaves_its_folder(tmp_path):
    found = sweep(tmp_path, "[[runs]]\nname = '../../etc/x y'")
    assert list(found) == ["_.._etc_x_y"]
