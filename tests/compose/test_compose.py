"""The live base with a carry-on, against the same numbers computed by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import World, make_world, random_carryon
from support.carryons import change
from torch.nn import functional as F

from embedcache.base.load import Base
from embedcache.base.taps import TapRecorder, final_embeddings, token_embedding_of
from embedcache.carryon.saving import load_carryon
from embedcache.compose.model import compose
from embedcache.errors import CarryOnError, IdentityError, UsageError

CASES = {
    "llama": {},
    "llama, tokens": {"token_input": True},
    "gpt2, bridge": {"bridge_bits": 8, "gate": False},
    "gemma3_text, taps": {"taps": ("final", "layer_1"), "token_input": True},
}


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory) -> World:
    return make_world(tmp_path_factory.mktemp("gpt2"), arch="gpt2")


@pytest.fixture(params=CASES)
def case(request, world, gpt2, tapped, tmp_path) -> tuple[Base, Path]:
    arch = request.param.split(",")[0]
    mine = {"llama": world, "gpt2": gpt2, "gemma3_text": tapped}[arch]
    return mine.base(), random_carryon(mine, tmp_path / "c", **CASES[request.param])


def some_ids(base: Base, B: int = 2, T: int = 40) -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    return torch.randint(3, base.identity.vocab_size, (B, T), generator=draw)


@torch.no_grad()
def by_hand(base: Base, folder: Path, ids: torch.Tensor, alpha: float) -> torch.Tensor:
    """y(α) of unpadded sequences, from the parts."""
    model, _ = load_carryon(folder)
    with TapRecorder(base.model, [t for t in model.config.taps if t != "final"]) as recorder:
        x = final_embeddings(base.model, ids)
    tokens = F.embedding(ids, token_embedding_of(base.model).weight)
    delta = change(
        model,
        {"final": x, **recorder.taps},
        positions_BT=torch.arange(ids.shape[1]).expand(ids.shape),
        tokens_BTH=tokens if model.config.token_input else None,
    )
    return base.head(x + alpha * delta)


@torch.no_grad()
def test_logits_are_the_head_of_x_plus_alpha_delta(case):
    base, folder = case
    ids = some_ids(base)
    plain = base.model(ids).logits
    with compose(base, folder) as composed:
        for alpha in (1.0, 0.3, -1.0):
            composed.alpha = alpha
            for cached in (True, False):
                found = composed.model(ids, use_cache=cached).logits
                torch.testing.assert_close(
                    found,
                    by_hand_detached(base, folder, ids, alpha, composed),
                    rtol=1e-4,
                    atol=1e-4,
                )
                assert (found - plain).abs().max() > 0.05


def by_hand_detached(base, folder, ids, alpha, composed):
    """`by_hand` while composed: α = 0 switches the hook off for the base's part."""
    before, composed.alpha = composed.alpha, 0.0
    found = by_hand(base, folder, ids, alpha)
    composed.alpha = before
    return found


@torch.no_grad()
def test_alpha_zero_and_detach_are_the_base_bit_for_bit(case):
    base, folder = case
    ids = some_ids(base)
    hooks = len(list(base.model.modules())[1]._forward_hooks)
    plain = base.model(ids).logits
    composed = compose(base, folder, alpha=0.0)
    assert torch.equal(composed.model(ids).logits, plain)
    composed.alpha = 1.0
    assert not torch.equal(composed.model(ids).logits, plain)
    composed.alpha = 0.0
    assert torch.equal(composed.model(ids).logits, plain)
    composed.alpha = 1.0
    composed.detach()
    assert torch.equal(base.model(ids).logits, plain)
    assert len(list(base.model.modules())[1]._forward_hooks) == hooks


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padded_batches_equal_sequences_alone(case, side):
    base, folder = case
    lengths, T = (40, 23, 1), 40
    ids = some_ids(base, len(lengths), T)
    mask = torch.zeros_like(ids)
    for b, length in enumerate(lengths):
        mask[b, T - length :] = 1 if side == "left" else mask[b, T - length :]
        if side == "right":
            mask[b, :length] = 1
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with compose(base, folder) as composed:
        padded = composed.model(ids, attention_mask=mask, position_ids=positions).logits
        for b in range(len(lengths)):
            alone = composed.model(ids[b][mask[b] == 1][None]).logits[0]
            torch.testing.assert_close(padded[b][mask[b] == 1], alone, rtol=1e-4, atol=1e-3)


def generated(model, ids, mask=None, **settings) -> torch.Tensor:
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids) if mask is None else mask,
        max_new_tokens=30,
        min_new_tokens=30,
        do_sample=False,
        pad_token_id=0,
        **settings,
    )


@torch.no_grad()
def test_greedy_is_the_same_with_and_without_a_cache(case):
    base, folder = case
    ids = some_ids(base, 2, 20)
    ids[1, :7] = 0
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    with compose(base, folder) as composed:
        cached = generated(composed.model, ids, mask)
        assert torch.equal(cached, generated(composed.model, ids, mask, use_cache=False))
        # Each sequence alone gives the same, and it is what the logits by hand say.
        assert torch.equal(cached[1:, 20:], generated(composed.model, ids[1:, 7:])[:, 13:])
        expected = by_hand_detached(base, folder, cached[:1], 1.0, composed)
        assert torch.equal(expected[0, 19:-1].argmax(-1), cached[0, 20:])
        composed.alpha = 0.0
        assert not torch.equal(cached, generated(composed.model, ids, mask))


@torch.no_grad()
def test_beam_search_reorders_the_branch_too(case):
    base, folder = case
    ids = some_ids(base, 2, 20)
    with compose(base, folder) as composed:
        beams = generated(composed.model, ids, num_beams=4)
        assert torch.equal(beams, generated(composed.model, ids, num_beams=4, use_cache=False))
        assert not torch.equal(beams, generated(composed.model, ids))


@torch.no_grad()
def test_a_cache_filled_without_the_carry_on_is_refused(case):
    base, folder = case
    ids = some_ids(base, 1, 8)
    with compose(base, folder, alpha=0.0) as composed:
        past = composed.model(ids, use_cache=True).past_key_values
        composed.alpha = 1.0
        with pytest.raises(ValueError, match="Begin with a new cache"):
            composed.model(ids[:, :1], past_key_values=past)


@torch.no_grad()
def test_a_chunked_prefill_is_one_forward(case):
    base, folder = case
    ids = some_ids(base, 2, 30)
    with compose(base, folder) as composed:
        whole = composed.model(ids).logits
        past = composed.model(ids[:, :17], use_cache=True).past_key_values
        rest = composed.model(ids[:, 17:], past_key_values=past, use_cache=True).logits
    torch.testing.assert_close(rest, whole[:, 17:], rtol=1e-4, atol=1e-3)


def test_a_bfloat16_base_keeps_the_branch_in_float32(world, tmp_path):
    folder = random_carryon(world, tmp_path / "c")
    from embedcache.base.load import load_base

    base = load_base(world.base_path, device="cpu", dtype="bfloat16")
    ids = some_ids(base)
    with compose(base, folder) as composed, torch.no_grad():
        logits = composed.model(ids).logits
        assert logits.dtype == torch.bfloat16
        model, _ = load_carryon(folder)
        delta = change(
            model,
            {"final": composed.base_embeddings().float()},
            positions_BT=torch.arange(40).expand(2, 40),
        )
        y = composed.base_embeddings() + delta.bfloat16()
        assert torch.equal(logits, base.head(y))


def test_another_base_is_refused_by_name(world, tapped, tmp_path):
    folder = random_carryon(tapped, tmp_path / "c")
    with pytest.raises(IdentityError) as caught:
        compose(world.base(), folder)
    assert str(folder) in str(caught.value)
    for mine in (world, tapped):
        assert mine.cache().attributes.base["fingerprint"][:8] in str(caught.value)


def test_one_carry_on_at_a_time(world, tmp_path):
    base, folder = world.base(), random_carryon(world, tmp_path / "c")
    with compose(base, folder), pytest.raises(UsageError, match="detach"):
        compose(base, folder)
    compose(base, folder).detach()


def test_a_failed_compose_leaves_the_base_alone(world, tmp_path):
    base = world.base()
    ids = some_ids(base)
    plain = base.model(ids).logits
    with pytest.raises(CarryOnError):
        compose(base, tmp_path / "none")
    assert torch.equal(base.model(ids).logits, plain)
