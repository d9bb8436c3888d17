"""Layers that carry-ons are made of."""
