"""Stage one: plan a cache, estimate it, compute its blocks with the base, publish it."""
