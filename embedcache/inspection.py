"""One sequence of a cache: its tokens, mask and norms, and what the base makes of each.

The cache holds no text: tokens are put into words with the base's tokenizer where that is on this
machine, and are bare ids where it is not. Choices are those of the stored head on the stored
embeddings, so of what a trainer sees, in float32.

Axes: T time, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from embedcache.base.head import Head
from embedcache.base.identity import BaseIdentity
from embedcache.base.load import local_tokenizer
from embedcache.base.taps import FINAL
from embedcache.cache.cache import Cache
from embedcache.cache.codecs.integers import codec_name
from embedcache.cache.format.layout import SPLITS
from embedcache.cache.tokens.reader import SplitTokens
from embedcache.errors import BaseModelError, CacheError, IdentityError, UsageError, nearest

TOP = 3
ROWS = 256
"""Rows whose logits are in memory at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A token that the base may go on with."""

    id: int
    text: str | None
    probability: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    """One token of a sequence, and what its embedding says of the next."""

    id: int
    text: str | None
    target: bool
    span: tuple[int, int]
    """Bytes of the token in its document's text."""
    norm: dict[str, float]
    """By tap."""
    choices: tuple[Choice, ...]
    """For the next token, the likeliest first; none where the final embeddings are not stored."""
    next_probability: float | None
    """Of the token that does come next; None for the last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceView:
    """A sequence of a cache, laid open."""

    cache: str
    split: str
    sequence: int
    sequences: int
    """Of the split."""
    document: str
    codec: str
    positions: tuple[Position, ...]
    cross_entropy: float | None
    """Mean over the targets, in nats."""
    note: str | None
    """Why tokens are ids alone, or there are no choices."""


def inspect_sequence(
    path: Path, sequence: int, *, split: str = "train", base: str | None = None
) -> SequenceView:
    """Return a sequence of a finished cache.

    Args:
        path: the cache.
        sequence: the sequence's number in the split.
        split: train, dev or test.
        base: where the base, for its tokenizer, is now; where it was, if not given.

    Raises:
        UsageError: for an unknown split, or a number that the split does not have.
        CacheError: for a sequence that was put aside, or a cache that is not whole.
    """
    if split not in SPLITS:
        raise UsageError(
            f"the splits of a cache are {', '.join(SPLITS)}; found '{split}'."
            f"{nearest(split, SPLITS)} Type for example: --split train"
        )
    cache = Cache(path)
    reader = cache.split(split)
    count = reader.manifest.sequences
    if not 0 <= sequence < count:
        raise UsageError(
            f"the {split} split of {path} has the sequences 0 to {count - 1}; found {sequence}. "
            f"Type for example: --sequence {count - 1}"
        )
    if len(reader.files.aside(sequence, sequence + 1)):
        raise CacheError(
            f"sequence {sequence} of {split} was put aside: the base gave values that are not "
            "finite for it, and none is stored. Look at another."
        )
    tokens = SplitTokens(path, split, cache.attributes.settings.block_tokens)
    number = int(np.searchsorted(tokens.table("tokens/blocks"), sequence, side="right")) - 1
    block = reader.block(number)
    place = block.sequence_S.tolist().index(sequence)
    first, stop = (int(row) for row in block.rows_S2[place])
    ids_T = block.ids_N[first:stop]
    x_TH = {tap: x_NH[first:stop].float() for tap, x_NH in block.x_NH.items()}
    words = _Words(cache, base)
    choices, next_T = _choices(cache, x_TH.get(FINAL), ids_T, words)
    mask_T = block.loss_mask_N[first:stop]
    span_T2 = tokens.spans(number)[first:stop]
    norms = {tap: x.norm(dim=1).tolist() for tap, x in x_TH.items()}
    return SequenceView(
        cache=str(path),
        split=split,
        sequence=sequence,
        sequences=count,
        document=reader.documents[int(block.document_S[place])],
        codec=codec_name(split, cache.attributes.settings.codec),
        positions=tuple(
            Position(
                id=int(ids_T[t]),
                text=words.text(int(ids_T[t])),
                target=bool(mask_T[t]),
                span=(int(span_T2[t, 0]), int(span_T2[t, 1])),
                norm={tap: round(norm_T[t], 4) for tap, norm_T in norms.items()},
                choices=choices[t],
                next_probability=next_T[t],
            )
            for t in range(len(ids_T))
        ),
        cross_entropy=_cross_entropy(next_T, mask_T),
        note=words.note or (None if FINAL in x_TH else "no choices: the tap final is not stored"),
    )


class _Words:
    """Token ids as text, where the base's tokenizer is at hand."""

    def __init__(self, cache: Cache, base: str | None):
        self.note: str | None = None
        self._tokenizer: Any = None
        try:
            identity = BaseIdentity.from_dict(cache.attributes.base)
            self._tokenizer = local_tokenizer(identity, base)
        except (BaseModelError, IdentityError, UsageError) as error:
            if base is not None:  # what was asked for by name is not passed over
                raise
            self.note = f"tokens are shown as ids: {error}"

    def text(self, token: int) -> str | None:
        """Return a token's text; None where there is no tokenizer."""
        if self._tokenizer is None:
            return None
        return self._tokenizer.decode([token], clean_up_tokenization_spaces=False)


def _choices(
    cache: Cache, x_TH: torch.Tensor | None, ids_T: np.ndarray[Any, Any], words: _Words
) -> tuple[list[tuple[Choice, ...]], list[float | None]]:
    """Return each position's likeliest next tokens, and the probability of the true one."""
    if x_TH is None:
        return [()] * len(ids_T), [None] * len(ids_T)
    weight = cache.base_array("head/weight")
    if weight is None:
        raise CacheError(f"{cache.path} holds no head: it is damaged. Extract into a new folder.")
    bias = cache.base_array("head/bias")
    head = Head.from_parts(
        weight.float(), None if bias is None else bias.float(), cache.head_settings()
    )
    choices: list[tuple[Choice, ...]] = []
    following: list[float | None] = []
    next_T = torch.from_numpy(ids_T[1:].astype(np.int64))
    for start in range(0, len(x_TH), ROWS):
        p_TV = head(x_TH[start : start + ROWS]).softmax(dim=1)
        top = p_TV.topk(TOP, dim=1)
        for ids, probabilities in zip(top.indices.tolist(), top.values.tolist(), strict=True):
            choices.append(
                tuple(
                    Choice(id=token, text=words.text(token), probability=probability)
                    for token, probability in zip(ids, probabilities, strict=True)
                )
            )
        true = next_T[start : start + ROWS, None]
        following += p_TV[: len(true)].gather(1, true)[:, 0].tolist()
    return choices, [*following, None]


def _cross_entropy(next_T: list[float | None], mask_T: np.ndarray[Any, Any]) -> float | None:
    """Return the mean of -log p over the targets; the embedding before a target predicts it."""
    found = [p for p, target in zip(next_T, mask_T[1:].tolist(), strict=False) if target]
    probabilities = [p for p in found if p is not None]
    if not probabilities:
        return None
    smallest = np.finfo(np.float32).tiny
    return float(-np.log(np.maximum(probabilities, smallest)).mean())
