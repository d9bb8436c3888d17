"""Files on disk: published whole, leased to one writer, replaced all together."""
