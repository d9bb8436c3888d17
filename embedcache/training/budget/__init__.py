"""A memory budget: the ladder of step settings, the probe that measures them, the allocator."""
