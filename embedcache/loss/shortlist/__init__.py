"""The softmax over a subset of the vocabulary with a sampled tail."""
