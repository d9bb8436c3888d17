"""The command line: one thin Typer command a verb. Installed as ``embedcache_cli``.

Nothing heavy is imported at the top of these modules, so that ``--help`` answers at once.
"""
