"""AdamW for stacked carry-ons. Its states are on the device, or in host memory in 16 bits."""
