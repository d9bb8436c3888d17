"""Where things lie in a cache, and the attributes of its root.

zarr.json                          root group; its attributes are a `CacheAttributes`
<split>/tokens/{ids,loss_mask,span}       [blocks * R, ...]  one chunk a block
<split>/tokens/offsets                    [sequences, 2]     first row, row past the last
<split>/tokens/document                   [sequences]        index into documents
<split>/tokens/blocks                     [blocks + 1]       first sequence of each block
<split>/documents/{index,name_bytes,name_offsets}            corpus index and UTF-8 name
<split>/documents/fingerprint             [documents, bytes] see `corpus.dedup`
<split>/embeddings/<tap>                  [blocks * R, hidden]  one shard a block
<split>/scale/<tap>                       [blocks * R]       (int8 only)
<split>/head/top_ids                      [blocks * R, k]    (optional) see `LIKELY`
codec/<tap>/{mean,centre,predictor,inverse}   (transform only) see `cache.codecs.transform`
base/head/{weight,bias}, base/token_embedding/weight
digests/<split>/{sealed,embeddings,quarantined}   see `cache.blocks.files`, `cache.tokens.files`
sealed.json                                 vouches for what pass 0 wrote, digests/<split>/sealed
commits/<split>/<block>.<generation>.json   one marker a committed block
manifest.json                               published last; vouches for all digest tables
leases/                                     while processes write: `embedcache.store.lease`
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from embedcache.cache.codecs.integers import ARRAYS, ArraySpec, check_codec, codec_name
from embedcache.cache.shards.errors import WAY_OUT
from embedcache.config import Config, Count, Integer, Names, Number
from embedcache.errors import CacheError, UsageError

SCHEMA = 1
SPLITS = ("train", "dev", "test")
ATTRIBUTE = "embedcache"
STAGING = ".staging"
COMMITS = "commits"
LEASES = "leases"
CODEC = "codec"
DIGESTS = "digests"
TOP_IDS = "head/top_ids"
LIKELY = 0.05
"""Probability from which a token is among a position's top ids, which hold 1 + its id, likeliest
first, and 0 for none. What a shortlist lacks at one position, it may draw; a token as likely as
that, and no label, would make most of the variance of its sums."""
MOST_TOP_IDS = int(1 / LIKELY)
"""Of a position: no more can be as likely."""
MANIFEST = "manifest.json"
SEALED = "sealed.json"
DEFAULT_BITS = 1.5
TABLE_CHUNK = 16384
"""Rows of a chunk of the per-sequence and per-document tables."""
FINGERPRINT_BYTES = 144
"""Of what a document is known again by."""
TABLES: dict[str, tuple[str, tuple[int, ...]]] = {
    "tokens/offsets": ("uint64", (2,)),
    "tokens/document": ("uint32", ()),
    "tokens/blocks": ("uint64", ()),
    "documents/index": ("uint64", ()),
    "documents/fingerprint": ("uint8", (FINGERPRINT_BYTES,)),
    "documents/name_bytes": ("uint8", ()),
    "documents/name_offsets": ("uint64", ()),
}
"""Type and columns of each table, by its path under the split."""
ROWS: dict[str, tuple[str, tuple[int, ...]]] = {
    "tokens/ids": ("uint32", ()),
    "tokens/loss_mask": ("bool", ()),
    "tokens/span": ("uint32", (2,)),
}
"""The same of each array of one entry a token, a chunk a block."""


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class ExtractSettings(Config):
    """What stage one was asked for, besides the base and the corpus.

    ``block_tokens`` is R, the rows of a block; ``batch_tokens`` bounds the padded tokens of one
    forward pass (a longer sequence goes alone). Both belong to the settings because batch shape
    changes floating-point results. For the codec ``transform``: ``bits`` is the budget of coded
    bits a value, or ``quality`` the permitted rise of the base's cross-entropy, read from decoded
    embeddings, in nats a token; with neither, `DEFAULT_BITS`. ``top_ids``: of each position, how
    many of the tokens that the base thinks likeliest are stored, for shortlists to be smaller; 0
    stores none, and computes no logits.
    """

    taps: Names = ("final",)
    codec: str = "bf16"
    context: Count = 1024
    block_tokens: Count = 16384
    batch_tokens: Count = 2048
    bits: Annotated[Number, Field(ge=0.05, le=12)] | None = None
    quality: Annotated[Number, Field(gt=0, lt=10)] | None = None
    top_ids: Annotated[Integer, Field(ge=0, le=MOST_TOP_IDS)] = 0

    def check(self) -> None:
        """Raise ``UsageError`` for settings that contradict each other."""
        check_codec(self.codec)
        if not self.taps or len(set(self.taps)) < len(self.taps):
            raise UsageError(
                "`taps=` must name at least one tap, each once; found "
                f"{', '.join(self.taps) or 'none'}"
            )
        if self.block_tokens < self.context:
            raise UsageError(
                f"`block_tokens=` must be at least `context=` ({self.context}), so that a block "
                f"holds a whole sequence; found {self.block_tokens}"
            )
        for name in ("bits", "quality"):
            if getattr(self, name) is not None and self.codec != "transform":
                raise UsageError(
                    f"`{name}=` needs `codec=` to be 'transform', found '{self.codec}'"
                )
        if self.bits is not None and self.quality is not None:
            raise UsageError(
                "expected `bits=` or `quality=`, found both: one follows from the other"
            )
        for name, given in (("quality", self.quality is not None), ("top_ids", self.top_ids)):
            if given and "final" not in self.taps:
                raise UsageError(
                    f"`{name}=` needs the tap 'final', found `taps=` {','.join(self.taps)}"
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheAttributes:
    """The root attributes: identities and settings, written once, when pass 0 is sealed.

    ``base`` and ``corpus`` are the plain dictionaries of their identities (the cache package
    depends on neither); a merged cache has its caches' corpora as the ``parts`` of its own, and
    what was added to a cache later is ``appended``; ``environment`` is recorded, never enforced.
    """

    base: dict[str, Any]
    corpus: dict[str, Any]
    settings: ExtractSettings
    environment: dict[str, Any]
    schema: int = SCHEMA

    def to_dict(self) -> dict[str, Any]:
        """Return the attributes as JSON-ready values."""
        return asdict(self) | {"settings": self.settings.to_dict()}

    @classmethod
    def from_dict(cls, value: dict[str, Any], *, path: Path) -> CacheAttributes:
        """Parse the root attributes of the cache at ``path``.

        Raises ``CacheError`` for a newer schema or missing entries.
        """
        schema = value.get("schema")
        if not isinstance(schema, int) or schema > SCHEMA:
            raise CacheError(
                f"{path} has cache schema {schema!r}; this embedcache reads up to {SCHEMA}. "
                "Upgrade with: pip install --upgrade embedcache"
            )
        try:
            return cls(
                base=value["base"],
                corpus=value["corpus"],
                settings=ExtractSettings.from_dict(value["settings"]),
                environment=value["environment"],
                schema=schema,
            )
        except (KeyError, TypeError, ValueError, UsageError) as error:
            raise CacheError(
                f"{path} has no complete embedcache attributes ({error}); its zarr.json was edited "
                f"or damaged. {WAY_OUT}"
            ) from error


def corpora_of(corpus: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the corpora that make up a cache's: those merged, else its own; those appended."""
    return [*(corpus.get("parts") or [corpus]), *corpus.get("appended", ())]


def sources_of(corpus: dict[str, Any]) -> list[str]:
    """Return the sources in a cache's ``corpus``, of all that make it up."""
    return [source for part in corpora_of(corpus) for source in part["config"]["sources"]]


def parts_of(corpus: dict[str, Any]) -> tuple[tuple[str, ...], ...]:
    """Return the sources of each cache that was merged into one; nothing for one that was not."""
    return tuple(tuple(part["config"]["sources"]) for part in corpus.get("parts", ()))


def summary_of(corpus: dict[str, Any]) -> dict[str, Any]:
    """Return the counts of a cache's ``corpus``; of a merged one's, those of all parts, summed."""
    if "parts" not in corpus:
        return dict(corpus["summary"])
    total: dict[str, Any] = {}
    for part in corpora_of(corpus):
        for key, value in part["summary"].items():
            if isinstance(value, dict):
                before = total.get(key, {})
                total[key] = {name: before.get(name, 0) + count for name, count in value.items()}
            elif isinstance(value, int):
                total[key] = total.get(key, 0) + value
    return total


def marker_path(cache: Path, split: str, block: int, generation: int = 0) -> Path:
    """Return where the commit marker of one generation of a block lies."""
    return cache / COMMITS / split / f"{block:08d}.{generation}.json"


def shard_name(array: str, block: int, dimensions: int) -> str:
    """Return the path, inside the cache, of an array's shard for a block.

    >>> shard_name("train/embeddings/final", 3, 2)
    'train/embeddings/final/c/3/0'
    """
    return "/".join([array, "c", str(block), *["0"] * (dimensions - 1)])


def token_chunks(split: str, block: int) -> tuple[str, ...]:
    """Return the paths, inside the cache, of a block's token ids, loss mask and spans.

    >>> token_chunks("dev", 1)
    ('dev/tokens/ids/c/1', 'dev/tokens/loss_mask/c/1', 'dev/tokens/span/c/1/0')
    """
    return tuple(
        shard_name(f"{split}/{name}", block, 1 + len(columns))
        for name, (_, columns) in ROWS.items()
    )


def block_arrays(split: str, settings: ExtractSettings) -> dict[str, ArraySpec]:
    """Return the arrays that a block has a shard of, by path under the split, in a fixed order."""
    arrays = {
        f"{spec.group}/{tap}": spec
        for tap in settings.taps
        for spec in ARRAYS[codec_name(split, settings.codec)]
    }
    if settings.top_ids:
        arrays[TOP_IDS] = ArraySpec("head", "int32", wide=True, width=settings.top_ids)
    return arrays


def block_shards(split: str, block: int, settings: ExtractSettings) -> dict[str, ArraySpec]:
    """Return a block's shards by path, inside the cache, in the order of the digest table.

    >>> list(block_shards("train", 3, ExtractSettings(codec="int8")))
    ['train/embeddings/final/c/3/0', 'train/scale/final/c/3']
    """
    return {
        shard_name(f"{split}/{array}", block, 1 + spec.wide): spec
        for array, spec in block_arrays(split, settings).items()
    }
