"""Where embedcache keeps what it can make again: converted bases and weight hashes."""

from __future__ import annotations

import os
from pathlib import Path


def home() -> Path:
    """Return the directory for what can be made again; it may not exist yet.

    ``$EMBEDCACHE_HOME``, else ``$XDG_CACHE_HOME/embedcache``, else ``~/.cache/embedcache``; an
    empty variable counts as unset.
    """
    if own := os.environ.get("EMBEDCACHE_HOME"):
        return Path(own).expanduser()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared).expanduser() / "embedcache"
    return Path.home() / ".cache" / "embedcache"
