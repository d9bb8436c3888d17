"""Linear cross-entropy: the loss of embeddings through a frozen head, without all the logits.

Before, N × V logits exist, once for the loss and once more for their gradient::

    logits_NV = x_NH @ head.weight_VH.T
    loss_N = torch.nn.functional.cross_entropy(logits_NV, targets_N, reduction="none")

After, a few megabytes of logits exist at a time, and the head takes no gradient::

    from embedcache.loss import linear_cross_entropy

    loss_N = linear_cross_entropy(x_NH, head, targets_N)

The gradient of an embedding is the mean of the head's rows, weighted by the softmax, minus the
label's row: attention over the head. It is computed as in FlashAttention, tile by tile with an
online softmax, and in the forward pass, so that no product is computed twice (4·N·V·H FLOPs).

`linear_cross_entropy` walks over the `tiles` of the head, on the device or streamed from host
memory, in `chunks` of positions, and adds each to the `online_softmax`, in PyTorch or by the
kernels in `triton`. On a CPU a softmax of a single tile is computed by `one_tile`. `shortlist`
holds the estimate over the labels and a sampled tail.
"""

from embedcache.loss.chunks import Chunks, plan_chunks, split_rows
from embedcache.loss.linear_cross_entropy import linear_cross_entropy
from embedcache.loss.shortlist.sampler import ShortlistSampler
from embedcache.loss.shortlist.shortlist import (
    Shortlist,
    shortlist_cross_entropy,
    slice_shortlists,
)
from embedcache.loss.shortlist.tail_proposal import tail_proposal
from embedcache.loss.tiles import VocabSubset

__all__ = [
    "Chunks",
    "Shortlist",
    "ShortlistSampler",
    "VocabSubset",
    "linear_cross_entropy",
    "plan_chunks",
    "shortlist_cross_entropy",
    "slice_shortlists",
    "split_rows",
    "tail_proposal",
]
