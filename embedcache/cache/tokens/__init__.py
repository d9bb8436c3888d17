"""Token ids, loss masks and offsets of a split, written before any embedding."""
