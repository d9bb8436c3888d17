"""One training run: its state and checkpoint, its metrics, its report."""
