"""One training run: its folder, checkpoint, metrics and report."""
