"""One training step: a stack of carry-ons, its batches, and its CUDA graphs."""
