"""The carry-on: a small transformer branch on a base's embeddings.

`config` says what one is, `model` computes it, `store` saves and loads its directory. It depends on
torch alone: neither the base nor transformers is needed to train one.
"""
