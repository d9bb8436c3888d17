"""Cross-entropy through a frozen head, for training carry-ons and for evaluating them.

The gradient of an embedding is its softmax-weighted mean of the head's rows, less its label's row:
attention over the head. So it is computed as attention is, tile by tile with a running
log-sum-exp, in the forward pass, from one buffer of logits that is reused: nothing is recomputed
(4·N·V·H FLOPs), the head takes no gradient and all logits never exist.

`exact` runs over the whole vocabulary, `shortlist` over the tokens that matter to a batch; both
call `frozen`, which walks the `tiles` of a head (on the device, or streamed from host memory) in
`chunks` of rows, and adds each to the `running` softmax by `absorb` (PyTorch) or `kernels`
(Triton).
"""

from embedcache.loss.chunks import Chunks, plan_chunks, split_rows
from embedcache.loss.exact import linear_cross_entropy
from embedcache.loss.shortlist.shortlist import (
    Shortlist,
    ShortlistSampler,
    cut_shortlists,
    shortlist_cross_entropy,
    tail_proposal,
)
from embedcache.loss.vocab_subset import VocabSubset

__all__ = [
    "Chunks",
    "Shortlist",
    "ShortlistSampler",
    "VocabSubset",
    "cut_shortlists",
    "linear_cross_entropy",
    "plan_chunks",
    "shortlist_cross_entropy",
    "split_rows",
    "tail_proposal",
]
