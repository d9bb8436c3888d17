from __future__ import annotations

import pytest
import torch
from support.carryons import change

from embedcache.carryon.branch.config import BranchConfig
from embedcache.carryon.branch.model import Branch, CarryOn, InputStats, bridge
from embedcache.carryon.nn.attention import segment_mask
from embedcache.carryon.nn.elementwise import residual_norm, rotary_angles, rotate, rotated

H = 16


def carryon(hidden: int = H, **settings) -> CarryOn:
    torch.manual_seed(0)
    return Branch(BranchConfig(**settings), hidden)


def trained(hidden: int = H, **settings) -> CarryOn:
    """A carry-on that does something."""
    model = carryon(hidden, **settings)
    torch.nn.init.normal_(model.branch.weight, std=0.3)
    return model.eval()


def inputs(B: int, T: int, *taps: str) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    return {tap: torch.randn(B, T, H, generator=draw) for tap in (taps or ("final",))}


def positions(B: int, T: int) -> torch.Tensor:
    return torch.arange(T).expand(B, T)


@pytest.mark.parametrize("gate", [True, False])
def test_it_starts_as_the_base_and_can_leave_it(gate):
    model = carryon(gate=gate)
    delta = change(model, inputs(2, 5), positions_BT=positions(2, 5))
    assert delta.shape == (2, 5, H)
    assert not delta.any()
    delta.sum().backward()
    assert model.branch.weight.grad.any()


@pytest.mark.parametrize(
    ("settings", "count"), [({}, 211_072), ({"width": 256, "gate": False}, 1_872_448)]
)
def test_parameter_counts_at_hidden_576(settings, count):
    model = carryon(576, **settings)
    R = model.config.width
    block = 3 * R * R + R * R + 2 * 4 * R * R + 4 * R + R + 2 * R  # biases, norms
    heads = (1 + model.config.gate) * (R * 576 + 576)
    assert model.parameter_count() == (576 * R + R) + 2 * block + R + heads == count


def test_the_gate_is_a_sigmoid_on_the_same_branch():
    model = trained()
    torch.nn.init.zeros_(model.gate.weight)
    x, at = inputs(2, 5), positions(2, 5)
    torch.nn.init.constant_(model.gate.bias, 50.0)
    open_delta = change(model, x, positions_BT=at)
    torch.nn.init.constant_(model.gate.bias, 0.0)
    torch.testing.assert_close(change(model, x, positions_BT=at), open_delta / 2)


def test_it_is_causal_and_sees_the_past():
    model, x = trained(), inputs(1, 6)
    before = change(model, x, positions_BT=positions(1, 6))
    x["final"][0, 3] += 1
    after = change(model, x, positions_BT=positions(1, 6))
    torch.testing.assert_close(before[:, :3], after[:, :3])
    assert (before[0, 3:] - after[0, 3:]).abs().amax(dim=1).min() > 1e-5


def test_positions_are_relative_and_matter():
    model, x = trained(), inputs(1, 6)
    delta = change(model, x, positions_BT=positions(1, 6))
    shifted = change(model, x, positions_BT=positions(1, 6) + 40)
    torch.testing.assert_close(delta, shifted, rtol=1e-3, atol=1e-4)
    spread = change(model, x, positions_BT=positions(1, 6) * 3)
    assert (delta - spread).abs().max() > 1e-4


def test_rope_matches_complex_multiplication():
    x = torch.randn(2, 5, 3, 8, generator=torch.Generator().manual_seed(0))
    at = torch.randint(50, (2, 5), generator=torch.Generator().manual_seed(1))
    found = rotate(x, rotary_angles(at, 8))
    turn = torch.polar(
        torch.ones(()), at[..., None, None] * 10000.0 ** (-torch.arange(0, 8, 2) / 8)
    )
    expected = torch.complex(x[..., :4], x[..., 4:]) * turn
    torch.testing.assert_close(found, torch.cat([expected.real, expected.imag], -1))


@pytest.mark.parametrize("lead", [(), (3,)])
@pytest.mark.parametrize(("dtype", "share"), [(torch.float32, 1e-6), (torch.bfloat16, 5e-3)])
def test_rotations_and_their_gradients(lead, dtype, share):
    draw = torch.Generator().manual_seed(0)
    at = torch.randint(500, (*lead, 2, 5), generator=draw)
    qkv = torch.randn(*lead, 2, 5, 3, 2, 8, generator=draw).to(dtype).requires_grad_()
    wide = qkv.detach().double().requires_grad_()
    angle = at[..., None, None, None] * 10000.0 ** -(torch.arange(4, dtype=torch.float64) / 4)
    turned = torch.complex(*wide[..., :2, :, :].chunk(2, dim=-1)) * torch.exp(1j * angle)
    expected = [*torch.cat([turned.real, turned.imag], dim=-1).unbind(-3), wide[..., 2, :, :]]
    found = rotated(qkv, rotary_angles(at, 8))
    upstream = [torch.randn(part.shape, generator=draw).to(dtype) for part in found]
    gradient = torch.autograd.grad(found, qkv, upstream)[0]
    other = torch.autograd.grad(expected, wide, [part.double() for part in upstream])[0]
    for one, exact in zip([*found, gradient], [*expected, other], strict=True):
        assert one.dtype == dtype
        assert (one.double() - exact).norm() < share * exact.norm()


def test_segments_do_not_see_each_other():
    model, x = trained(), inputs(1, 7)
    at = torch.tensor([[0, 1, 2, 0, 1, 0, 0]])
    segments = torch.tensor([[0, 0, 0, 1, 1, -1, -1]])
    packed = change(model, x, positions_BT=at, attention=segment_mask(segments))
    for first, stop in ((0, 3), (3, 5)):
        alone = change(
            model, {"final": x["final"][:, first:stop]}, positions_BT=positions(1, stop - first)
        )
        torch.testing.assert_close(packed[:, first:stop], alone)
    assert packed.isfinite().all()


def test_token_input_is_read_and_required():
    model, x = trained(token_input=True), inputs(1, 5)
    tokens = torch.randn(1, 5, H, generator=torch.Generator().manual_seed(2))
    delta = change(model, x, positions_BT=positions(1, 5), tokens_BTH=tokens)
    other = change(model, x, positions_BT=positions(1, 5), tokens_BTH=tokens.flip(1))
    assert (delta - other).abs().max() > 1e-4
    with pytest.raises(ValueError, match="tokens_BTH"):
        change(model, x, positions_BT=positions(1, 5))


@pytest.mark.parametrize("changed", ["final", "layer_1"])
def test_every_tap_is_read(changed):
    model, x = trained(taps=("layer_1", "final")), inputs(1, 5, "layer_1", "final")
    before = change(model, x, positions_BT=positions(1, 5))
    x[changed] = x[changed].flip(1)
    assert (before - change(model, x, positions_BT=positions(1, 5))).abs().max() > 1e-4


@pytest.mark.parametrize("bits", [8, 4])
def test_the_bridge_is_within_half_a_step(bits):
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(0)) * 7
    x[3] = 0
    found = bridge(x, bits)
    step = x.abs().amax(dim=1, keepdim=True) / (2 ** (bits - 1) - 1)
    assert ((found - x).abs() <= step / 2 * 1.0001).all()
    assert (found - x).abs().max() > 0
    assert max(len(row.unique()) for row in found) <= 2**bits - 1
    assert torch.equal(found[3], x[3])
    assert torch.equal(bridge(x, 16), x)


def test_calibration_gives_zero_mean_and_unit_variance():
    model = carryon(taps=("final", "layer_1"))
    draw = torch.Generator().manual_seed(0)
    sample = {
        tap: torch.randn(500, H, generator=draw) * torch.arange(1, H + 1) + 30
        for tap in ("final", "layer_1")
    }
    sample["final"][:, 0] = 3.0  # a component that never changes must not become infinite
    model.calibrate({tap: InputStats.of(x) for tap, x in sample.items()})
    for index, tap in enumerate(model.config.taps):
        x = ((sample[tap] - model.mean_LH[index]) * model.scale_LH[index]).double()
        assert x.isfinite().all()
        torch.testing.assert_close(x.mean(0), torch.zeros(H).double(), rtol=0, atol=1e-4)
        deviation = x.std(0, correction=0)[1 if tap == "final" else 0 :]
        torch.testing.assert_close(deviation, torch.ones_like(deviation), rtol=1e-3, atol=0)


@pytest.mark.parametrize("width", [64, 256])
def test_a_first_step_of_adam_moves_the_output_as_much_at_any_width(width):
    torch.manual_seed(0)
    model = Branch(BranchConfig(width=width, gate=False), 64)
    x, positions = {"final": torch.randn(2, 32, 64)}, torch.arange(32).expand(2, 32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    (change(model, x, positions_BT=positions) - torch.randn(2, 32, 64)).square().mean().backward()
    optimizer.step()
    moved = change(model, x, positions_BT=positions).abs().mean().item()
    assert 0.01 < moved < 0.06


STACKED = {
    "gate": {},
    "no gate": {"gate": False},
    "taps and tokens": {"taps": ("final", "layer_1"), "token_input": True},
    "bridge": {"bridge_bits": 8},
}


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("kind", STACKED)
def test_a_stack_is_its_carry_ons_one_by_one(kind, shared, masked):
    K, B, T = 3, 2, 9
    draw = torch.Generator().manual_seed(2)
    models = []
    for _ in range(K):
        model = trained(**STACKED[kind])
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3, generator=draw)
        models.append(model)
    stack = Branch.stack(models)
    lead = (B,) if shared else (K, B)
    x = {tap: torch.randn(*lead, T, H, generator=draw) for tap in models[0].config.taps}
    tokens = torch.randn(*lead, T, H, generator=draw) if models[0].config.token_input else None
    segments = torch.randint(2, (*lead, T), generator=draw).sort(dim=-1).values
    mask = segment_mask(segments) if masked else None
    at = torch.randint(50, (*lead, T), generator=draw)
    upstream = torch.randn(K, B, T, H, generator=draw)

    found = change(stack, x, positions_BT=at, tokens_BTH=tokens, attention=mask)
    (found * upstream).sum().backward()

    def of(value, k):
        return value if shared or value is None else value[k]

    for k, model in enumerate(models):
        expected = change(
            model,
            {tap: of(value, k) for tap, value in x.items()},
            positions_BT=of(at, k),
            tokens_BTH=of(tokens, k),
            attention=of(mask, k),
        )
        (expected * upstream[k]).sum().backward()
        torch.testing.assert_close(found[k], expected, rtol=1e-5, atol=1e-6)
        for name, parameter in model.named_parameters():
            gradient = stack.get_parameter(name).grad[k]
            torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("calibrated", [False, True])
def test_inputs_in_bfloat16_are_those_in_float32(calibrated):
    """As a CPU's training makes them, a component of which lies far from zero."""
    model = trained(width=32)
    draw = torch.Generator().manual_seed(3)
    x = (torch.randn(2, 50, H, generator=draw) * 3).bfloat16()
    x[..., 4] += 40
    if calibrated:
        model.calibrate({"final": InputStats.of(x.float().flatten(0, 1))})
    at, seen = positions(2, 50), []
    model.project.register_forward_hook(lambda layer, given, made: seen.append(given[0]))
    change(model, {"final": x.float()}, positions_BT=at)
    with torch.autocast("cpu", torch.bfloat16):
        change(model, {"final": x}, positions_BT=at)
    expected, found = seen
    assert (expected.dtype, found.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(found.float(), expected, rtol=0.015, atol=1e-6)


@pytest.mark.parametrize("lead", [(), (3,)])
def test_norms_and_their_gradients(lead):
    draw = torch.Generator().manual_seed(0)
    h, more, weight = (
        torch.randn(*lead, *shape, 8, dtype=torch.float64, generator=draw).requires_grad_()
        for shape in ((2, 5), (2, 5), ())
    )
    assert torch.autograd.gradcheck(residual_norm, (h, more, weight))
    kept, normed = residual_norm(h, more, weight)
    assert torch.equal(kept, h + more)
    scaled = weight[:, None, None] if lead else weight
    expected = torch.nn.functional.rms_norm(kept, (8,)) * scaled
    torch.testing.assert_close(normed, expected)
    with torch.autocast("cpu", torch.bfloat16):
        low = residual_norm(h.float(), more.float(), weight.float())[1]
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.double(), normed, rtol=8e-3, atol=0)
    # Of bfloat16 itself, sums are wider.
    h, weight = (part.detach().bfloat16().requires_grad_() for part in (h, weight))
    exact = [part.detach().double().requires_grad_() for part in (h, weight)]
    found, expected = (residual_norm(h, None, weight)[1] for h, weight in ((h, weight), exact))
    upstream = torch.randn(found.shape, generator=draw).bfloat16()
    pairs = zip(
        (found, *torch.autograd.grad(found, (h, weight), upstream)),
        (expected, *torch.autograd.grad(expected, exact, upstream.double())),
        strict=True,
    )
    for one, other in pairs:
        assert one.dtype == torch.bfloat16
        torch.testing.assert_close(one.double(), other, rtol=8e-3, atol=1e-4)


def test_a_member_of_a_stack_is_the_carry_on_that_went_in():
    models = [trained(), trained(), trained()]
    for model in models:
        model.calibrate({"final": InputStats.of(inputs(1, 50)["final"][0])})
    members = [Branch.stack(models).member(k) for k in range(3)]
    for model, member in zip(models, members, strict=True):
        expected = model.state_dict()
        assert list(member) != [] and set(member) == set(expected)
        assert all(torch.equal(member[name], expected[name]) for name in expected)
