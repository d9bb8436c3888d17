"""Verbs on a finished cache: append, merge, delete, repair."""
