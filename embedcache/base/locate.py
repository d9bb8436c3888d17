"""What a user types for a base, turned into a local directory in transformers' layout."""

from __future__ import annotations

import re
from pathlib import Path

from embedcache.base.builtin import BUILTINS, PREFIX, builtin_gguf
from embedcache.base.reason import reason
from embedcache.errors import BaseModelError, UsageError, nearest

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_NEEDED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
# Folders hold other formats of the same weights; consolidated* is Mistral's own copy of them.
_UNNEEDED = ["*/*", "consolidated*"]


def locate(spec: str, *, revision: str | None = None, fetch: bool = True) -> Path:
    """Return the local directory of the base that ``spec`` names, fetching or converting it once.

    ``spec`` is ``builtin:NAME``, a ``.gguf`` file, a directory with a config.json, or a hub id
    ``org/name``, whose revision is given as ``org/name@revision`` or as ``revision``. Without
    ``fetch`` the network is not asked: a hub id is found only where it was fetched before.
    Raises ``BaseModelError`` if there is none, ``UsageError`` for a revision that cannot apply.
    """
    path = Path(spec).expanduser()
    is_builtin = spec.startswith(PREFIX)
    if is_builtin or (spec and path.exists()):
        if revision is not None:
            raise UsageError(
                f"a revision is for a hub id, org/name; {spec} has none. Leave --revision away."
            )
        if is_builtin:
            return _convert(builtin_gguf(spec))
        if path.is_dir():
            return _checked(path)
        if path.suffix.lower() == ".gguf":
            return _convert(path)
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


def named(spec: str, revision: str | None) -> str:
    """Return what the user typed as one word: ``spec``, with ``@revision`` where one was given.

    >>> named("org/name", "v1.0")
    'org/name@v1.0'
    """
    return spec if revision is None or "@" in spec else f"{spec}@{revision}"


def _checked(directory: Path) -> Path:
    if not (directory / "config.json").is_file():
        raise BaseModelError(
            f"a base's directory holds config.json, *.safetensors and tokenizer files; found no "
            f"config.json in {directory}. For a GGUF file, give the file itself."
        )
    return directory


def _convert(gguf: Path) -> Path:
    from embedcache.base.gguf import converted_gguf

    return converted_gguf(gguf)


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

    shown = named(hub_id, revision)
    quiet = are_progress_bars_disabled()
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
            f"{shown} is gated: ask for access on its page, then type: hf auth login"
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise BaseModelError(
            f"the hub has no {shown}, and there is no directory {hub_id} here. Check the spelling; "
            "for a private model, type: hf auth login"
        ) from error
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        if not fetch:
            raise BaseModelError(
                f"{shown} is not a directory here, nor among what was fetched from the hub. "
                "Give the base's directory with --base."
            ) from error
        raise BaseModelError(
            f"{shown} is not a directory here, and could not be downloaded from the hub: "
            f"{reason(error)} Check the network (or HF_ENDPOINT), give a local directory, or try "
            f"--base {next(iter(BUILTINS))}"
        ) from error
    finally:
        if not quiet:
            enable_progress_bars()
