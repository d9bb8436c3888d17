"""Cache a frozen language model's embeddings once, then train many small carry-ons from them."""

__version__ = "0.1.0"
