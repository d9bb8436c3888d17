"""The command line: one thin Typer command per verb. Installed as ``embedcache_cli``.

`app` registers the commands and reports errors, `options` has the options that commands share,
`show` prints, `errors` turns the library's messages into those of the command line, and `help`
lays out help pages. Heavy imports stay inside the commands, so that ``--help`` is fast.
"""
