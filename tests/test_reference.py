"""The oracle: gradcheck and gradgradcheck, and the same numbers from grouped convolutions and from loops."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import grouped
from cips_kernels import reference
from cips_kernels.arguments import stack_call
from cips_kernels.noise import normal
from cips_kernels.packing import flatten
from cips_kernels.spec import Needs, StackSaved
from cips_kernels.testing import StackCase, random_stack

SQRT2 = math.sqrt(2.0)
# widths, ToRGBs, and how x and the skip come
CASES = {
    "three-layers": dict(widths=(6, 5, 7, 4), rgb_after=(0, 2), skip=True),
    "one-layer": dict(widths=(4, 3)),
    "one-rgb": dict(widths=(4,), rgb_after=(-1,), skip=True),
    "two-rgbs-on-a-layer": dict(widths=(3, 5), rgb_after=(-1, 0, 0)),
    "shared-input": dict(widths=(4, 6, 3), rgb_after=(1,), shared=True, batch=3),
    # widths kept and changed, a block on the input, one of one layer, one in the middle of which a ToRGB reads
    "blocks": dict(widths=(5, 4, 5, 6, 3, 3), rgb_after=(-1, 1, 2, 4), blocks=((0, 1), (2, 3), (4, 4)), skip=True),
    "block-of-shared-input": dict(widths=(4, 6, 3, 3), rgb_after=(2,), blocks=((0, 1),), shared=True, batch=3),
}
OPTIONS = {
    "defaults": {},
    "plain": dict(demodulate=False, negative_slope=1.0, gain=1.0),
    "other": dict(negative_slope=0.05, gain=1.7, eps=0.1),
}


def make(name: str, **options) -> StackCase:
    return random_stack(**CASES[name], dtype=torch.float64, **options).leaves()


def randn(*shape: int, grad: bool = True) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=grad)


def close(name: str, value: Tensor, want: Tensor, tolerance: float = 1e-11) -> None:
    assert value.shape == want.shape, name
    if want.numel():
        difference, scale = (value - want).abs().max().item(), max(1.0, want.abs().max().item())
        assert difference <= tolerance * scale, f"{name}: {difference:.3e}"


def gradients(case: StackCase, outputs: tuple[Tensor | None, ...], seed: int = 7) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    outputs = [out for out in outputs if out is not None]
    sent = [torch.randn(out.shape, generator=generator, dtype=out.dtype) for out in outputs]
    leaves = case.tensors()
    found = torch.autograd.grad(outputs, list(leaves.values()), sent, allow_unused=True)
    return {name: torch.zeros_like(t) if g is None else g for (name, t), g in zip(leaves.items(), found)}


# --- against the grouped convolution --------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", CASES)
def test_stack_equals_grouped_convolution(name, options):
    case = make(name)
    ours = case.call(reference.modfc_stack, **OPTIONS[options])
    theirs = case.call(grouped.stack, **OPTIONS[options])
    for part, value, want in zip(("features", "rgb"), ours, theirs):
        assert (value is None) == (want is None)
        if want is not None:
            close(part, value, want)
    want = gradients(case, theirs)
    for key, value in gradients(case, ours).items():
        close(key, value, want[key])


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", CASES)
def test_written_out_backward_equals_autograd_of_grouped_convolution(name, options):
    case = make(name)
    want_outputs = case.call(grouped.stack, **OPTIONS[options])
    sent = [None if out is None else torch.randn_like(out) for out in want_outputs]
    want = torch.autograd.grad(
        [out for out in want_outputs if out is not None],
        list(case.tensors().values()),
        [grad for grad in sent if grad is not None],
        allow_unused=True,
    )
    want = dict(zip(case.tensors(), want))
    with torch.no_grad():
        inputs, spec = case.call(lambda x, *a, layout, **k: stack_call(x, *a, **k), **OPTIONS[options])
        features, rgb, saved = reference.forward(inputs, spec, want_features=True, save=True)
        grads = reference.backward(*sent, inputs, spec, saved, Needs(True, True, True, True))

    def together(*kinds: str, dim: int | None = None) -> Tensor:
        parts = [want[key] for kind in kinds for key in want if key.startswith(kind)]
        return flatten(parts, torch.float64, dim)

    close("x", grads.x, want["x"])
    close("weights", grads.weights, together("weights", "rgb_weights", "skip_weights"))
    close("styles", grads.styles, together("styles", "rgb_styles", dim=1))
    close("biases", grads.biases, together("biases", "rgb_biases"))
    if spec.depth:
        close("features", features, want_outputs[0])
        close("noise_strengths", grads.noise_strengths, together("noise_strengths"))
    close("noise", grads.noise, torch.zeros_like(case.noise) if want["noise"] is None else want["noise"])
    if spec.rgb_after:
        close("rgb", rgb, want_outputs[1])


@pytest.mark.parametrize("present", [(True, False), (False, True)], ids=["features", "rgb"])
def test_backward_of_one_output_alone(present):
    case = make("three-layers")
    outputs = case.call(grouped.stack)
    sent = [torch.randn_like(out) if here else None for out, here in zip(outputs, present)]
    used = present.index(True)
    want = torch.autograd.grad(outputs[used], [case.x, *case.weights], sent[used])
    with torch.no_grad():
        inputs, spec = case.call(lambda x, *a, layout, **k: stack_call(x, *a, **k))
        saved = reference.forward(inputs, spec, want_features=False, save=True)[2]
        grads = reference.backward(*sent, inputs, spec, saved, Needs(True, True, True, True))
    close("x", grads.x, want[0])
    flat = flatten(list(want[1:]), torch.float64)
    close("weights", grads.weights[: flat.numel()], flat)


def test_layer_and_to_rgb_equal_grouped_convolution():
    x, weight, style, bias = randn(2, 12, 6), randn(5, 6), randn(2, 6), randn(5)
    noise, strength, skip = randn(2, 12), randn(), randn(2, 12, 3)
    rgb_weight, rgb_style, rgb_bias = randn(3, 5), randn(2, 5), randn(3)
    leaves = (x, weight, style, bias, noise, strength, skip, rgb_weight, rgb_style, rgb_bias)
    y = reference.modfc(x, weight, style, bias, noise, strength)
    ours = reference.to_rgb(y, rgb_weight, rgb_style, rgb_bias, skip)
    y = grouped.styled_conv(grouped.planes(x, 3, 4), weight, style, bias, noise.view(2, 1, 3, 4), strength)
    theirs = grouped.pixels(grouped.to_rgb(y, rgb_weight, rgb_style, rgb_bias, grouped.planes(skip, 3, 4)))
    close("rgb", ours, theirs)
    sent = torch.randn_like(ours)
    pairs = zip(torch.autograd.grad(ours, leaves, sent), torch.autograd.grad(theirs, leaves, sent))
    for k, (value, want) in enumerate(pairs):
        close(f"leaf {k}", value, want)


# --- against loops --------------------------------------------------------------------------------------------------


def loop_layer(x, weight, style, bias, noise, nu, slope, gain, eps, demodulate=True):
    """One pixel, one image, in Python floats: the formulas of the paper, number by number."""
    out = []
    for i, row in enumerate(weight):
        v = [s * w / math.sqrt(len(row)) for s, w in zip(style, row)]
        d = 1 / math.sqrt(sum(u * u for u in v) + eps) if demodulate else 1.0
        y = sum(d * u * xj for u, xj in zip(v, x)) + nu * noise + bias[i]
        out.append(gain * (y if y > 0 else slope * y))
    return out


@pytest.mark.parametrize("demodulate", [True, False])
def test_stack_equals_a_loop_over_numbers(demodulate):
    case = random_stack((3, 4, 2), (0, 1), batch=2, pixels=3, skip=True, dtype=torch.float64)
    features, rgb = case.call(reference.modfc_stack, demodulate=demodulate)
    for b in range(2):
        for p in range(3):
            x, colour = case.x[b, p].tolist(), case.skip[b, p].tolist()
            for layer in range(2):
                weight, style = case.weights[layer].tolist(), case.styles[layer][b].tolist()
                bias, nu = case.biases[layer].tolist(), case.noise_strengths[layer].item()
                x = loop_layer(
                    x, weight, style, bias, case.noise[layer, b, p].item(), nu, 0.2, SQRT2, 1e-8, demodulate
                )
                projection = case.rgb_weights[layer].tolist(), case.rgb_styles[layer][b].tolist()
                step = loop_layer(
                    x, *projection, case.rgb_biases[layer].tolist(), 0, 0, 1, 1, 0, demodulate=False
                )
                colour = [c + s for c, s in zip(colour, step)]
            assert features[b, p].tolist() == pytest.approx(x, rel=1e-12)
            assert rgb[b, p].tolist() == pytest.approx(colour, rel=1e-12)


@pytest.mark.parametrize("demodulate", [True, False])
def test_style_a_pixel_equals_a_loop_over_pixels(demodulate):
    x, weight, style, bias = randn(2, 7, 4), randn(5, 4), randn(2, 7, 4), randn(5)
    noise, strength = randn(2, 7), randn()
    leaves = (x, weight, style, bias, noise, strength)
    ours = reference.modfc(x, weight, style, bias, noise, strength, demodulate=demodulate)
    columns = [
        grouped.styled_conv(
            x[:, p, :, None, None],
            weight,
            style[:, p],
            bias,
            noise[:, p, None, None, None],
            strength,
            demodulate=demodulate,
        ).flatten(1)
        for p in range(7)
    ]
    theirs = torch.stack(columns, 1)
    close("y", ours, theirs)
    sent = torch.randn_like(ours)
    pairs = zip(torch.autograd.grad(ours, leaves, sent), torch.autograd.grad(theirs, leaves, sent))
    for k, (value, want) in enumerate(pairs):
        close(f"leaf {k}", value, want)


def test_style_a_pixel_of_equal_styles_is_one_style():
    x, weight, style, bias = randn(2, 7, 4), randn(5, 4), randn(2, 4), randn(5)
    one = reference.modfc(x, weight, style, bias, 11, randn())
    assert one.shape == (2, 7, 5)
    strength = randn()
    each = style[:, None].expand(-1, 7, -1)
    close(
        "y",
        reference.modfc(x, weight, each, bias, 11, strength),
        reference.modfc(x, weight, style, bias, 11, strength),
    )


# --- gradcheck ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("demodulate", [True, False])
def test_modulate_and_its_backward_pass_gradcheck(demodulate):
    weight, style, grad = randn(3, 4), randn(2, 4), randn(2, 3, 4)
    options = dict(demodulate=demodulate, eps=0.01)

    def forward(weight, style):
        return reference.modulate(weight, style, **options)

    def backward(grad, weight, style):
        return reference.modulate_backward(grad, weight, style, **options)

    assert gradcheck(forward, (weight, style)) and gradgradcheck(forward, (weight, style))
    assert gradcheck(backward, (grad, weight, style)) and gradgradcheck(backward, (grad, weight, style))
    want = torch.autograd.grad(forward(weight, style), (weight, style), grad)
    for name, value, expected in zip(("weight", "style"), backward(grad, weight, style), want):
        close(name, value, expected)


@pytest.mark.parametrize("activation", ["lrelu", "linear"])
def test_modfc_passes_gradcheck(activation):
    leaves = (randn(2, 3, 4), randn(5, 4), randn(2, 4), randn(5), randn(2, 3), randn())

    def layer(x, weight, style, bias, noise, strength):
        return reference.modfc(x, weight, style, bias, noise, strength, activation=activation)

    assert gradcheck(layer, leaves) and gradgradcheck(layer, leaves)


def test_style_a_pixel_passes_gradcheck():
    leaves = (randn(2, 3, 4), randn(5, 4), randn(2, 3, 4), randn(5), randn(2, 3), randn())
    assert gradcheck(reference.modfc, leaves) and gradgradcheck(reference.modfc, leaves)


def test_to_rgb_passes_gradcheck():
    leaves = (randn(2, 3, 4), randn(3, 4), randn(2, 4), randn(3), randn(2, 3, 3))

    def rgb(x, weight, style, bias, skip):
        return reference.to_rgb(x, weight, style, bias, skip, layout="bpc")

    assert gradcheck(rgb, leaves) and gradgradcheck(rgb, leaves)


@pytest.mark.parametrize("blocks", [(), ((0, 0), (1, 2))], ids=["plain", "blocks"])
@pytest.mark.parametrize("shared", [False, True])
def test_stack_passes_gradcheck(shared, blocks):
    widths = (3, 4, 2) if not blocks else (3, 2, 2, 2)
    case = random_stack(widths, (0, 1), pixels=3, skip=True, shared=shared, blocks=blocks, dtype=torch.float64).leaves()
    names = list(case.tensors())

    def stack(*leaves):
        found = dict(zip(names, leaves))
        return rebuilt(case, found).call(reference.modfc_stack)

    leaves = tuple(case.tensors().values())
    assert gradcheck(stack, leaves) and gradgradcheck(stack, leaves)


@pytest.mark.parametrize("blocks", [(), ((0, 0), (1, 2))], ids=["plain", "blocks"])
def test_written_out_backward_passes_gradcheck(blocks):
    widths = (3, 4, 2) if not blocks else (3, 2, 2, 2)
    case = random_stack(widths, (0, 1), pixels=3, skip=True, blocks=blocks, dtype=torch.float64).leaves()
    names = list(case.tensors())

    def backward(grad_features, grad_rgb, *leaves):
        inputs, spec = rebuilt(case, dict(zip(names, leaves))).call(
            lambda x, *a, layout, **k: stack_call(x, *a, **k)
        )
        return tuple(reference.differentiable_backward(grad_features, grad_rgb, inputs, spec))

    leaves = (randn(2, 3, 2), randn(2, 3, 3), *case.tensors().values())
    assert gradcheck(backward, leaves) and gradgradcheck(backward, leaves, fast_mode=True)


def rebuilt(case: StackCase, found: dict[str, Tensor]) -> StackCase:
    """`case` with other tensors under the same names."""
    rest = iter(found.values())
    return case.map(lambda _name, _tensor: next(rest))


# --- what else is promised ------------------------------------------------------------------------------------------


def test_zero_before_the_activation_takes_the_negative_branch():
    # x' = 0 tells nothing of the sign: forward and backward must agree that it is the lower branch
    x, weight, style = torch.zeros(1, 2, 3, dtype=torch.float64, requires_grad=True), randn(2, 3), randn(1, 3)
    y = reference.modfc(x, weight, style, layout="bpc", negative_slope=0.2, gain=2.0)
    (grad,) = torch.autograd.grad(y.sum(), x)
    m = reference.modulate(weight, style)
    close("autograd", grad, 0.4 * m.sum(1)[:, None].expand(1, 2, 3))
    ones = torch.ones_like(y)
    close("written out", reference.layer_backward(ones, x, y, m, 0.2, 2.0)[0], grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_weights_once_and_sums_rgb_in_float32(dtype):
    case = random_stack((16, 24, 16), (1,), pixels=33, dtype=dtype)
    features, rgb = case.call(reference.modfc_stack)
    assert features.dtype == dtype and rgb.dtype == torch.float32
    mods = reference.modulate(case.weights[0], case.styles[0], dtype=dtype)
    exact = reference.modulate(case.weights[0].double(), case.styles[0].double())
    assert mods.dtype == dtype
    rounding = torch.finfo(dtype).eps / 2
    assert ((mods.double() - exact).abs() <= rounding * 1.001 * exact.abs()).all()


def test_counter_noise_of_the_stack_is_that_of_each_layer():
    case = random_stack((4, 5, 3), pixels=6, noise=1234, dtype=torch.float64)
    seed = torch.tensor(1234)
    given = torch.stack([normal(seed, layer, 2, 6) for layer in range(2)]).double()
    drawn, _ = case.call(reference.modfc_stack)
    close("features", drawn, case.call(reference.modfc_stack, noise=given)[0])
    x = reference.modfc(
        case.x, case.weights[0], case.styles[0], case.biases[0], 1234, case.noise_strengths[0], layer=0
    )
    x = reference.modfc(
        x, case.weights[1], case.styles[1], case.biases[1], 1234, case.noise_strengths[1], layer=1
    )
    close("layer by layer", drawn, x)


def test_saved_is_what_the_packing_says():
    case = random_stack((4, 5, 3), (0,), pixels=6)
    inputs, spec = case.call(lambda x, *a, layout, **k: stack_call(x, *a, **k))
    _, _, saved = reference.forward(inputs, spec, want_features=False, save=True)
    assert isinstance(saved, StackSaved)
    packing = spec.packing(2)
    for matrix, weight, style in zip(
        packing.matrices, case.weights + case.rgb_weights, case.styles + case.rgb_styles
    ):
        m = reference.modulate(weight, style, demodulate=matrix.demodulate)
        close("mods", packing.mod(saved.mods, matrix), m, 1e-6)
    none = reference.forward(inputs, spec, want_features=False, save=False)
    assert none[0].numel() == 0 and none[2].activations.numel() == 0 and none[2].mods.numel() == 0
