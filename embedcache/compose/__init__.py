"""A live base with a carry-on."""
