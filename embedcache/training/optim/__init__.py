"""AdamW over stacked carry-ons: states on the device or in host memory, in 16 or 32 bits."""
