"""Text from a live base with a carry-on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from transformers import TextStreamer

from embedcache.base.load import Base
from embedcache.compose.model import ComposedModel
from embedcache.config import Config, Count, NotNegative, Number, Seed, Size
from embedcache.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Sampling(Config):
    """How the next token is chosen.

    Attributes:
        max_new_tokens: tokens generated at most.
        temperature: 0 takes the likeliest token (greedy); above 0 tokens are drawn.
        top_p: draw from the smallest set of tokens whose probabilities sum to this.
        top_k: draw from this many likeliest tokens; 0 means all.
        seed: seed of the draws.
    """

    max_new_tokens: Count = 128
    temperature: NotNegative = 0.0
    top_p: Annotated[Number, Field(gt=0, le=1)] = 1.0
    top_k: Size = 0
    seed: Seed = 0

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
            raise UsageError(f"{base.identity.name} has no chat template: leave out `chat=`")
        prompt = str(
            base.tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
            )
        )
    encoded = base.tokenizer(prompt, add_special_tokens=not chat, return_tensors="pt")
    ids_BT: torch.Tensor = encoded["input_ids"]
    if ids_BT.shape[1] == 0:
        raise UsageError("the prompt is empty: give some text as `prompt=`")
    return ids_BT.to(base.device)


def generate(
    model: ComposedModel,
    prompt: str,
    *,
    alpha: float | None = None,
    chat: bool = False,
    sampling: Sampling | None = None,
    on_text: Callable[[str], None] | None = None,
    **settings: Any,
) -> str:
    """Continue a prompt with a composed model.

    Args:
        model: from `embedcache.load`.
        prompt: the text to continue, or a user's message where ``chat`` is set.
        alpha: the rescale dial α; by default the model's own.
        chat: whether the base's chat template is applied to the prompt.
        sampling: how tokens are chosen; by default greedily, 128 tokens at most.
        on_text: called with each piece of text as it comes.
        **settings: fields of `Sampling` as keywords, instead of ``sampling``.

    Returns:
        The continuation, without the prompt.

    Raises:
        UsageError: for an empty prompt, a base without a chat template, or an unknown setting.
    """
    if sampling is not None and settings:
        raise UsageError(
            f"expected `sampling=` or its settings as keywords, found both: {', '.join(settings)}"
        )
    sampling = sampling or Sampling.from_dict(settings)
    base = model.base
    ids_BT = prompt_ids(base, prompt, chat=chat)
    before, model.alpha = model.alpha, model.alpha if alpha is None else alpha
    devices = [base.device] if base.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            torch.manual_seed(sampling.seed)
            output = model.model.generate(
                input_ids=ids_BT,
                attention_mask=torch.ones_like(ids_BT),
                pad_token_id=_pad_id(base),
                streamer=None if on_text is None else _Callback(base.tokenizer, on_text),
                **sampling.to_generate(),
            )
    finally:
        model.alpha = before
    return str(base.tokenizer.decode(output[0, ids_BT.shape[1] :], skip_special_tokens=True))


def _pad_id(base: Base) -> int | None:
    pad: Any = base.tokenizer.pad_token_id
    return base.tokenizer.eos_token_id if pad is None else pad
