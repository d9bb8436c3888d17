"""Edits of a finished cache: append, merge, delete and repair.

``edit`` holds what `append`, `merge` and `delete` share: a finished cache opened for an edit, a
staged set of tables, digest tables, commit markers and manifest, and its commit by one transaction.
``concatenate`` puts the blocks of several caches one after the other.
"""
