"""Where things lie in a cache, and Zarr's metadata of its arrays."""
