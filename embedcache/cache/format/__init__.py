"""The layout of a cache: paths, root attributes, and Zarr's metadata of arrays."""
