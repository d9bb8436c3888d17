"""The manifest, which makes a cache complete, and the digests of all files."""
