"""``python -m embedcache_cli``: the command without its script."""

from .app import main

main()
