"""Embeddings as integers and integers as bytes."""
