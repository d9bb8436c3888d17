"""Blocks of embeddings and their commit markers."""
