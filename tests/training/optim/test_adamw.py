"""AdamW on rows against torch's own on each carry-on alone."""

from __future__ import annotations

import pytest
import torch
from support.carryons import change

from embedcache.carryon.branch.config import BranchConfig
from embedcache.carryon.branch.model import Branch
from embedcache.carryon.nn.linear import GRADIENT_BUFFER
from embedcache.carryon.protocol import CarryOn
from embedcache.training.config import TrainConfig
from embedcache.training.optim.adamw import FlatAdamW

CONFIGS = [
    TrainConfig(lr=1e-3, weight_decay=0.3, beta2=0.9, clip=0.5),
    TrainConfig(lr=3e-2, weight_decay=0.0, beta2=0.99, clip=1e9),
    TrainConfig(lr=5e-3, weight_decay=0.1, beta2=0.95, clip=2.0),
]


def models() -> list[CarryOn]:
    made = []
    for seed in range(3):
        torch.manual_seed(seed)
        model = Branch(BranchConfig(width=32, blocks=1), 16)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter)
        made.append(model)
    return made


def gradients(model: CarryOn, step: int, k: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(100 * step + k)
    return {
        name: torch.randn(p.shape, generator=draw) * (k + 1) for name, p in model.named_parameters()
    }


def loss_of(stack: CarryOn, wanted: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    """Return a loss whose gradients are these, by carry-on and name."""
    return sum(
        (parameter[k] * found[name]).sum()
        for k, found in enumerate(wanted)
        for name, parameter in stack.named_parameters()
    )


def differentiate(stack: CarryOn, flat: FlatAdamW, wanted: list[dict[str, torch.Tensor]]) -> None:
    flat.gradient_KP.zero_()
    loss_of(stack, wanted).backward()


def stepped(stack: CarryOn, flat: FlatAdamW, alone: list[CarryOn], step: int, rates) -> list[float]:
    differentiate(stack, flat, [gradients(model, step, k) for k, model in enumerate(alone)])
    norms = flat.clip().tolist()
    flat.schedule(rates)
    flat.step()
    return norms


def test_each_row_is_stepped_as_torch_steps_it_alone():
    alone = models()
    stack = Branch.stack(alone)
    flat = FlatAdamW(stack, CONFIGS)
    optimizers = []
    for model, config in zip(alone, CONFIGS, strict=True):
        matrices = [p for p in model.parameters() if p.ndim >= 2]
        vectors = [p for p in model.parameters() if p.ndim < 2]
        groups = [
            {"params": matrices, "weight_decay": config.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        optimizers.append(torch.optim.AdamW(groups, betas=(0.9, config.beta2)))
    for step in range(5):
        rates = [config.lr * (step + 1) for config in CONFIGS]
        if step == 2:
            rates[1] = None  # a batch without a target
        norms = stepped(stack, flat, alone, step, rates)
        for k, (model, optimizer, config) in enumerate(
            zip(alone, optimizers, CONFIGS, strict=True)
        ):
            for name, gradient in gradients(model, step, k).items():
                model.get_parameter(name).grad = gradient
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
            torch.testing.assert_close(norm.item(), norms[k], rtol=1e-5, atol=0)
            if rates[k] is None:
                continue
            for group in optimizer.param_groups:
                group["lr"] = rates[k]
            optimizer.step()
        for k, model in enumerate(alone):
            member = stack.member(k)
            for name, parameter in model.named_parameters():
                torch.testing.assert_close(member[name], parameter.detach(), rtol=1e-5, atol=1e-6)


def test_moments_go_on_in_another_stack():
    alone = models()
    whole, half = Branch.stack(alone), None
    flat = FlatAdamW(whole, CONFIGS)
    for step in range(2):
        stepped(whole, flat, alone, step, [0.01] * 3)
    kept = []
    for k in (2, 0):
        model = Branch(alone[0].config, 16)
        model.load_state_dict(whole.member(k))
        kept.append(model)
    half = Branch.stack(kept)
    moved = FlatAdamW(half, [CONFIGS[2], CONFIGS[0]])
    for new, old in enumerate((2, 0)):
        moved.restore(new, flat.moments(old))
    stepped(whole, flat, alone, 7, [0.01] * 3)
    differentiate(half, moved, [gradients(alone[old], 7, old) for old in (2, 0)])
    moved.clip()
    moved.schedule([0.01] * 2)
    moved.step()
    for new, old in enumerate((2, 0)):
        assert all(
            torch.equal(half.member(new)[name], whole.member(old)[name])
            for name, _ in half.named_parameters()
        )


def test_states_in_half_the_bytes_follow_exact_ones():
    """Steps too small for a bfloat16 to move by add up, as they do in float32."""
    alone = models()
    low, wide = Branch.stack(alone), Branch.stack(alone)
    short, full = FlatAdamW(low, CONFIGS, offload=True), FlatAdamW(wide, CONFIGS)
    start = full.values_KP.clone()
    for step in range(30):
        rates = [1e-5 if step != 2 or k else None for k in range(3)]
        before = short.values_KP.clone(), short.moments(0)
        for stack, flat in ((low, short), (wide, full)):
            stepped(stack, flat, alone, step, rates)
        if step == 2:
            assert torch.equal(before[0][0], short.values_KP[0])
            assert all(torch.equal(v, short.moments(0)[name]) for name, v in before[1].items())
    assert short.values_KP.dtype == short.gradient_KP.dtype == torch.bfloat16
    for k in range(3):
        kept, exact = short.moments(k), full.moments(k)
        moved = (full.values_KP[k] - start[k]).norm()
        assert (kept["exact"] - full.values_KP[k]).norm() < 0.01 * moved
        assert (kept["exp_avg"] - exact["exp_avg"]).norm() < 0.02 * exact["exp_avg"].norm()
        assert (kept["exp_avg_sq"] / exact["exp_avg_sq"]).log().abs().mean() < 0.02
        # The device has the nearest bfloat16 of each weight.
        half_step = 2.0**-8 * kept["exact"].abs()
        assert ((short.values_KP[k].float() - kept["exact"]).abs() <= half_step).all()


def test_moments_of_one_precision_go_on_in_the_other():
    alone = models()
    first, _second = Branch.stack(alone), Branch.stack(alone)
    wide = FlatAdamW(first, CONFIGS)
    stepped(first, wide, alone, 0, [0.01] * 3)
    for k, model in enumerate(alone):
        model.load_state_dict(first.member(k))
    low = FlatAdamW(Branch.stack(alone), CONFIGS, offload=True)
    back = FlatAdamW(Branch.stack(models()), CONFIGS)
    for k in range(3):
        low.restore(k, wide.moments(k))
        assert torch.equal(low.moments(k)["exact"], wide.values_KP[k])
        back.restore(k, low.moments(k))
        kept = low.moments(k)
        low.restore(k, kept)
        assert all(torch.equal(value, low.moments(k)[name]) for name, value in kept.items())
    assert torch.equal(back.values_KP, wide.values_KP)


def test_gradients_of_parts_add_up():
    alone = models()
    whole, parts = Branch.stack(alone), Branch.stack(alone)
    flat, added = FlatAdamW(whole, CONFIGS), FlatAdamW(parts, CONFIGS)
    some, others = ([gradients(model, step, k) for k, model in enumerate(alone)] for step in (0, 1))
    both = [{name: a[name] + b[name] for name in a} for a, b in zip(some, others, strict=True)]
    differentiate(parts, added, others)
    differentiate(parts, added, some)  # what was there before is gone
    loss_of(parts, others).backward()
    differentiate(whole, flat, both)
    assert torch.equal(flat.gradient_KP, added.gradient_KP)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_what_products_add_is_what_autograd_would(count, low, shared):
    """To a sum of the products' precision, and to one of another; of inputs that all of them see,
    and of each one's own."""
    plain = Branch.stack(models()[:count])
    added = Branch.stack(models()[:count])
    flat = FlatAdamW(added, CONFIGS[:count], low=torch.bfloat16 if low else None)
    draw = torch.Generator().manual_seed(5)
    lead = () if shared else (count,)
    x = {"final": torch.randn(*lead, 2, 9, 16, generator=draw)}
    at, upstream = torch.arange(9).expand(*lead, 2, 9), torch.randn(count, 2, 9, 16, generator=draw)
    for _ in range(2):
        for stack in (plain, added):
            with torch.autocast("cpu", torch.bfloat16, enabled=low):
                delta = change(stack, x, positions_BT=at)
            (delta.float() * upstream).sum().backward()
    for name, parameter in plain.named_parameters():
        where = added.get_parameter(name)
        assert where.grad is None
        found = getattr(where, GRADIENT_BUFFER)
        assert found.untyped_storage().data_ptr() == flat.gradient_KP.untyped_storage().data_ptr()
        torch.testing.assert_close(found, parameter.grad, rtol=1e-5, atol=1e-4)
    total = sum(float(p.grad.double().square().sum()) for p in plain.parameters())
    assert float(flat.gradient_KP.double().square().sum()) == pytest.approx(total, rel=1e-5)


def test_weights_kept_in_low_precision_are_those_that_there_are():
    """After a step, and after a state is taken back."""
    alone = models()
    stack = Branch.stack(alone)
    flat = FlatAdamW(stack, CONFIGS, low=torch.bfloat16)
    x = {"final": torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(5))}

    def require_same() -> None:
        for k, model in enumerate(alone):
            model.load_state_dict(stack.member(k))
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            both = [
                change(one, x, positions_BT=torch.arange(9)) for one in (stack, Branch.stack(alone))
            ]
        assert torch.equal(*both)

    require_same()
    before = flat.values_KP.clone()
    stepped(stack, flat, alone, 0, [0.1] * 3)
    assert (flat.values_KP - before).abs().mean() > 0.01
    require_same()
    flat.restore(1, flat.moments(1) | {"exact": before[1]})
    assert torch.equal(flat.values_KP[1], before[1])
    require_same()
