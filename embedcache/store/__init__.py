"""What touches files: publishing them whole, leases between processes, and transactions.

Nothing here knows what a cache is.
"""
