"""One training step: the stack, its batches and settings, its CUDA graphs."""
