"""What a cache is on disk: its layout, codecs, blocks with their commit markers, and the reader.

A cache is one directory that is a Zarr v3 group. Pass 0 (`seal`) writes tokens, masks and offsets
and fixes the number of blocks; each block of embeddings is then staged and committed on its own
(`commit`); `finalise` publishes the manifest, without which no reader opens the cache. Nothing here
knows of carry-ons.
"""
