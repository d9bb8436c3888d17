"""One shard file: written, read and checked whole."""
