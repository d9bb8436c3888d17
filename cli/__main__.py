"""``python -m embedcache_cli``: the command as a module, for ``torchrun -m``."""

from .app import main

main()
