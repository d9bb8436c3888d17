"""Token ids, loss masks, offsets and documents of a split, written before any embedding."""
