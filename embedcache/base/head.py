"""The head: the base's frozen linear map from a final embedding to the logits.

Axes: H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from embedcache.errors import BaseModelError, nearest


class Head(nn.Module):
    """logits = softcap(scale · (x Wᵀ + b)), in transformers' order of operations.

    Args:
        weight_VH: weight; the buffer shares its storage and takes no gradient.
        bias_V: bias or None.
        logit_scale: factor of the logits (Cohere).
        logit_divisor: divisor of the logits (Granite). It is applied as a division, because
            multiplying by its inverse rounds differently; ``logit_scale`` is then its inverse.
        softcap: c in c · tanh(logits / c) (Gemma), or None.
    """

    weight_VH: torch.Tensor
    bias_V: torch.Tensor | None

    def __init__(
        self,
        weight_VH: torch.Tensor,
        bias_V: torch.Tensor | None = None,
        *,
        logit_scale: float = 1.0,
        logit_divisor: float | None = None,
        softcap: float | None = None,
    ) -> None:
        super().__init__()
        # Not persistent: a checkpoint of a carry-on must not contain the base's head.
        self.register_buffer("weight_VH", weight_VH.detach(), persistent=False)
        bias = None if bias_V is None else bias_V.detach()
        self.register_buffer("bias_V", bias, persistent=False)
        self.logit_scale = logit_scale if logit_divisor is None else 1.0 / logit_divisor
        self.logit_divisor = logit_divisor
        self.softcap = softcap

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits [..., V] of final embeddings ``x`` [..., H], in the dtype of ``x``."""
        logits = F.linear(x, self.weight_VH, self.bias_V)
        if self.logit_divisor is not None:
            logits = logits / self.logit_divisor
        elif self.logit_scale != 1.0:
            logits = logits * self.logit_scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits

    @property
    def settings(self) -> dict[str, float | None]:
        """The settings that `from_parts` takes, as JSON values."""
        return {
            "logit_scale": self.logit_scale,
            "logit_divisor": self.logit_divisor,
            "softcap": self.softcap,
        }

    @classmethod
    def from_parts(
        cls,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        settings: Mapping[str, float | None],
    ) -> Head:
        """Return a head with the settings of another.

        Args:
            weight: weight [V, H].
            bias: bias [V] or None.
            settings: the `settings` of the other head.

        Raises:
            BaseModelError: a setting is unknown.
        """
        known = ("logit_scale", "logit_divisor", "softcap")
        for key in settings:
            if key not in known:
                raise BaseModelError(
                    f"a head's settings are {', '.join(known)}; found '{key}'."
                    f"{nearest(key, known)} A newer embedcache may know it: "
                    "pip install --upgrade embedcache"
                )
        scale = settings.get("logit_scale")
        return cls(
            weight,
            bias,
            logit_scale=1.0 if scale is None else scale,
            logit_divisor=settings.get("logit_divisor"),
            softcap=settings.get("softcap"),
        )

    @classmethod
    def from_model(cls, model: Any) -> Head:
        """Return the head of a transformers causal language model, sharing its weights.

        Raises:
            BaseModelError: the model's output embedding is not a floating-point matrix.
        """
        output = model.get_output_embeddings()
        weight = getattr(output, "weight", None)
        if (
            not isinstance(weight, torch.Tensor)
            or weight.ndim != 2
            or not weight.is_floating_point()
        ):
            raise BaseModelError(
                f"a base's head is a linear layer with a floating-point weight [V, H]; "
                f"{type(model).__name__} has {type(output).__name__}. Use an unquantised copy of a "
                "causal language model."
            )
        config = model.config.get_text_config()
        divisor = getattr(config, "logits_scaling", None)
        multipliers = (
            getattr(config, name, None) for name in ("logit_scale", "lm_head_multiplier")
        )
        scale = next((float(value) for value in multipliers if value is not None), 1.0)
        softcap = getattr(config, "final_logit_softcapping", None)
        return cls(
            weight,
            getattr(output, "bias", None),
            logit_scale=scale,
            logit_divisor=None if divisor in (None, 1, 1.0) else float(divisor),
            softcap=None if softcap is None else float(softcap),
        )
