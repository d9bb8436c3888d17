"""Near-duplicate documents: fingerprints, and the groups that they form."""
