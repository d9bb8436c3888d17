from __future__ import annotations

import pytest
import torch
from conftest import random_carryon

from embedcache.compose.generate import Sampling, generate, prompt_ids
from embedcache.compose.model import compose
from embedcache.errors import UsageError

PROMPT = "The quick brown"


@pytest.fixture
def base(world):
    return world.base()


@pytest.fixture
def carryon(world, tmp_path):
    return random_carryon(world, tmp_path / "c")


def by_hand(base, text: str, count: int) -> list[int]:
    """Greedy tokens of a model, one whole forward each."""
    ids = base.tokenizer(text, return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    with torch.no_grad():
        for _ in range(count):
            ids = torch.cat([ids, base.model(ids).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
            if ids[0, -1] == base.tokenizer.eos_token_id:
                break
    return ids[0, start:].tolist()


def test_greedy_is_the_argmax_of_the_logits(base, carryon):
    sampling = Sampling(max_new_tokens=20)
    plain = base.tokenizer.decode(by_hand(base, PROMPT, 20), skip_special_tokens=True)
    with compose(base, carryon) as composed:
        assert generate(composed, PROMPT, alpha=0.0, sampling=sampling) == plain
        changed = generate(composed, PROMPT, sampling=sampling)
        assert changed != plain
        composed.alpha = 1.0
        tokens = by_hand(base, PROMPT, 20)
        assert changed == base.tokenizer.decode(tokens, skip_special_tokens=True)
    ids = base.tokenizer(PROMPT, return_tensors="pt")
    own = base.model.generate(**ids, max_new_tokens=20, do_sample=False, pad_token_id=0)
    assert plain == base.tokenizer.decode(
        own[0, ids["input_ids"].shape[1] :], skip_special_tokens=True
    )


def test_sampling_is_repeated_by_its_seed_and_leaves_torch_s_alone(base, carryon):
    with compose(base, carryon) as composed:

        def text(seed: int, **settings) -> str:
            sampling = Sampling(max_new_tokens=20, temperature=1.5, seed=seed, **settings)
            return generate(composed, PROMPT, sampling=sampling)

        torch.manual_seed(5)
        state = torch.get_rng_state()
        first = text(1)
        assert torch.equal(torch.get_rng_state(), state)
        torch.rand(7)
        assert text(1) == first
        assert len({text(seed) for seed in range(5)}) > 1
        greedy = generate(composed, PROMPT, sampling=Sampling(max_new_tokens=20))
        assert {text(seed, top_k=1) for seed in range(3)} == {greedy}
        assert text(2, top_p=1e-6) == greedy


def test_pieces_add_up_to_the_text(base, carryon):
    pieces: list[str] = []
    with compose(base, carryon) as composed:
        sampling = Sampling(max_new_tokens=25)
        text = generate(composed, PROMPT, sampling=sampling, on_text=pieces.append)
    assert "".join(pieces) == text
    assert len(pieces) > 1


def test_chat_is_a_user_s_turn(base):
    ids = prompt_ids(base, "Hello", chat=True)
    assert (
        base.tokenizer.decode(ids[0])
        == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    )
    assert base.tokenizer.decode(prompt_ids(base, "Hello", chat=False)[0]) == "Hello"


def test_chat_without_a_template(base):
    base.tokenizer.chat_template = None
    with pytest.raises(UsageError, match="no chat template"):
        prompt_ids(base, "Hello", chat=True)


def test_an_empty_prompt(base, carryon):
    with compose(base, carryon) as composed, pytest.raises(UsageError, match="`prompt=`"):
        generate(composed, "")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -1}, "top_k"),
    ],
)
def test_sampling_that_cannot_be(settings, words):
    with pytest.raises(UsageError, match=words):
        Sampling(**settings)


def test_a_base_s_own_sampling_settings_do_not_reach_greedy(base, carryon):
    base.model.generation_config.do_sample = True
    base.model.generation_config.temperature = 5.0
    base.model.generation_config.top_k = 7
    sampling = Sampling(max_new_tokens=12)
    plain = base.tokenizer.decode(by_hand(base, PROMPT, 12), skip_special_tokens=True)
    with compose(base, carryon) as composed:
        assert generate(composed, PROMPT, alpha=0.0, sampling=sampling) == plain
