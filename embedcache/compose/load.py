"""Load a carry-on together with its base."""

from __future__ import annotations

from pathlib import Path

from embedcache.base.load import Base, load_base
from embedcache.carryon.saving import read_record
from embedcache.compose.model import ComposedModel, compose


def load(
    carryon: str | Path,
    base: str | Path | Base | None = None,
    *,
    alpha: float = 1.0,
    device: str = "auto",
    dtype: str = "auto",
) -> ComposedModel:
    """Load a carry-on and its base, and compose them.

    Args:
        carryon: folder of the carry-on.
        base: where its base is now: a hub id, a folder, a GGUF file or ``builtin:NAME``, or a base
            that is loaded. By default what the carry-on names.
        alpha: the rescale dial α: 0 is the base, 1 the trained carry-on.
        device: ``auto``, ``cpu`` or ``cuda``.
        dtype: dtype of the base: ``auto`` (bfloat16 on CUDA and on CPUs with units for it, else
            float32), or its name.

    Returns:
        The composed model. Its ``model`` is a transformers model; `embedcache.generate` continues
        a prompt with it.

    Raises:
        CarryOnError: if the folder holds no complete carry-on.
        BaseModelError: if the base cannot be loaded.
        IdentityError: if the base is another one than the carry-on was trained on.
    """
    record = read_record(Path(carryon))
    if not isinstance(base, Base):
        base = load_base(str(base or record.base["name"]), device=device, dtype=dtype)
    return compose(base, carryon, alpha=alpha)
