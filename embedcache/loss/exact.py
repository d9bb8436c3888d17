"""The exact cross-entropy: a softmax over the whole vocabulary.

Axes: N positions, H hidden, V vocabulary.
"""

from __future__ import annotations

from torch import Tensor

from embedcache.base.head import Head
from embedcache.loss.chunks import Chunks
from embedcache.loss.linear_cross_entropy import frozen_head_loss
from embedcache.loss.vocab_subset import VocabSubset


def linear_cross_entropy(
    x_NH: Tensor,
    head: Head,
    targets_N: Tensor,
    *,
    impl: str = "auto",
    chunks: Chunks | None = None,
) -> Tensor:
    """Return the exact cross-entropy of each position, [N], in nats; float32 or finer.

    Logits are in the head's dtype, whatever x's is and autocast says: bfloat16 logits are what the
    base itself gives and half the memory traffic, and everything after them is float32. The loss
    is NaN where an embedding is not finite or a target is outside [0, V).

    A head on the CPU with embeddings on a GPU is streamed there tile by tile, once a call, copies
    overlapping products: pin its memory (`Tensor.pin_memory`).

    Args:
        x_NH: embeddings after the carry-on, of wanted positions only; may require a gradient.
        head: the base's frozen head, on x's device or in host memory.
        targets_N: token ids in [0, V).
        impl: ``triton``, ``torch``, or ``auto``: Triton's kernels on CUDA where it is installed.
        chunks: how many logits exist at a time, from `plan_chunks`; by default its own choice.

    Raises:
        UsageError: for an unknown ``impl``, or ``triton`` where it cannot run.
    """
    columns = VocabSubset(head.weight_VH, head.bias_V, None)
    return frozen_head_loss(x_NH, columns, head, targets_N, impl=impl, chunks=chunks)
