"""The parts of stage one: the plan (pass 0), forward passes over a block, and its self-check."""
