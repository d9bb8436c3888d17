"""Opening a finished cache."""

from __future__ import annotations

from pathlib import Path

import torch
import zarr

from embedcache.cache.base_arrays import read_base_array
from embedcache.cache.format.layout import ATTRIBUTE, CacheAttributes
from embedcache.cache.manifest.manifest import Manifest, read_manifest
from embedcache.cache.shards.errors import REPAIR_HINT, translate_read_errors
from embedcache.cache.split_reader import SplitReader
from embedcache.errors import CacheError, nearest


class Cache:
    """A finished cache: its attributes, its manifest, its splits and the base's head.

    Opening reads a few small files, whatever the size of the cache. Blocks, tables and digest
    tables are read and checked when they are used. A cache contains its corpus: token ids in clear.

    Example::

        cache = Cache("my-cache")
        train = cache.split("train")
        block = train.block(0)
        x_NH = block.x_NH["final"]         # bfloat16, one embedding for each token in block.ids_N
        first, stop = block.rows_S2[0]     # the rows of the block's first sequence
        head_VH = cache.base_array("head/weight")

    Args:
        path: the cache's folder.

    Attributes:
        path: the cache's folder.
        attributes: what the cache was made from: base, corpus, settings, environment.
        manifest: the counts and digests of the finished cache; ``manifest.hash`` identifies it.

    Raises:
        CacheError: the cache is missing, unfinished or of a newer schema, or its metadata, head or
            calibration is damaged.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.attributes = read_attributes(self.path)
        self.manifest: Manifest = read_manifest(self.path)
        self.manifest.tokens.check(self.path)
        self.manifest.base.check(self.path)
        self.manifest.codec.check(self.path)

    def __repr__(self) -> str:
        settings = self.attributes.settings
        tokens = {name: split.tokens for name, split in self.manifest.splits.items()}
        return (
            f"Cache({str(self.path)!r}, tokens={tokens}, codec={settings.codec!r}, "
            f"taps={settings.taps})"
        )

    def split(self, name: str) -> SplitReader:
        """Return the reader of a split: ``train``, ``dev`` or ``test``.

        Raises ``CacheError`` if the split holds no sequence.
        """
        manifest = self.manifest.splits.get(name)
        if manifest is None or not manifest.sequences:
            filled = [key for key, split in self.manifest.splits.items() if split.sequences]
            raise CacheError(
                f"{self.path} has no '{name}' split (it has: {', '.join(filled)}). Documents are "
                f"dealt to splits: extract more documents, or give this split its own with "
                f"`{name}=`."
            )
        return SplitReader(self.path, name, self.attributes, manifest, self.manifest.tokens)

    def has(self, name: str) -> bool:
        """Whether a split holds any sequence."""
        return name in self.manifest.splits and self.manifest.splits[name].sequences > 0

    def require_taps(self, taps: tuple[str, ...]) -> None:
        """Raise ``CacheError`` unless every tap is stored."""
        stored = self.attributes.settings.taps
        for tap in taps:
            if tap not in stored:
                raise CacheError(
                    f"{self.path} stores no tap '{tap}' (it stores {', '.join(stored)})."
                    f"{nearest(tap, stored)} Extract again with "
                    f"`taps={(*stored, tap)}`"
                )

    def base_array(self, name: str) -> torch.Tensor | None:
        """Return a tensor of the base in the dtype in which it was saved, or None if absent.

        Args:
            name: ``head/weight`` [V, H], ``head/bias`` [V] or ``token_embedding/weight`` [V, H]
                (absent where it is tied to the head).

        Raises:
            CacheError: the array is damaged.
        """
        return read_base_array(self.path, name)

    def head_settings(self) -> dict[str, float | None]:
        """Return the settings of the base's head: scale, divisor, soft-cap."""
        head = self.path / "base" / "head"
        with translate_read_errors(head):
            return dict(zarr.open_group(head, mode="r").attrs)  # type: ignore[arg-type]


def read_attributes(path: Path) -> CacheAttributes:
    """Read a cache's root attributes; raises ``CacheError`` if ``path`` is not a cache."""
    if not path.exists():
        raise CacheError(f"no such cache: {path}. Make one with `embedcache.extract()`")
    root = path / "zarr.json"
    with translate_read_errors(root):
        group = zarr.open_group(path, mode="r") if root.is_file() else None
    if group is None or ATTRIBUTE not in group.attrs:
        raise CacheError(f"{path} is not an embedcache cache: expected {root} with its attributes")
    value = group.attrs[ATTRIBUTE]
    if not isinstance(value, dict):
        raise CacheError(f"{root} holds damaged embedcache attributes. {REPAIR_HINT}")
    return CacheAttributes.from_dict(value, path=path)
