"""What a training step sees: sequences in order, packed into batches."""
