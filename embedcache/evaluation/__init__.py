"""Held-out cross-entropy of a base and of a carry-on, from a cache or with the live base."""
