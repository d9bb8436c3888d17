"""Where things lie in a cache, and the attributes of its root.

`embedcache/cache/README.md` describes the format in full. R is the number of rows of a block.

zarr.json                          root group; its attributes are a `CacheAttributes`
<split>/tokens/{ids,loss_mask,span}       [blocks * R, ...]  one chunk a block
<split>/tokens/offsets                    [sequences, 2]     first row, row past the last
<split>/tokens/document                   [sequences]        index into documents
<split>/tokens/blocks                     [blocks + 1]       first sequence of each block
<split>/documents/{index,name_bytes,name_offsets}            corpus index and UTF-8 name
<split>/documents/fingerprint             [documents, bytes] see `corpus.dedup`
<split>/embeddings/<tap>                  [blocks * R, hidden]  one shard a block
<split>/scale/<tap>                       [blocks * R]       (int8 only)
<split>/head/top_ids                      [blocks * R, top_ids]  (optional) see `LIKELY`
codec/<tap>/{mean,centre,predictor,inverse}   (transform only) see `cache.codecs.transform`
base/head/{weight,bias}, base/token_embedding/weight
digests/<split>/{tokens,embeddings,quarantined}   see `cache.tokens.files`, `cache.blocks.files`
tokens.json                                 digests of tokens, documents and metadata
commits/<split>/<block>.<generation>.json   one commit marker a committed block
manifest.json                               published last; digests of everything
leases/                                     while processes write: `embedcache.store.lease`
.staging/                                   while processes write: files not published yet
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from embedcache.cache.codecs.integers import ARRAYS, ArraySpec, check_codec, codec_name
from embedcache.cache.shards.errors import REPAIR_HINT
from embedcache.config import Config, Count, Integer, Names, Number
from embedcache.errors import CacheError, UsageError

SCHEMA = 1
SPLITS = ("train", "dev", "test")
ATTRIBUTE = "embedcache"
COMMITS = "commits"
CODEC = "codec"
DIGESTS = "digests"
TOP_IDS = "head/top_ids"
LIKELY = 0.05
"""Probability from which a token is among the top ids of a position.

Top ids hold 1 + the token's id, the likeliest first, and 0 for none. A shortlist may draw a token
that it lacks; a drawn token that is as likely as this would cause most of the variance of its sums.
"""
MOST_TOP_IDS = int(1 / LIKELY)
"""No more tokens of a position can be that likely."""
MANIFEST = "manifest.json"
TOKENS_DIGESTS = "tokens.json"
"""Digests of all that pass 0 wrote: tokens, documents, and the metadata of all arrays."""
DEFAULT_BITS = 1.5
TABLE_CHUNK = 16384
"""Rows of a chunk of the per-sequence and per-document tables."""
FINGERPRINT_BYTES = 144
"""Bytes of a document's fingerprint, by which `append` recognises the document."""
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
"""Type and columns of each array that has one entry a token; its chunks are blocks."""


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class ExtractSettings(Config):
    """The settings of `embedcache.extract`, besides the base and the corpus.

    Args:
        taps: the embeddings to store: ``final``, the input of the head, and ``layer_<n>``, the
            output of decoder layer n.
        codec: how train is stored: ``bf16`` (lossless), ``int8`` (a scale a token) or ``transform``
            (entropy-coded). Dev and test are always ``bf16``.
        context: the most tokens of a sequence.
        block_tokens: rows of a block, the unit that is computed, committed and read.
        batch_tokens: the most padded tokens of one forward pass; a longer sequence goes alone. It
            is a setting of the cache because the shape of a batch changes floating-point results.
        bits: for ``transform``: coded bits a value; `DEFAULT_BITS` if ``quality`` is None, too.
        quality: for ``transform``, instead of ``bits``: the permitted rise of the base's
            cross-entropy when read from decoded embeddings, in nats a token.
        top_ids: how many of the base's likeliest next tokens are stored for each position, which
            make shortlists smaller; 0 stores none and computes no logits.

    Raises:
        UsageError: a setting is out of range, or two do not fit together.
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
    """The root attributes: identities and settings, written once, with the tokens.

    Attributes:
        base: the base's identity, JSON-ready; see `embedcache.base.identity`.
        corpus: the corpus's configuration and counts, JSON-ready. A merged cache has the corpora
            of its caches as ``parts``; corpora that were added to a finished cache are
            ``appended``.
        settings: the settings of the extraction.
        environment: versions of libraries, device and kernels; recorded, never compared.
        schema: version of the format.
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
                f"or damaged. {REPAIR_HINT}"
            ) from error


def corpora_of(corpus: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the corpora of a cache: its own, or those that were merged; then those appended."""
    return [*(corpus.get("parts") or [corpus]), *corpus.get("appended", ())]


def sources_of(corpus: dict[str, Any]) -> list[str]:
    """Return the sources of all corpora of a cache."""
    return [source for part in corpora_of(corpus) for source in part["config"]["sources"]]


def parts_of(corpus: dict[str, Any]) -> tuple[tuple[str, ...], ...]:
    """Return the sources of each cache that a merged cache was made from; else nothing."""
    return tuple(tuple(part["config"]["sources"]) for part in corpus.get("parts", ()))


def summary_of(corpus: dict[str, Any]) -> dict[str, Any]:
    """Return the counts of a cache's corpus, summed over its parts if the cache was merged."""
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
    """Return the path of the commit marker of one generation of a block."""
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
    """Return the arrays in which a block has a shard, by path under the split, in fixed order."""
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
