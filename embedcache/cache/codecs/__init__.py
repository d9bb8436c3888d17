"""Codecs: embeddings to integers, on tensors, and integers to the bytes of a chunk; and back."""
