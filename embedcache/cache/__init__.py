"""A cache on disk: its format, codecs, blocks with their commit markers, and readers.

A cache is one folder that is a Zarr v3 group; README.md describes the format. Pass 0
(`tokens.writer`) writes tokens, masks and offsets, and fixes the number of blocks. Each block of
embeddings is then staged and committed by itself (`blocks.commit`). The manifest is published last;
readers (`cache`) refuse a cache without it. Nothing here knows about carry-ons.
"""
