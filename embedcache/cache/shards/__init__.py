"""Shard files, and the errors of damaged files."""
