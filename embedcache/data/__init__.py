"""What a training step sees: a split's sequences, in a deterministic order, packed into batches.

`order` assigns sequences to batches, `packing` packs a batch on the host, `to_device` copies and
decodes it, and `loader` runs all three ahead of the trainer; `batch` is the result. `subset`
selects documents by name, `sample` reads a few embeddings to calibrate on.
"""
