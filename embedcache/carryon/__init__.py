"""Carry-ons: small trainable modules on a base's embeddings.

`protocol` is the interface of every kind, `registry` finds the kinds, and `saving` saves and loads
a carry-on's folder. A kind has its own folder, such as `branch`. Training a carry-on needs PyTorch,
but neither the base nor transformers.
"""
