"""What makes a cache complete: the manifest, and the digests of all files."""
