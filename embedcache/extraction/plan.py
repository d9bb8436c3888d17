"""Pass 0 as a verb: tokenise and seal a corpus, or find the sealed plan of an earlier run."""

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
from embedcache.errors import OutputError
from embedcache.extraction.prediction import require_floor
from embedcache.progress import Progress
from embedcache.store.files import STAGING
from embedcache.store.lease import LEASES, WRITERS, taken_over


@dataclass(frozen=True, slots=True, kw_only=True)
class Earlier:
    """The finished cache that a corpus is to be added to: its manifest's hash, its documents."""

    manifest: str
    documents: Iterable[CachedDocument]


def check_out(out: Path) -> None:
    """Raise ``OutputError`` or ``CacheError`` unless ``out`` is absent, empty or a cache of ours.

    What an interrupted pass 0 left is removed later, so nothing that may be another's is taken
    for that: names alone do not make a folder ours.
    """
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} is a file, expected a folder for the cache: give another --out")
    if (out / "zarr.json").is_file():
        read_attributes(out)
        return
    if not out.exists():
        return
    foreign = [path.name for path in sorted(out.iterdir()) if not _left_behind(path)]
    if foreign:
        raise OutputError(
            f"{out} holds something else ({', '.join(foreign[:3])}): expected an empty or new "
            "folder, or a cache to go on with. Give another --out."
        )


def _left_behind(path: Path) -> bool:
    """Whether a path in an unsealed folder is what a pass 0 that was killed leaves there."""
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
    check_disk: bool = True,
    onto: Earlier | None = None,
) -> CacheAttributes:
    """Run pass 0 into ``out`` and return its attributes; on any error nothing is left of it.

    It is made in ``staging`` and moved into place if this process ``holds`` the turn to do so
    still: one that slept past its lease's expiry leaves it to the process that has it now. A disk
    that is too small for sure for what is to come is refused, unless not to be looked at. Only what
    is new is taken where it is to come ``onto`` another cache.
    """
    staging = (staging or out / STAGING) / "pass0"
    _clear(out)
    try:
        staging.mkdir(parents=True)
        sealer = TokensWriter(out, staging, settings.block_tokens)
        held = () if onto is None else onto.documents
        reader = tokenise(sealer, corpus, tokenizer, progress, held=held)
        if check_disk:
            tokens = {name: split.tokens for name, split in sealer.splits.items()}
            require_floor(tokens, settings, identity.hidden_size, out)
        attributes = CacheAttributes(
            base=identity.to_dict(),
            corpus={"config": corpus.to_dict(), "summary": asdict(reader.summary)}
            | ({} if onto is None else {"onto": onto.manifest}),
            settings=settings,
            environment=environment,
        )
        if not holds():
            raise taken_over(out)
        sealer.publish(attributes, hidden=identity.hidden_size)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        if not (out / "zarr.json").is_file() and holds():
            _clear(out)
        raise
    shutil.rmtree(staging, ignore_errors=True)
    return attributes


def remove_tokens(out: Path) -> None:
    """Remove what `write_tokens` sealed, before any block is there."""
    (out / "zarr.json").unlink()  # first: without it the rest is what a killed pass 0 leaves
    _clear(out)


def tokenise(
    sealer: TokensWriter,
    corpus: CorpusConfig,
    tokenizer: Any,
    progress: Progress,
    *,
    held: Iterable[CachedDocument] = (),
) -> CorpusReader:
    """Write the tokens of a corpus to the sealer's staging folder; the reader has the counts."""
    reader = CorpusReader(corpus, tokenizer, held)
    with progress.bar("tokenising", None, "tok") as bar:
        for document in reader:
            sequences = [(s.ids, s.loss_mask, s.span) for s in document.sequences]
            sealer.splits[document.split].append_document(
                document.index, document.name, document.fingerprint.packed(), sequences
            )
            bar.advance(sum(len(ids) for ids, _, _ in sequences))
    sealer.close()
    return reader


def _clear(out: Path) -> None:
    """Remove what a pass 0 wrote that was never sealed."""
    (out / TOKENS_DIGESTS).unlink(missing_ok=True)
    for leftover in (out / STAGING, out / CODEC, out / DIGESTS, *(out / split for split in SPLITS)):
        shutil.rmtree(leftover, ignore_errors=True)


def sealed_attributes(
    out: Path,
    corpus: CorpusConfig | None,
    identity: BaseIdentity,
    settings: ExtractSettings | None,
    environment: dict[str, Any],
) -> CacheAttributes | None:
    """Return the attributes of a plan sealed earlier; None where there is none yet.

    Raises ``OutputError`` if that plan is of another corpus, base, setting or device; a corpus or
    settings that are None are not compared.
    """
    if not (out / "zarr.json").is_file():
        return None
    found = read_attributes(out)
    BaseIdentity.from_dict(found.base).require(identity, this=f"the cache {out}", that="--base")
    keys = ("device_type", "dtype", "attention")
    pairs = [("environment", found.environment, {key: environment[key] for key in keys})]
    if settings is not None:
        pairs.insert(0, ("extraction", asdict(found.settings), asdict(settings)))
    if corpus is not None and "parts" in found.corpus:
        raise OutputError(
            f"{out} was merged from {len(found.corpus['parts'])} caches, expected one that was "
            "extracted. To repair it, name no corpus and no settings; type: embedcache extract "
            f"--repair --base {found.base['name']} --out {out}. To add to it, type --append"
        )
    if corpus is not None:
        pairs.insert(0, ("corpus", found.corpus["config"], corpus.to_dict()))
    for what, old, new in pairs:
        for key in new:
            if _plain(old.get(key)) != _plain(new[key]):
                raise OutputError(
                    f"{out} was begun with another {what} setting: {key} was {old.get(key)!r}, now "
                    f"{new[key]!r}. Run with the first to go on, or give another --out."
                )
    return found


def own_corpus(attributes: CacheAttributes) -> CorpusConfig | None:
    """Return the corpus that a cache was made of; None for one that was merged from several."""
    own = attributes.corpus.get("config")
    return None if own is None else CorpusConfig.from_dict(own)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def environment_for(out: Path, device: torch.device, dtype: str) -> dict[str, Any]:
    """Return the numeric environment to extract in.

    A dtype of ``auto`` is that which ``out`` was begun in, so that another CPU may go on with it,
    and the device's fast one for a new cache. Raises ``UsageError`` for an unknown one.
    """
    if dtype == "auto" and (out / "zarr.json").is_file():
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
