"""The caches that are to be joined: whether they are alike, and whose documents are whose."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from embedcache.base.identity import BaseIdentity
from embedcache.cache.cache import Cache
from embedcache.cache.format.layout import SPLITS
from embedcache.cache.manifest.digests import Digests
from embedcache.cache.tokens.files import TokenFiles
from embedcache.cache.tokens.reader import SplitTokens
from embedcache.cache.tokens.tables import SplitTables
from embedcache.errors import IdentityError, UsageError
from embedcache.progress import Bar, Progress

Array = np.ndarray[Any, Any]


class Part:
    """One of the caches."""

    def __init__(self, path: Path):
        self.path = path
        self.cache = Cache(path)
        self.settings = self.cache.attributes.settings
        seal = self.cache.manifest.tokens
        self.sealed = {name: TokenFiles(path, name, seal) for name in SPLITS}
        self.tokens = {
            name: SplitTokens(path, name, self.settings.block_tokens, self.sealed[name])
            for name in SPLITS
        }
        self.tables = {name: SplitTables.read(tokens) for name, tokens in self.tokens.items()}

    @property
    def bytes(self) -> int:
        """Bytes of its blocks, tokens and tables."""
        splits = self.cache.manifest.splits.values()
        return sum(s.bytes for s in splits) + sum(s.bytes for s in self.sealed.values())

    @property
    def shared_bytes(self) -> int:
        """Bytes of what all parts have the same of: the base and the codec."""
        manifest = self.cache.manifest
        return sum(r.bytes for seal in (manifest.base, manifest.codec) for r in seal.files)

    def digests(self, split: str, bar: Bar) -> list[str]:
        """Return a hash of each document's tokens and targets."""
        tokens = self.tokens[split]
        hashes = [hashlib.sha256() for _ in self.tables[split].names]
        for block in range(tokens.blocks):
            ids_N, mask_N = tokens.used(block)
            for document, (a, b) in zip(
                tokens.documents(block).tolist(), tokens.offsets(block).tolist(), strict=True
            ):
                hashes[document].update(b"%d:" % (b - a))
                hashes[document].update(ids_N[a:b].tobytes() + mask_N[a:b].tobytes())
            bar.advance(1)
        return [found.hexdigest() for found in hashes]


def require_alike(first: Part, other: Part) -> None:
    """Raise ``IdentityError`` unless two parts' blocks can lie in one cache."""
    BaseIdentity.from_dict(first.cache.attributes.base).require(
        BaseIdentity.from_dict(other.cache.attributes.base),
        this=f"the cache {first.path}",
        that=f"the cache {other.path}",
    )
    for key in ("codec", "taps", "top_ids", "context", "block_tokens"):
        one, two = getattr(first.settings, key), getattr(other.settings, key)
        if one != two:
            raise IdentityError(
                f"expected caches of one {key}, found {one!r} in {first.path} and {two!r} in "
                f"{other.path}. Extract one of them again with the other's."
            )
    if not _same(first.cache.manifest.codec, other.cache.manifest.codec):
        raise IdentityError(
            f"{first.path} and {other.path} were coded with different calibrations of the codec "
            f"'{first.settings.codec}', expected the very same. Extract both corpora into one "
            "cache, or with --codec int8 or bf16."
        )
    if not _same(first.cache.manifest.base, other.cache.manifest.base):
        raise IdentityError(
            f"{first.path} and {other.path} keep the head of their base in different forms: they "
            "were extracted with another --dtype, or version. Extract one of them again."
        )


def _same(one: Digests, two: Digests) -> bool:
    """Whether two seals are of the same content, however Zarr spells its metadata."""
    files = [{(record.path, record.sha256) for record in seal.files} for seal in (one, two)]
    metadata = [{k: json.loads(v) for k, v in seal.metadata.items()} for seal in (one, two)]
    return files[0] == files[1] and metadata[0] == metadata[1]


def require_apart(parts: list[Part], progress: Progress) -> None:
    """Raise ``UsageError`` where a document is in two parts.

    It is the same by its tokens and targets: in another split whatever its name is, in the same
    split if that is the same, too.
    """
    seen: dict[str, list[tuple[Part, str, str]]] = {}
    total = sum(tokens.blocks for part in parts for tokens in part.tokens.values())
    with progress.bar("comparing documents", total, "blocks") as bar:
        for part in parts:
            own: list[tuple[str, tuple[Part, str, str]]] = []
            for split in SPLITS:
                digests = part.digests(split, bar)
                for name, digest in zip(part.tables[split].names, digests, strict=True):
                    for other, its_split, its_name in seen.get(digest, ()):
                        if its_split != split:
                            raise UsageError(
                                f"the document '{name}' is in {its_split} of {other.path}"
                                f"{'' if name == its_name else f', as {its_name!r},'} and in "
                                f"{split} of {part.path}: a carry-on would be tested on what it "
                                "was trained on. Delete it from one of them first: embedcache "
                                f"delete {part.path} --document '{name}'"
                            )
                        if its_name == name:
                            raise UsageError(
                                f"the document '{name}' is in {other.path} and in {part.path}: it "
                                "would be trained on twice. Delete it from one of them first: "
                                f"embedcache delete {part.path} --document '{name}'"
                            )
                    own.append((digest, (part, split, name)))
            for digest, place in own:
                seen.setdefault(digest, []).append(place)


def merged_names(parts: list[Part]) -> list[dict[str, str]]:
    """Return each part's documents' names in the merged cache: ``a@2`` where ``a`` was taken.

    That is how one corpus names documents of two sources; pieces of a file stay together.
    """
    taken: set[str] = set()
    found = []
    for part in parts:
        names = [name for split in SPLITS for name in part.tables[split].names]
        wholes = dict.fromkeys(re.sub(r"#\d+$", "", name) for name in names)
        free = {
            whole: next(
                new
                for new in itertools.chain(
                    [whole], (f"{whole}@{count}" for count in itertools.count(2))
                )
                if new not in taken and (new == whole or new not in wholes)
            )
            for whole in wholes
        }
        taken |= set(free.values())
        found.append(
            {
                name: free[whole] + name[len(whole) :]
                for name in names
                for whole in [re.sub(r"#\d+$", "", name)]
            }
        )
    return found
