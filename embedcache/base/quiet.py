"""transformers without its prints: a library that prints nothing calls one that does."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig
from transformers.utils import logging

from embedcache.base.identity import architecture, read_json
from embedcache.base.reason import reason
from embedcache.errors import BaseModelError

# transformers' logging functions carry no types.
_logging: Any = logging


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' progress bars and warnings, and restore them as they were."""
    verbosity = _logging.get_verbosity()
    bars = _logging.is_progress_bar_enabled()
    _logging.set_verbosity_error()
    _logging.disable_progress_bar()
    try:
        yield
    finally:
        _logging.set_verbosity(verbosity)
        if bars:
            _logging.enable_progress_bar()


def read_config(directory: Path) -> PretrainedConfig:
    """Return the configuration in ``directory``; code beside it is never run.

    Raises ``BaseModelError`` if the installed transformers does not know the architecture.
    """
    try:
        with quiet_transformers():
            return AutoConfig.from_pretrained(
                directory, trust_remote_code=False, local_files_only=True
            )
    except (OSError, ValueError, KeyError) as error:
        found = architecture(read_json(directory / "config.json"))
        raise BaseModelError(
            f"a base is a causal language model that transformers knows by itself; found {found} "
            f"in {directory}, and embedcache runs no code that comes with a model. A newer "
            f"transformers may know it: pip install --upgrade transformers. ({reason(error)})"
        ) from error
