"""The preflight: bytes and time of a whole extraction, from what a few of its batches took."""

from __future__ import annotations

from pathlib import Path

from embedcache.base.load import Base
from embedcache.base.taps import is_tied
from embedcache.cache.base_arrays import CHUNK_ROWS, METADATA_BYTES, Cost
from embedcache.cache.blocks.commit import Marker
from embedcache.cache.format.layout import MANIFEST, shard_name
from embedcache.cache.manifest.digest_table import TableDigest, digest_table_bytes
from embedcache.cache.manifest.digests import Digests, read_digests
from embedcache.cache.manifest.file_record import FILE, FileRecord
from embedcache.cache.manifest.manifest import Manifest, SplitManifest
from embedcache.cache.tokens.reader import SplitTokens
from embedcache.cache.usage import used_bytes
from embedcache.extraction.measure import Measured
from embedcache.extraction.prediction import Prediction, free_disk
from embedcache.extraction.rehearsal import Encoded
from embedcache.extraction.sample import Item, Known
from embedcache.extraction.timing import blocks_seconds

EXTRACTED = (
    "self_check",
    "tokens",
    "seconds",
    "tokens_per_second",
    "predicted_bytes",
    "predicted_seconds",
)
"""What the manifest says of the run."""


def blocks_to_go(splits: dict[str, SplitTokens], done: dict[str, set[int]]) -> list[Item]:
    """Return the blocks that are not done, in the order in which they are computed."""
    return [
        (name, block)
        for name, split in splits.items()
        for block in range(split.blocks)
        if block not in done[name]
    ]


def tokens_to_go(splits: dict[str, SplitTokens], todo: list[Item]) -> dict[str, int]:
    """Return the tokens of the blocks ``todo``, by split."""
    if len(todo) == sum(split.blocks for split in splits.values()):
        return {name: split.totals["tokens"] for name, split in splits.items()}
    found = dict.fromkeys(splits, 0)
    for name, block in todo:
        found[name] += splits[name].block_rows(block)
    return found


def predict(
    folder: Path,
    splits: dict[str, SplitTokens],
    todo: list[Item],
    measured: Measured,
    *,
    base: Base | None,
    stored: Cost,
    known: Known,
    spent: float,
    out: Path | None = None,
) -> Prediction:
    """Predict the finished cache from its sealed ``folder``; nothing is written.

    Args:
        folder: where pass 0 is sealed.
        splits: its tokens.
        todo: the blocks that are to be computed.
        measured: what some of their batches took.
        base: the base; None where nothing is to be computed.
        stored: what it takes to store what is to be kept of the base and of the codec.
        known: the batches of ``todo`` that are computed already.
        spent: the seconds since the base was loaded, which what is known took.
        out: where the cache is to be, for its disk's free space, if it is not ``folder``.
    """
    tokens = tokens_to_go(splits, todo)
    there = used_bytes(folder)
    to_go = float(stored.bytes)
    for name, encoded in measured.encoded.items():
        blocks = sum(1 for split, _ in todo if split == name)
        marker = len(_marker(name, splits[name].blocks, encoded).to_json())
        to_go += tokens[name] * encoded.row_bytes + blocks * (encoded.block_bytes + marker)
    if not (folder / MANIFEST).is_file():
        to_go += _manifest_bytes(folder, splits, measured, base)
    seconds = spent + stored.seconds + blocks_seconds(tokens, todo, measured, known)
    count = sum(tokens.values())
    return Prediction(
        tokens={name: split.totals["tokens"] for name, split in splits.items()},
        tokens_to_go=count,
        bytes=int(there + to_go),
        bytes_to_go=int(to_go),
        seconds=round(seconds, 3),
        tokens_per_second=round(count / seconds, 1) if seconds else 0.0,
        measured_tokens=measured.tokens,
        free_bytes=free_disk(folder if out is None else out),
    )


def _marker(split: str, blocks: int, encoded: Encoded) -> Marker:
    """Return a marker such as a block in the middle of the split will have."""
    names = [shard_name(f"{split}/{array}", blocks // 2, 2) for array in encoded.arrays]
    return Marker(
        split=split,
        block=blocks // 2,
        generation=0,
        attempt="0" * 32,
        files=tuple(_record(name, int(encoded.block_bytes + encoded.row_bytes)) for name in names),
        quarantined=(),
    )


def _record(name: str, size: int) -> FileRecord:
    return FileRecord(path=name, bytes=size, sha256="0" * 64, crc32c="0" * 8)


def _manifest_bytes(
    folder: Path, splits: dict[str, SplitTokens], measured: Measured, base: Base | None
) -> int:
    """Return what the manifest and the digest tables of the blocks will take."""
    size, each = 0, {}
    for name, split in splits.items():
        found = measured.encoded.get(name)
        rows = split.blocks * len(found.arrays) if found is not None else 0
        size += digest_table_bytes(rows, FILE)
        each[name] = SplitManifest(
            blocks=split.blocks,
            bytes=10**9,
            embeddings=TableDigest(rows=rows, sha256="0" * 64),
            quarantined=TableDigest(rows=0, sha256="0" * 64),
            **split.totals,
        )
    manifest = Manifest(
        splits=each,
        tokens=read_digests(folder),
        base=_base_seal(folder, base),
        codec=Digests(files=(), metadata={}),
        extracted=dict.fromkeys(EXTRACTED, 0.12345),
    )
    return size + len(manifest.to_text())


def _base_seal(folder: Path, base: Base | None) -> Digests:
    """Return the seal of what is kept of the base, or one like it."""
    if base is None or (folder / "base").is_dir():
        return Digests.of(folder, folder / "base")
    rows = base.head.weight_VH.shape[0] * (1 if is_tied(base.model) else 2)
    names = [f"base/head/weight/c/{chunk}/0" for chunk in range(-(-rows // CHUNK_ROWS))]
    files = tuple(_record(name, 10**6) for name in names)
    metadata = {f"base/head/{number}/zarr.json": "0" * METADATA_BYTES for number in range(2)}
    return Digests(files=files, metadata=metadata)
