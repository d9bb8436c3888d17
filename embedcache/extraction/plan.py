"""Planning a cache: tokenise the corpus into blocks, or read the plan of an earlier run.

Tokenising is pass 0. It fixes the number of blocks before the base is loaded.
"""

from __future__ import annotations

import platform
import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from embedcache import __version__
from embedcache.base.identity import BaseIdentity
from embedcache.cache.cache import read_attributes
from embedcache.cache.format.layout import (
    CODEC,
    DIGESTS,
    SPLITS,
    TOKENS_DIGESTS,
    CacheAttributes,
    ExtractSettings,
)
from embedcache.cache.tokens.writer import TokensWriter
from embedcache.corpus.config import CorpusConfig
from embedcache.corpus.dedup import CachedDocument
from embedcache.corpus.reader import CorpusReader
from embedcache.device import fast_dtype, resolve_dtype
from embedcache.errors import OutputError, UsageError
from embedcache.extraction.request import Request
from embedcache.progress import Progress
from embedcache.store.files import STAGING
from embedcache.store.lease import COORDINATOR, LEASES, WRITERS, Leases, taken_over


@dataclass(frozen=True, slots=True, kw_only=True)
class Earlier:
    """The finished cache that a corpus is appended to: its manifest's hash and its documents."""

    manifest: str
    documents: Iterable[CachedDocument]


def plan(
    request: Request, identity: BaseIdentity, folder: Path, leases: Leases | None = None
) -> CacheAttributes:
    """Return the attributes of the plan in ``folder``; tokenise the corpus if there is none.

    Args:
        request: the request. A plan in its ``out`` must have been made of the same request.
        identity: the identity of the base.
        folder: the cache, or a scratch folder.
        leases: the leases of this process on the cache.

    Raises:
        OutputError: for a plan of another request.
        UsageError: if there is neither a plan nor a corpus.
    """
    environment = environment_for(request.out, request.device, request.dtype)
    found = planned(request, identity, environment)
    if found is not None:
        return found
    if request.corpus is None or request.settings is None:
        raise UsageError(
            f"expected a corpus to extract, found none: {request.out} holds no cache that could "
            "be continued. Name a file or a folder"
        )
    return write_tokens(
        request.corpus,
        request.tokenizer(),
        identity,
        request.settings,
        environment,
        folder,
        request.progress,
        staging=None if leases is None else leases.staging,
        holds=lambda: leases is None or leases.holds(COORDINATOR),
    )


def planned(
    request: Request, identity: BaseIdentity, environment: dict[str, Any]
) -> CacheAttributes | None:
    """Return the attributes of the plan in the request's ``out``, or None if it has none.

    Raises ``OutputError`` if the plan has another corpus, base, setting or device. A corpus or
    settings of None agree with any plan.
    """
    out = request.out
    if not is_planned(out):
        return None
    found = read_attributes(out)
    BaseIdentity.from_dict(found.base).require(identity, this=f"the cache {out}", that="`base=`")
    if request.corpus is not None and "parts" in found.corpus:
        raise OutputError(
            f"{out} was merged from {len(found.corpus['parts'])} caches, expected one that was "
            "extracted. To repair it, call `embedcache.repair()` without a corpus and settings, "
            f"with `base=` {found.base['name']}. To add to it, call `embedcache.append()`"
        )
    keys = ("device_type", "dtype", "attention")
    pairs = [("environment", found.environment, {key: environment[key] for key in keys})]
    if request.settings is not None:
        pairs.insert(0, ("extraction", asdict(found.settings), asdict(request.settings)))
    if request.corpus is not None:
        pairs.insert(0, ("corpus", found.corpus["config"], request.corpus.to_dict()))
    for what, old, new in pairs:
        for key in new:
            if _plain(old.get(key)) != _plain(new[key]):
                raise OutputError(
                    f"{out} was begun with another {what} setting: {key} was {old.get(key)!r}, now "
                    f"{new[key]!r}. Use the first value to continue, or another `out=`"
                )
    return found


def is_planned(out: Path) -> bool:
    """Return whether the tokens of a cache are complete."""
    return (out / "zarr.json").is_file()


def check_out(out: Path) -> None:
    """Raise ``OutputError`` or ``CacheError`` unless ``out`` is absent, empty or a cache.

    What an interrupted pass 0 leaves is removed later, so a folder is recognised by more than the
    names in it.
    """
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} is a file, expected a folder for the cache: use another `out=`")
    if is_planned(out):
        read_attributes(out)
        return
    if not out.exists():
        return
    foreign = [path.name for path in sorted(out.iterdir()) if not _left_behind(path)]
    if foreign:
        raise OutputError(
            f"{out} holds something else ({', '.join(foreign[:3])}): expected an empty or new "
            "folder, or a cache to continue. Use another `out=`"
        )


def _left_behind(path: Path) -> bool:
    """Return whether an interrupted pass 0 leaves such a path in the folder of a cache."""
    if path.name in SPLITS:
        return (path / "zarr.json").is_file() and (path / "tokens").is_dir()
    if path.name == LEASES:
        return (path / WRITERS).is_dir() or not any(path.iterdir())
    if path.name in (STAGING, TOKENS_DIGESTS):
        return True
    if path.name == DIGESTS:
        return all((path / split).is_dir() for split in SPLITS)
    return path.name.startswith((".zarr.json.", f".{TOKENS_DIGESTS}."))


def write_tokens(
    corpus: CorpusConfig,
    tokenizer: Any,
    identity: BaseIdentity,
    settings: ExtractSettings,
    environment: dict[str, Any],
    out: Path,
    progress: Progress,
    *,
    staging: Path | None = None,
    holds: Callable[[], bool] = lambda: True,
    onto: Earlier | None = None,
) -> CacheAttributes:
    """Run pass 0 into ``out`` and return its attributes; nothing is left of it after an error.

    Args:
        corpus: the corpus.
        tokenizer: the tokenizer of the base.
        identity: the identity of the base.
        settings: the settings of the extraction.
        environment: the numeric environment.
        out: the folder of the cache.
        progress: shows a bar.
        staging: folder in which the tokens are made before they are moved into place.
        holds: returns whether this process may still move them: if it slept past the expiry of its
            lease, another process has begun anew.
        onto: a finished cache whose documents are left out.
    """
    staging = (staging or out / STAGING) / "pass0"
    _clear(out)
    try:
        staging.mkdir(parents=True)
        writer = TokensWriter(out, staging, settings.block_tokens)
        held = () if onto is None else onto.documents
        reader = tokenise(writer, corpus, tokenizer, progress, held=held)
        attributes = CacheAttributes(
            base=identity.to_dict(),
            corpus={"config": corpus.to_dict(), "summary": asdict(reader.summary)}
            | ({} if onto is None else {"onto": onto.manifest}),
            settings=settings,
            environment=environment,
        )
        if not holds():
            raise taken_over(out)
        writer.publish(attributes, hidden=identity.hidden_size)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        if not is_planned(out) and holds():
            _clear(out)
        raise
    shutil.rmtree(staging, ignore_errors=True)
    return attributes


def remove_tokens(out: Path) -> None:
    """Remove what `write_tokens` wrote, before any block is committed."""
    (out / "zarr.json").unlink()  # first: the rest then looks like an interrupted pass 0
    _clear(out)


def tokenise(
    writer: TokensWriter,
    corpus: CorpusConfig,
    tokenizer: Any,
    progress: Progress,
    *,
    held: Iterable[CachedDocument] = (),
) -> CorpusReader:
    """Write the tokens of a corpus to the writer's staging folder; return the reader."""
    reader = CorpusReader(corpus, tokenizer, held)
    with progress.bar("tokenising", None, "tok") as bar:
        for document in reader:
            sequences = [(s.ids, s.loss_mask, s.span) for s in document.sequences]
            writer.splits[document.split].append_document(
                document.index, document.name, document.fingerprint.packed(), sequences
            )
            bar.advance(sum(len(ids) for ids, _, _ in sequences))
    writer.close()
    return reader


def _clear(out: Path) -> None:
    """Remove what an interrupted pass 0 left."""
    (out / TOKENS_DIGESTS).unlink(missing_ok=True)
    for leftover in (out / STAGING, out / CODEC, out / DIGESTS, *(out / split for split in SPLITS)):
        shutil.rmtree(leftover, ignore_errors=True)


def corpus_of(attributes: CacheAttributes) -> CorpusConfig | None:
    """Return the corpus of a cache; None for a cache that was merged from several."""
    config = attributes.corpus.get("config")
    return None if config is None else CorpusConfig.from_dict(config)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def environment_for(out: Path, device: torch.device, dtype: str) -> dict[str, Any]:
    """Return the numeric environment of an extraction.

    A dtype of ``auto`` is the dtype of the cache at ``out``, so that another CPU can continue it,
    or the fast dtype of the device for a new cache. Raises ``UsageError`` for an unknown dtype.
    """
    if dtype == "auto" and is_planned(out):
        dtype = read_attributes(out).environment["dtype"]
    found = fast_dtype(device) if dtype == "auto" else resolve_dtype(dtype, device)
    return environment_of(device, found)


def environment_of(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Return the numeric environment that a cache records."""
    import transformers
    import zarr

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "embedcache": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "zarr": zarr.__version__,
        "device_type": device.type,
        "device": name,
        "dtype": str(dtype).removeprefix("torch."),
        "attention": "sdpa",
    }
