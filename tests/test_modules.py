"""The modules: the published formulas with the weights copied over, every form of style and noise, and what a user does
with a module besides calling it."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import grouped
from cips_kernels import FusedModFC, FusedModFCStack, FusedToRGB, use_backend
from cips_kernels.testing import relative_error

BACKENDS = ["reference", "cpu"]
B, I, O, H, W, S = 2, 6, 5, 3, 4, 7  # noqa: E741  (the letters of the documentation)
P = H * W


def randomized(module: nn.Module) -> nn.Module:
    """The module in float64 with no parameter left at 0 or 1."""
    generator = torch.Generator().manual_seed(3)
    module = module.double()
    for parameter in module.parameters():
        parameter.data += torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return module


def double(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def modulation(style: Tensor, affine: nn.Module) -> Tensor:
    """StyleGAN2's equalised linear layer, written out."""
    return F.linear(style, affine.weight / math.sqrt(style.shape[-1]), affine.bias)


def assert_same(value: Tensor, want: Tensor, leaves: list[Tensor]) -> None:
    assert value.shape == want.shape and relative_error(value, want) < 1e-12
    sent = torch.randn_like(want)
    got = torch.autograd.grad(value, leaves, sent, retain_graph=True)
    for k, (a, b) in enumerate(zip(got, torch.autograd.grad(want, leaves, sent, retain_graph=True))):
        assert relative_error(a, b) < 1e-11, k


# --- one layer ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(demodulate=False, bias=False),
        dict(noise=False),
        dict(activation="linear", gain=1.0),
        dict(negative_slope=0.1),
    ],
)
def test_layer_equals_the_published_one(options, backend):
    layer = randomized(FusedModFC(I, O, S, backend=backend, **options))
    x, style, noise = double(B, I, H, W), double(B, S), torch.randn(B, 1, H, W, dtype=torch.float64)
    constants = dict(
        demodulate=options.get("demodulate", True),
        negative_slope=1.0 if options.get("activation") == "linear" else options.get("negative_slope", 0.2),
        gain=options.get("gain", math.sqrt(2.0)),
    )
    used = noise if layer.noise_strength is not None else None
    want = grouped.styled_conv(
        x, layer.weight, modulation(style, layer.affine), layer.bias, used, layer.noise_strength, **constants
    )
    assert_same(layer(x, style, noise), want, [x, style, *layer.parameters()])


@pytest.mark.parametrize("backend", BACKENDS)
def test_to_rgb_equals_the_published_one(backend):
    layer = randomized(FusedToRGB(I, S, out_channels=4, backend=backend))
    x, style, skip = double(B, I, H, W), double(B, S), double(B, 4, H, W)
    want = grouped.to_rgb(x, layer.weight, modulation(style, layer.affine), layer.bias, skip)
    assert_same(layer(x, style, skip), want, [x, style, skip, *layer.parameters()])
    assert relative_error(layer(x, style), want - skip) < 1e-12


def test_style_a_pixel():
    layer = randomized(FusedModFC(I, O, S))
    x, style, noise = double(B, P, I), double(B, P, S), double(B, P)
    columns = [layer(x[:, p : p + 1], style[:, p], noise[:, p : p + 1]) for p in range(P)]
    assert_same(layer(x, style, noise), torch.cat(columns, 1), [x, style, noise, *layer.parameters()])


def test_initial_values():
    torch.manual_seed(0)
    layer = FusedModFC(64, 48, 32)
    assert set(dict(layer.named_parameters())) == {
        "weight",
        "affine.weight",
        "affine.bias",
        "bias",
        "noise_strength",
    }
    assert layer.weight.shape == (48, 64) and layer.affine.weight.shape == (64, 32)
    for weight in (layer.weight, layer.affine.weight):
        assert abs(weight.mean().item()) < 0.1 and weight.std().item() == pytest.approx(1.0, abs=0.05)
    assert (layer.affine.bias == 1).all() and (layer.bias == 0).all()
    assert layer.noise_strength.shape == () and layer.noise_strength == 0
    rgb = FusedToRGB(64, 32)
    assert {k: tuple(v.shape) for k, v in rgb.named_parameters()} == {
        "weight": (3, 64), "affine.weight": (64, 32), "affine.bias": (64,), "bias": (3,),
    }  # fmt: skip
    assert (rgb.affine.bias == 1).all() and (rgb.bias == 0).all()
    # styles start around 1: the layer keeps the variance of its input
    y = layer(torch.randn(4, 500, 64), torch.zeros(4, 32))
    assert y.square().mean().item() == pytest.approx(1.04, abs=0.15)


# --- noise ----------------------------------------------------------------------------------------------------------


def noisy(backend: str = "auto") -> FusedModFC:
    layer = FusedModFC(I, O, S, backend=backend)
    nn.init.ones_(layer.noise_strength)
    return layer


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fresh", [None, "fresh"])
def test_fresh_noise_follows_the_seed_of_torch(fresh, backend):
    layer, x, style = noisy(backend), torch.randn(B, P, I), torch.randn(B, S)
    torch.manual_seed(1)
    first, second = layer(x, style, fresh), layer(x, style, fresh)
    torch.manual_seed(1)
    again = layer(x, style, fresh)
    assert torch.equal(first, again) and not torch.equal(first, second)
    torch.manual_seed(2)
    assert not torch.equal(layer(x, style, fresh), first)
    assert layer.eval()(x, style).ne(layer(x, style)).any()  # in evaluation too, as published


def test_other_forms_of_noise():
    layer, x, style = noisy(), torch.randn(B, I, H, W), torch.randn(B, S)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    off, seeded, given = (
        layer(x, style, "off"),
        layer(x, style, 5),
        torch.randn(B, 1, H, W, generator=torch.Generator()),
    )
    assert torch.equal(seeded, layer(x, style, 5)) and torch.equal(seeded, layer(x, style, torch.tensor(5)))
    assert not torch.equal(seeded, layer(x, style, 6)) and not torch.equal(seeded, off)
    flat = layer(x, style, given.reshape(B, P))
    assert torch.equal(layer(x, style, given), flat) and not torch.equal(flat, off)
    assert torch.equal(layer(x, style, torch.zeros(B, P)), off)
    assert torch.equal(torch.get_rng_state(), state)  # only fresh noise draws
    without = FusedModFC(I, O, S, noise=False)
    without.load_state_dict(layer.state_dict(), strict=False)
    assert torch.equal(without(x, style), off)


def test_noise_is_one_value_a_pixel_times_the_strength():
    layer = FusedModFC(I, O, S, activation="linear", gain=1.0).double()
    layer.noise_strength.data.fill_(0.25)
    x, style, noise = double(B, P, I), double(B, S), torch.randn(B, P, dtype=torch.float64)
    added = layer(x, style, noise) - layer(x, style, "off")
    assert torch.allclose(added, 0.25 * noise[:, :, None].expand(B, P, O))


def test_noise_keyed_by_coordinates():
    layer, x, style = noisy(), torch.randn(B, P, I), torch.randn(B, S)
    coords = torch.rand(P, 2)
    order = torch.randperm(P)
    full, shuffled = layer(x, style, 5, coords=coords), layer(x[:, order], style, 5, coords=coords[order])
    assert torch.allclose(full[:, order], shuffled, atol=1e-5) and not torch.allclose(
        full, layer(x, style, 5), atol=1e-2
    )


# --- the stack ------------------------------------------------------------------------------------------------------


def chain(stack: FusedModFCStack, x: Tensor, styles: list[Tensor], noise: Tensor | None, skip: Tensor | None):
    """The stack module by module."""
    rgb = skip
    for index, layer in enumerate(stack.layers):
        x = layer(x, styles[index], "off" if noise is None else noise[index])
        for k, after in enumerate(stack.rgb_after):
            if after == index:
                rgb = stack.to_rgbs[k](x, styles[len(stack.layers) + k], rgb)
    return x, rgb


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wplus", [False, True], ids=["w", "w+"])
@pytest.mark.parametrize("rgb_after", [None, (0, 1, 1)])
def test_stack_equals_its_modules_one_by_one(rgb_after, wplus, backend):
    stack = randomized(FusedModFCStack([I, 8, 7, O], S, rgb_after=rgb_after, backend=backend))
    count = len(stack.layers) + len(stack.to_rgbs)
    x, skip, noise = double(B, P, I), double(B, P, 3), double(3, B, P)
    style = double(B, count, S) if wplus else double(B, S)
    styles = list(style.unbind(1)) if wplus else [style] * count
    features, rgb = stack(x, style, noise, skip=skip, return_features=True)
    want = chain(stack, x, styles, noise, skip)
    leaves = [x, skip, noise, style, *stack.parameters()]
    both = torch.cat([features, rgb], 2), torch.cat(want, 2)
    assert_same(*both, leaves)
    off = stack(x, style, "off")
    assert relative_error(off, chain(stack, x, styles, None, None)[1]) < 1e-12


@pytest.mark.parametrize(
    "depth, after",
    [
        (1, (0,)),
        (2, (1,)),
        (3, (2,)),
        (4, (1, 3)),
        (14, (1, 3, 5, 7, 9, 11, 13)),
        (15, (2, 4, 6, 8, 10, 12, 14)),
    ],
)
def test_default_places_of_to_rgb(depth, after):
    assert FusedModFCStack([4] * (depth + 1), 3).rgb_after == after


@pytest.mark.parametrize("demodulate", [False, True])
def test_options_reach_every_layer(demodulate):
    options = dict(demodulate=demodulate, negative_slope=0.3, gain=1.1, eps=0.2)
    stack = randomized(FusedModFCStack([I, 8, O], S, bias=False, noise=False, **options))
    assert all(layer.bias is None and layer.noise_strength is None for layer in stack.layers)
    x, style = double(B, P, I), double(B, S)
    y = grouped.planes(x, H, W)
    for layer in stack.layers:
        y = grouped.styled_conv(y, layer.weight, modulation(style, layer.affine), None, None, None, **options)
    features, rgb = stack(x, style, return_features=True)
    assert relative_error(features, grouped.pixels(y)) < 1e-12
    assert relative_error(stack.to_rgbs[0](features, style), rgb) < 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_input_for_all_images(backend):
    stack = randomized(FusedModFCStack([I, 8, O], S, backend=backend))
    one, style = double(1, I, H, W), double(3, S)
    copies = one.detach().expand(3, -1, -1, -1).contiguous().requires_grad_()
    shared, apart = stack(one, style, 4), stack(copies, style, 4)
    assert shared.shape == (3, 3, H, W) and relative_error(shared, apart) < 1e-12
    sent = torch.randn_like(shared)
    shared.backward(sent)
    apart.backward(sent)
    assert relative_error(one.grad, copies.grad.sum(0, keepdim=True)) < 1e-11


def test_stack_without_to_rgb_returns_features():
    stack = FusedModFCStack([I, O], S, rgb_after=())
    features, rgb = stack(torch.randn(B, I, H, W), torch.randn(B, S))
    assert features.shape == (B, O, H, W) and rgb is None and len(stack.to_rgbs) == 0


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_memory_order_of_the_image(order):
    stack = FusedModFCStack([I, 8, O], S)
    x, style = torch.randn(B, I, H, W), torch.randn(B, S)
    rgb = stack(x.contiguous(memory_format=order), style, 3)
    assert rgb.is_contiguous(memory_format=order) and rgb.dtype == torch.float32
    assert relative_error(rgb, stack(x, style, 3)) < 1e-6
    assert relative_error(grouped.pixels(rgb), stack(grouped.pixels(x), style, 3)) < 1e-6


# --- what else a module does ----------------------------------------------------------------------------------------


def test_state_dict_loads_across_backends():
    torch.manual_seed(0)
    source, target = (
        FusedModFCStack([I, 8, O], S, backend="reference"),
        FusedModFCStack([I, 8, O], S, backend="cpu"),
    )
    stored = io.BytesIO()
    torch.save(source.state_dict(), stored)
    stored.seek(0)
    assert list(source.state_dict()) == list(target.state_dict())
    target.load_state_dict(torch.load(stored, weights_only=True))
    x, style = torch.randn(B, P, I), torch.randn(B, S)
    assert relative_error(target(x, style, 3), source(x, style, 3)) < 1e-6
    assert {
        f"layers.{k}.{n}"
        for k in (0, 1)
        for n in ("weight", "bias", "noise_strength", "affine.weight", "affine.bias")
    } | {f"to_rgbs.0.{n}" for n in ("weight", "bias", "affine.weight", "affine.bias")} == set(
        source.state_dict()
    )


@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))], ids=["deepcopy", "pickle"]
)
def test_copies_are_equal_and_independent(clone):
    for module in (FusedModFCStack([I, 8, O], S, negative_slope=0.3), FusedModFC(I, O, S), FusedToRGB(I, S)):
        other = clone(module)
        x, style = torch.randn(B, P, I), torch.randn(B, S)
        assert torch.equal(other(x, style), module(x, style))
        before = module(x, style)
        for parameter in other.parameters():
            parameter.data.add_(1.0)
        assert torch.equal(module(x, style), before) and not torch.equal(other(x, style), before)


def test_representations():
    assert repr(FusedModFC(6, 5, 7)).startswith(
        "FusedModFC(\n  6, 5, style_dim=7, negative_slope=0.2, gain=1.414, backend='auto'"
    )
    text = repr(
        FusedModFC(6, 5, 7, demodulate=False, bias=False, noise=False, activation="linear", backend="cpu")
    )
    for part in ("demodulate=False", "bias=False", "noise=False", "activation='linear'", "backend='cpu'"):
        assert part in text
    assert "6, 4, style_dim=7, backend='auto'" in repr(FusedToRGB(6, 7, out_channels=4))
    text = repr(FusedModFCStack([6, 8, 5], 7))
    assert "style_dim=7, rgb_after=[1], backend='auto'" in text
    assert "6, 8, style_dim=7" in text and "8, 5, style_dim=7" in text


def test_backend_of_a_module_is_used(monkeypatch):
    from cips_kernels import ops

    seen, original = [], ops.backend_module
    monkeypatch.setattr(ops, "backend_module", lambda name: seen.append(name) or original(name))
    x, style = torch.randn(B, P, I), torch.randn(B, S)
    for backend in BACKENDS:
        FusedModFC(I, O, S, backend=backend)(x, style)
        FusedToRGB(I, S, backend=backend)(x, style)
        FusedModFCStack([I, O], S, backend=backend)(x, style)
        with use_backend(backend):
            FusedModFC(I, O, S)(x, style)
    assert seen == ["reference"] * 4 + ["cpu"] * 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_modules(dtype):
    torch.manual_seed(0)
    stack = FusedModFCStack([16, 24, 16], 8)
    x, style = torch.randn(B, P, 16), torch.randn(B, 8)
    want = stack(x, style, 3)
    mixed = stack(x.to(dtype), style, 3)  # float32 parameters, half-precision activations
    narrow = stack.to(dtype)(x.to(dtype), style.to(dtype), 3)
    assert mixed.dtype == narrow.dtype == torch.float32
    assert relative_error(mixed, want) < 0.02 and relative_error(narrow, want) < 0.04


def test_descent_lowers_the_loss_and_moves_every_parameter():
    torch.manual_seed(0)
    stack = FusedModFCStack([I, 16, 16], S)
    parameters = list(stack.parameters())
    before = [p.detach().clone() for p in parameters]
    x, style, target = torch.randn(1, P, I), torch.randn(B, S), torch.randn(B, P, 3)
    losses, moved = [], [0.0] * len(parameters)
    for _ in range(30):
        loss = F.mse_loss(stack(x, style, 3), target)
        for parameter, grad in zip(parameters, torch.autograd.grad(loss, parameters)):
            parameter.data -= 0.02 * grad.sign()
        moved = [max(far, (p - q).abs().max().item()) for far, p, q in zip(moved, parameters, before)]
        losses.append(loss.item())
    assert losses[-1] < 0.4 * losses[0]
    assert min(moved) > 0.01
