"""The *branch* kind: a few transformer blocks on the final embedding (arXiv 2504.07513)."""
