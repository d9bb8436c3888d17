"""Tiny random bases in transformers' layout, for tests that need a real model and no download.

Each has three layers of width 32, a byte-level BPE tokenizer trained in this process, which
tokenises text of any script, and a chat template.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from embedcache.base.pretrained import quiet_transformers

EOS = "<|endoftext|>"
SPECIAL_TOKENS = [EOS, "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TRAINING_TEXT = [
    "The quick brown fox jumps over the lazy dog, and the dog sleeps on.",
    "Question: what is the capital of France? Answer: the capital of France is Paris.",
    "A base is frozen; its embeddings are computed once; the carry-on learns from them.",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich.",
    "def add(first, second):\n    return first + second\n",
]

_COMMON: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
_GPT2: dict[str, Any] = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 256}
_GEMMA: dict[str, Any] = {**_COMMON, "head_dim": 8, "sliding_window": 16}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": _COMMON,
    "gpt2": _GPT2,
    "gemma2": {**_GEMMA, "final_logit_softcapping": 2.0},
    "gemma3_text": {**_GEMMA, "final_logit_softcapping": 2.0},
    "cohere": {**_COMMON, "logit_scale": 0.0625},
    "granite": {**_COMMON, "logits_scaling": 8.0},
    "phi": {**_COMMON, "num_key_value_heads": 4},
    "qwen2": _COMMON,
    "qwen3": {**_COMMON, "head_dim": 8},
}
"""Settings of each architecture, by transformers' ``model_type``; the head of phi has a bias."""


@functools.cache
def _bpe(vocab_size: int) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TRAINING_TEXT, trainer)
    return tokenizer.to_str()


def tiny_tokenizer(vocab_size: int = 384) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer of at most ``vocab_size`` tokens with a chat template."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_bpe(vocab_size)),
        eos_token=EOS,
        pad_token=EOS,
        chat_template=CHAT_TEMPLATE,
    )


def tiny_base_directory(
    path: Path, arch: str = "llama", tied: bool = True, vocab_size: int = 384, seed: int = 0
) -> Path:
    """Save a random three-layer base and its tokenizer to ``path``, and return ``path``.

    The weights are float32 and depend on ``seed`` only; torch's global random state is unchanged.
    """
    tokenizer = tiny_tokenizer(vocab_size)
    config = AutoConfig.for_model(
        arch,
        **ARCHITECTURES[arch],
        vocab_size=vocab_size,
        tie_word_embeddings=tied,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config).eval()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                # Larger than transformers' 0.02, so that soft-caps, biases and norms matter.
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    path.mkdir(parents=True, exist_ok=True)
    with quiet_transformers():
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
    return path
