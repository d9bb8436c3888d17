"""What a document is known again by: a digest of what it is, a sketch of what it is like.

The sketch is one-permutation MinHash (Li, Owen and Zhang, arXiv 1208.1259; empty bins filled by
rotation, Shrivastava and Li, arXiv 1406.4784), of which the low bytes are kept (Li and König, arXiv
0910.3349), and the keys of bands of bins, for locality-sensitive hashing.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from embedcache.corpus.documents import Document
from embedcache.store.files import canonical_json

SHINGLE_BYTES = 16
JUDGED_BYTES = 1 << 20
"""Only the start of a document is judged."""
BINS = 128
BANDS = 16
DIGEST_BYTES = 16
PACKED_BYTES = DIGEST_BYTES + BINS + 8 * BANDS
BLOCK = 1 << 16
EMPTY = np.uint64(0xFFFFFFFFFFFFFFFF)
ODD = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True, slots=True)
class Sketch:
    """What tells how similar two documents are."""

    low: bytes
    """The low byte of each bin of the `signature`."""
    keys: tuple[int, ...]
    """A hash of each band of whole bins, signed: documents with none in common are unlike."""

    @classmethod
    def of(cls, data: bytes) -> Sketch:
        """Return the sketch of a document that is judged by ``data``."""
        bins = signature(data)
        return cls(bins.astype(np.uint8).tobytes(), _band_keys(bins))

    def similarity(self, low: bytes) -> float:
        """Return the estimated Jaccard similarity to the document of which those are the bytes."""
        return float(np.mean(np.frombuffer(self.low, np.uint8) == np.frombuffer(low, np.uint8)))


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """A document's digest, and its sketch; a later piece of a large file has none of its own."""

    digest: bytes
    sketch: Sketch | None

    def packed(self) -> npt.NDArray[np.uint8]:
        """Return it as bytes, [PACKED_BYTES]."""
        data = self.digest
        if self.sketch is not None:
            data += self.sketch.low + np.array(self.sketch.keys, "<i8").tobytes()
        return np.frombuffer(data.ljust(PACKED_BYTES, b"\0"), np.uint8)

    @classmethod
    def unpacked(cls, row: npt.NDArray[np.uint8]) -> Fingerprint:
        """Return the fingerprint that `packed` told."""
        data = row.tobytes()
        low, keys = data[DIGEST_BYTES:][:BINS], data[DIGEST_BYTES + BINS :]
        if not any(keys):
            return cls(data[:DIGEST_BYTES], None)
        return cls(data[:DIGEST_BYTES], Sketch(low, tuple(np.frombuffer(keys, "<i8").tolist())))


def digest(document: Document, data: bytes) -> bytes:
    """Return a hash of a document's rendered text ``data`` and what of it is a target.

    It is the same under any name, in any corpus, and wherever the text is cut.
    """
    parts = [[len(segment.text), segment.target] for segment in document.segments]
    head = canonical_json([document.closed, parts])
    return hashlib.blake2b(head.encode() + b"\n" + data, digest_size=DIGEST_BYTES).digest()


def signature(data: bytes) -> npt.NDArray[np.uint64]:
    """Return the MinHash signature of ``data``, [BINS]; equal for equal data.

    The part of equal bins estimates the Jaccard similarity of the sets of 16-byte stretches.
    Shorter data is only similar to its equal.
    """
    bins = np.full(BINS, EMPTY, np.uint64)
    if len(data) < SHINGLE_BYTES:
        digest = hashlib.blake2b(data, digest_size=8).digest()
        _lower(bins, np.array([int.from_bytes(digest, "little")], np.uint64))
    else:
        values = np.frombuffer(data[:JUDGED_BYTES], np.uint8)
        for start in range(0, len(values) - SHINGLE_BYTES + 1, BLOCK):
            _lower(bins, _shingles(values[start : start + BLOCK + SHINGLE_BYTES - 1]))
    filled = np.flatnonzero(bins != EMPTY)
    # An empty bin takes the value of the next one that is filled, around the end.
    source = filled[np.searchsorted(filled, np.arange(BINS)) % len(filled)]
    return bins[source]


def _shingles(values: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint64]:
    words = values.astype(np.uint64)
    for width in (1, 2, 4):  # words of 2, 4 and 8 bytes, starting at every byte
        words = words[:-width] | (words[width:] << np.uint64(8 * width))
    return _mix(_mix(words[:-8]) + words[8:] * ODD)


def _mix(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def _lower(bins: npt.NDArray[np.uint64], hashes: npt.NDArray[np.uint64]) -> None:
    # The top seven bits choose the bin, the others compete in it.
    np.minimum.at(bins, (hashes >> np.uint64(57)).astype(np.intp), hashes & (EMPTY >> np.uint64(7)))


def _band_keys(bins: npt.NDArray[np.uint64]) -> tuple[int, ...]:
    rows = bins.reshape(BANDS, BINS // BANDS)
    keys = np.arange(BANDS, dtype=np.uint64)
    for column in range(rows.shape[1]):
        keys = _mix(keys * ODD + rows[:, column])
    return tuple(keys.astype(np.int64).tolist())
