"""Text from a live base with a carry-on."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TextStreamer

from embedcache.base.load import Base
from embedcache.compose.model import Composed
from embedcache.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the next token is chosen; temperature 0 is greedy."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise ``UsageError`` for values outside their range."""
        if self.max_new_tokens < 1:
            raise UsageError(f"max_new_tokens must be at least 1, found {self.max_new_tokens}")
        if not 0 <= self.temperature < math.inf:
            raise UsageError(
                f"temperature must be 0 (greedy) or above, and finite, found {self.temperature}"
            )
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p must be in (0, 1], found {self.top_p}")
        if self.top_k < 0:
            raise UsageError(f"top_k must be 0 (off) or above, found {self.top_k}")

    def to_generate(self) -> dict[str, Any]:
        """Return the arguments of transformers' ``generate``."""
        sampled = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        chosen = {"do_sample": True, **sampled} if self.temperature > 0 else {"do_sample": False}
        return {"max_new_tokens": self.max_new_tokens, **chosen}


class _Callback(TextStreamer):
    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._on_text(text)


def prompt_ids(base: Base, prompt: str, *, chat: bool) -> torch.Tensor:
    """Return the prompt's token ids [1, T], as a user's turn of a chat where ``chat`` is set."""
    if chat:
        if base.tokenizer.chat_template is None:
            raise UsageError(f"{base.identity.name} has no chat template: leave out --chat")
        prompt = str(
            base.tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
            )
        )
    encoded = base.tokenizer(prompt, add_special_tokens=not chat, return_tensors="pt")
    ids_BT: torch.Tensor = encoded["input_ids"]
    if ids_BT.shape[1] == 0:
        raise UsageError("the prompt is empty: give some text with --prompt")
    return ids_BT.to(base.device)


def generate(
    base: Base,
    composed: Composed,
    prompt: str,
    *,
    alpha: float = 1.0,
    chat: bool = False,
    sampling: Sampling | None = None,
    on_text: Callable[[str], None] | None = None,
) -> str:
    """Return the continuation of a prompt; ``on_text`` is given each piece as it comes."""
    sampling = sampling or Sampling()
    ids_BT = prompt_ids(base, prompt, chat=chat)
    composed.alpha = alpha
    devices = [base.device] if base.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        torch.manual_seed(sampling.seed)
        output = composed.model.generate(
            input_ids=ids_BT,
            attention_mask=torch.ones_like(ids_BT),
            pad_token_id=_pad_id(base),
            streamer=None if on_text is None else _Callback(base.tokenizer, on_text),
            **sampling.to_generate(),
        )
    return str(base.tokenizer.decode(output[0, ids_BT.shape[1] :], skip_special_tokens=True))


def _pad_id(base: Base) -> int | None:
    pad: Any = base.tokenizer.pad_token_id
    return base.tokenizer.eos_token_id if pad is None else pad
