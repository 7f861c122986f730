"""Foreign layers answer as before when `patch` has replaced them, and are themselves again after `unpatch`."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import foreign_layers as foreign
from cips_kernels import patch, unpatch
from cips_kernels.patch.common import FusedMixin

B, I, O, S, SIZE = 2, 6, 5, 4, 3  # noqa: E741


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def build(layer: type, *args, **options) -> nn.Module:
    torch.manual_seed(0)
    return layer(*args, **options).double()


LAYERS = {
    "styled": (lambda: build(foreign.StyledConv, I, O, 1, S), {"noise": draw(B, 1, SIZE, SIZE)}),
    "styled, not demodulated": (lambda: build(foreign.StyledConv, I, O, 1, S, demodulate=False), {"noise": draw(B, 1, SIZE, SIZE)}),
    "conv": (lambda: build(foreign.ModulatedConv2d, I, O, 1, S), {}),
    "conv, not demodulated": (lambda: build(foreign.ModulatedConv2d, I, O, 1, S, demodulate=False), {}),
    "rgb": (lambda: build(foreign.ToRGB, I, S), {}),
    "rgb, skip": (lambda: build(foreign.ToRGB, I, S), {"skip": draw(B, 3, SIZE, SIZE)}),
    "rgb, small skip": (lambda: build(foreign.ToRGB, I, S, nn.Upsample((SIZE, SIZE))), {"skip": draw(B, 3, 1, 1)}),
    "layer, const": (lambda: build(foreign.SynthesisLayer, I, O, S, SIZE), {"noise_mode": "const"}),
    "layer, gain": (lambda: build(foreign.SynthesisLayer, I, O, S, SIZE), {"noise_mode": "none", "gain": 0.7}),
    "layer, linear": (lambda: build(foreign.SynthesisLayer, I, O, S, SIZE, activation="linear", use_noise=False), {}),
    "layer, clamp": (lambda: build(foreign.SynthesisLayer, I, O, S, SIZE, clamp=0.5), {"noise_mode": "const", "gain": 0.7}),
    "rgb layer": (lambda: build(foreign.ToRGBLayer, I, S), {}),
    "rgb layer, clamp": (lambda: build(foreign.ToRGBLayer, I, S, 0.8), {}),
}


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("name", LAYERS)
def test_answers_and_gradients_are_the_layers_own(name, backend):
    make, options = LAYERS[name]
    layer, x, w = make(), draw(B, I, SIZE, SIZE).requires_grad_(), draw(B, S).requires_grad_()
    leaves = [x, w, *layer.parameters()]
    expected = layer(x, w, **options)
    weights = draw(*expected.shape)
    wanted = torch.autograd.grad((expected * weights).sum(), leaves, allow_unused=True)
    report = patch(layer, backend=backend)
    assert report.replaced == {"": type(layer).original.__name__} and not report.left
    found = layer(x, w, **options)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    for a, b in zip(torch.autograd.grad((found * weights).sum(), leaves, allow_unused=True), wanted):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)
    assert unpatch(layer) == [""] and not isinstance(layer, FusedMixin)
    assert torch.equal(layer(x, w, **options), expected)


@pytest.mark.parametrize("name", ["styled", "layer, const"])
def test_fresh_noise_has_the_layers_distribution(name):
    layer = LAYERS[name][0]()
    x, w = draw(1, I, 200, 200), draw(1, S)
    patch(layer)
    with torch.no_grad():
        quiet = layer(x, w, torch.zeros(1, 1, 200, 200)) if name == "styled" else layer(x, w, noise_mode="none")
        first, second = layer(x, w), layer(x, w)
        strength = layer.noise.weight if name == "styled" else layer.noise_strength

        def raw(y: Tensor) -> Tensor:  # before the activation
            return torch.where(y > 0, y, y / 0.2) / 2**0.5

        noise = (raw(first) - raw(quiet)) / strength
    assert not torch.equal(first, second)
    assert (noise - noise[:, :1]).abs().max() < 1e-6, "one value a pixel"
    assert abs(noise.mean()) < 0.03 and abs(noise.std() - 1) < 0.03


class Model(nn.Module):
    """Everything at once; what is not 1x1 stays."""

    def __init__(self) -> None:
        super().__init__()
        self.first = foreign.StyledConv(I, I, 1, S)
        self.wide = foreign.StyledConv(I, I, 3, S)
        self.up = foreign.StyledConv(I, I, 1, S, upsample=True)
        self.sine = foreign.StyledConv(I, I, 1, S)
        self.sine.activate = foreign.Sine()
        self.rgb = foreign.ToRGB(I, S)
        self.inner = nn.ModuleList([foreign.SynthesisLayer(I, I, S, SIZE, up=2), foreign.SynthesisLayer(I, I, S, SIZE, k=3)])
        self.other = nn.Linear(3, 3)


def test_report_says_what_and_why():
    model = Model()
    names = {key: value.shape for key, value in model.state_dict().items()}
    report = patch(model)
    # within a layer that cannot be served its 1x1 convolution still can
    assert report.replaced == {"first": "StyledConv", "sine.conv": "ModulatedConv2d", "rgb": "ToRGB"}
    assert report.left == {
        "wide": "its kernel is 3x3, not 1x1",
        "wide.conv": "its kernel is 3x3, not 1x1",
        "up": "it goes on to upsample",
        "up.conv": "it goes on to upsample",
        "sine": "its activation is not a leaky ReLU with bias, slope and factor",
        "inner.0": "it goes on to sample up by 2",
        "inner.1": "its kernel is 3x3, not 1x1",
    }
    assert "3 layers replaced, 7 left" in str(report) and "wide left: its kernel is 3x3" in str(report)
    assert {key: value.shape for key, value in model.state_dict().items()} == names
    assert isinstance(model.first, foreign.StyledConv) and type(model.first).__name__ == "FusedStyledConv"
    again = patch(model)
    assert not again.replaced and again.left["first"] == "it is replaced already"
    assert unpatch(model) == ["first", "sine.conv", "rgb"]
    assert not patch(model, to_rgb=False).replaced.get("rgb") and type(model.rgb) is foreign.ToRGB
    assert type(model.rgb.conv) is foreign.ModulatedConv2d


def test_a_copy_computes_with_its_own_parameters():
    layer = LAYERS["conv"][0]()
    patch(layer, backend="reference")
    twin = copy.deepcopy(layer)
    x, w = draw(B, I, SIZE, SIZE), draw(B, S)
    with torch.no_grad():
        twin.weight.zero_()
        assert twin(x, w).abs().max() == 0 and layer(x, w).abs().max() > 0


def test_bad_input():
    with pytest.raises(TypeError, match="model: expected a torch.nn.Module, got int"):
        patch(3)
    with pytest.raises(ValueError, match="backend: expected auto"):
        patch(Model(), backend="metal")
    layer = LAYERS["layer, gain"][0]()
    patch(layer)
    with pytest.raises(ValueError, match="noise_mode: expected random, const or none, got 'loud'"):
        layer(draw(B, I, SIZE, SIZE), draw(B, S), noise_mode="loud")
