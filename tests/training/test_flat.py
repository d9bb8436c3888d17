"""AdamW on rows against torch's own on each carry-on alone."""

from __future__ import annotations

import torch

from embedcache.carryon.config import CarryOnConfig
from embedcache.carryon.model import CarryOn
from embedcache.training.config import TrainConfig
from embedcache.training.flat import FlatAdamW

CONFIGS = [
    TrainConfig(lr=1e-3, weight_decay=0.3, beta2=0.9, clip=0.5),
    TrainConfig(lr=3e-2, weight_decay=0.0, beta2=0.99, clip=1e9),
    TrainConfig(lr=5e-3, weight_decay=0.1, beta2=0.95, clip=2.0),
]


def models() -> list[CarryOn]:
    made = []
    for seed in range(3):
        torch.manual_seed(seed)
        model = CarryOn(CarryOnConfig(width=32, blocks=1), 16)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter)
        made.append(model)
    return made


def gradients(model: CarryOn, step: int, k: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(100 * step + k)
    return {
        name: torch.randn(p.shape, generator=draw) * (k + 1) for name, p in model.named_parameters()
    }


def differentiate(stack: CarryOn, flat: FlatAdamW, wanted: list[dict[str, torch.Tensor]]) -> None:
    """Take a loss whose gradients are these, by carry-on and name."""
    loss = sum(
        (parameter[k] * found[name]).sum()
        for k, found in enumerate(wanted)
        for name, parameter in stack.named_parameters()
    )
    flat.differentiate(loss)


def stepped(stack: CarryOn, flat: FlatAdamW, alone: list[CarryOn], step: int, rates) -> list[float]:
    differentiate(stack, flat, [gradients(model, step, k) for k, model in enumerate(alone)])
    norms = flat.clip().tolist()
    flat.step(rates)
    return norms


def test_each_row_is_stepped_as_torch_steps_it_alone():
    alone = models()
    stack = CarryOn.stack(alone)
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
    whole, half = CarryOn.stack(alone), None
    flat = FlatAdamW(whole, CONFIGS)
    for step in range(2):
        stepped(whole, flat, alone, step, [0.01] * 3)
    kept = []
    for k in (2, 0):
        model = CarryOn(alone[0].config, 16)
        model.load_state_dict(whole.member(k))
        kept.append(model)
    half = CarryOn.stack(kept)
    moved = FlatAdamW(half, [CONFIGS[2], CONFIGS[0]])
    for new, old in enumerate((2, 0)):
        moved.restore(new, flat.moments(old))
    stepped(whole, flat, alone, 7, [0.01] * 3)
    differentiate(half, moved, [gradients(alone[old], 7, old) for old in (2, 0)])
    moved.clip()
    moved.step([0.01] * 2)
    for new, old in enumerate((2, 0)):
        assert all(
            torch.equal(half.member(new)[name], whole.member(old)[name])
            for name, _ in half.named_parameters()
        )
