"""AdamW for stacked carry-ons, with states on the device or, in 16 bits, in host memory."""
