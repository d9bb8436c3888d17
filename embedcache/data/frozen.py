"""The frozen parts of the base that stage two uses: its head and token embedding."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from embedcache.base.gather import gather_rows
from embedcache.base.head import Head
from embedcache.cache.cache import Cache
from embedcache.device import resolve_dtype
from embedcache.errors import CacheError


class FrozenInputs:
    """The head and, where asked for, the token embedding of a cache's base, on one device.

    Attributes:
        head: the base's frozen head.
        device: where carry-ons compute.
        dtype: dtype of the head, of the token embedding and of a carry-on's products.
        context: tokens of the longest sequence.
    """

    def __init__(
        self,
        cache: Cache,
        device: torch.device,
        *,
        arrays: Collection[str] = ("head",),
        dtype: torch.dtype | None = None,
        host_head: bool = False,
    ):
        """Read the arrays from the cache.

        Args:
            cache: the cache of the base.
            device: where carry-ons compute.
            arrays: ``head`` and, where needed, ``token_embedding``.
            dtype: by default the dtype of scoring: float32 on a CPU; on a GPU bfloat16, in which
                the base itself runs.
            host_head: whether the arrays stay in host memory.

        Raises:
            CacheError: if the cache holds no head.
        """
        dtype = dtype or resolve_dtype("auto", device)
        pinned = host_head and device.type == "cuda"
        home = torch.device("cpu") if host_head else device

        def placed(value: Tensor) -> Tensor:
            value = value.to(home, dtype)
            return value.pin_memory() if pinned else value

        weight = cache.base_array("head/weight")
        if weight is None:
            raise CacheError(f"{cache.path} holds no head: its 'base' is missing. Extract again.")
        bias = cache.base_array("head/bias")
        self.head = Head.from_parts(
            placed(weight), None if bias is None else placed(bias), cache.head_settings()
        )
        self._embedding_VH: Tensor | None = None
        if "token_embedding" in arrays:
            embedding = cache.base_array("token_embedding/weight")
            self._embedding_VH = self.head.weight_VH if embedding is None else placed(embedding)
        self.device, self.dtype = device, dtype
        self.context = cache.attributes.settings.context

    def tensors(self) -> list[Tensor]:
        """Return the head's weight and, unless it is the same tensor, the token embedding."""
        found = [self.head.weight_VH]
        if self._embedding_VH is not None and self._embedding_VH is not found[0]:
            found.append(self._embedding_VH)
        return found

    def tokens_BTH(self, ids_BT: Tensor) -> Tensor | None:
        """Return the base's token embedding of ids, or None where it was not asked for."""
        if self._embedding_VH is None:
            return None
        tokens_NH = gather_rows(self._embedding_VH, ids_BT.flatten())
        return tokens_NH.view(*ids_BT.shape, -1)

    def autocast(self) -> torch.autocast:
        """Return the context in which a carry-on's products are taken in ``dtype``."""
        return torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16
        )
