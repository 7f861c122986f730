"""The stateless operators: the same numbers in every layout, no hidden copy, and the published formulas."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import grouped
from cips_kernels import functional, reference
from cips_kernels.arguments import from_pixels, infer_layout, to_pixels
from cips_kernels.testing import assert_close_as_eager, random_stack, relative_error

BACKENDS = ["reference", "cpu"]
B, I, O, H, W = 2, 6, 5, 3, 4  # noqa: E741  (the letters of the documentation)
P = H * W


def double(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def in_layout(pixels: Tensor, layout: str) -> Tensor:
    """`[B, P, C]` as a tensor of that layout, lying in memory as such a tensor usually does."""
    if layout == "bpc":
        return pixels.contiguous()
    if layout == "bcp":
        return pixels.transpose(1, 2).contiguous()
    planes = grouped.planes(pixels, H, W).contiguous()
    return planes.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else planes


def as_pixels(y: Tensor, layout: str) -> Tensor:
    if layout == "bpc":
        return y
    return y.transpose(1, 2) if layout == "bcp" else grouped.pixels(y)


LAYOUTS = ["bpc", "bcp", "bchw", "channels_last"]


# --- layouts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pixels_are_a_view(layout):
    x = in_layout(torch.randn(B, P, I), layout)
    name = infer_layout(x, I, None)
    assert name == ("bchw" if layout == "channels_last" else layout)
    pixels = to_pixels(x, name)
    assert pixels.shape == (B, P, I) and pixels.data_ptr() == x.data_ptr()
    assert pixels.stride() == ((P * I, I, 1) if layout in ("bpc", "channels_last") else (P * I, 1, P))
    assert torch.equal(pixels, as_pixels(x, layout))
    back = from_pixels(pixels, name, x)
    assert back.shape == x.shape and back.stride() == x.stride() and back.data_ptr() == x.data_ptr()


def test_pixels_of_some_channels_of_channels_last_are_a_view():
    x = in_layout(torch.randn(B, P, I), "channels_last")[:, 1:4]
    pixels = to_pixels(x, "bchw")
    assert pixels.data_ptr() == x.data_ptr() and pixels.stride() == (P * I, I, 1)
    assert torch.equal(pixels, grouped.pixels(x))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_agree_and_keep_their_memory_order(layout, backend):
    case = random_stack((I, 8, O), (0, 1), batch=B, pixels=P, skip=True, dtype=torch.float64)
    want = case.leaves()
    features, rgb = want.call(reference.modfc_stack)
    sent = torch.randn_like(features), torch.randn_like(rgb)
    expected = torch.autograd.grad((features, rgb), list(want.tensors().values()), sent)

    leaves = case.leaves()
    x, skip = (
        in_layout(leaves.x.detach(), layout).requires_grad_(),
        in_layout(case.skip, layout).requires_grad_(),
    )
    moved = leaves.map(lambda name, t: x if name == "x" else skip if name == "skip" else t)
    out = moved.call(functional.modfc_stack, layout=None, backend=backend)
    for value, other in zip(out, (features, rgb)):
        assert value.is_contiguous(
            memory_format=torch.channels_last if layout == "channels_last" else torch.contiguous_format
        )
        assert relative_error(as_pixels(value, layout), other) < 1e-12
    grads = torch.autograd.grad(out, list(moved.tensors().values()), [in_layout(s, layout) for s in sent])
    assert grads[0].stride() == x.stride()
    for name, value, other in zip(moved.tensors(), grads, expected):
        value = as_pixels(value, layout) if name in ("x", "skip") else value
        assert relative_error(value, other) < 1e-10, name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cut", ["every second pixel", "some channels", "a crop", "reversed batch"])
def test_views_that_are_not_contiguous(cut, backend):
    whole = torch.randn(4, 2 * I, 2 * H, 2 * W, dtype=torch.float64, requires_grad=True)
    views = {
        "every second pixel": lambda x: x[:2, :I, ::2, ::2],
        "some channels": lambda x: x[:2, 1 : I + 1, :H, :].narrow(3, 0, W),
        "a crop": lambda x: x[:2, :I, 1 : H + 1, 2 : W + 2],
        "reversed batch": lambda x: x.flip(0)[::2, ::2, :H, :W],
    }
    x, weight, style, bias = views[cut](whole), double(O, I), double(B, I), double(O)
    assert not x.is_contiguous()
    y = functional.modfc(x, weight, style, bias, backend=backend)
    want = grouped.styled_conv(x, weight, style, bias, None, None)
    sent = torch.randn_like(want)
    assert relative_error(y, want) < 1e-12
    got, expected = (torch.autograd.grad(out, (whole, weight, style, bias), sent) for out in (y, want))
    assert relative_error(got, expected) < 1e-12


def test_a_layout_given_settles_what_is_ambiguous():
    x, weight, style = double(B, I, I), double(O, I), double(B, I)
    pixel_major = functional.modfc(x, weight, style, layout="bpc")
    plane_major = functional.modfc(x, weight, style, layout="bcp")
    assert pixel_major.shape == (B, I, O) and plane_major.shape == (B, O, I)
    swapped = functional.modfc(x.transpose(1, 2).contiguous(), weight, style, layout="bpc")
    assert relative_error(plane_major.transpose(1, 2), swapped) < 1e-12
    assert relative_error(plane_major.transpose(1, 2), pixel_major) > 0.1


@pytest.mark.parametrize("shape", [(1, I, 1, 1), (B, I, 1, W), (B, I, H, 1), (B, 1, H, W)])
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_sizes_of_one(shape, order):
    x = torch.randn(shape, dtype=torch.float64).contiguous(memory_format=order)
    weight, style = double(O, shape[1]), double(shape[0], shape[1])
    y = functional.modfc(x, weight, style)
    assert relative_error(y, grouped.styled_conv(x, weight, style, None, None, None)) < 1e-12
    if shape[1] > 1:  # one channel lies in both orders at once
        assert y.is_contiguous(memory_format=order)


# --- the published formulas -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(demodulate=False),
        dict(activation="linear", gain=1.0),
        dict(negative_slope=0.01, gain=0.7, eps=0.2),
    ],
    ids=["defaults", "no demodulation", "linear", "other constants"],
)
def test_modfc_equals_the_published_layer(options, backend):
    x, weight, style, bias = double(B, I, H, W), double(O, I), double(B, I), double(O)
    noise, strength = double(B, P), double()
    leaves = (x, weight, style, bias, noise, strength)
    y = functional.modfc(x, weight, style, bias, noise, strength, backend=backend, **options)
    constants = {key: value for key, value in options.items() if key != "activation"}
    if options.get("activation") == "linear":
        constants["negative_slope"] = 1.0
    want = grouped.styled_conv(x, weight, style, bias, noise.view(B, 1, H, W), strength, **constants)
    assert relative_error(y, want) < 1e-12
    sent = torch.randn_like(want)
    for value, other in zip(torch.autograd.grad(y, leaves, sent), torch.autograd.grad(want, leaves, sent)):
        assert relative_error(value, other) < 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
def test_to_rgb_equals_the_published_layer(backend):
    x, weight, style, bias, skip = (
        double(B, I, H, W),
        double(3, I),
        double(B, I),
        double(3),
        double(B, 3, H, W),
    )
    leaves = (x, weight, style, bias, skip)
    y = functional.to_rgb(x, weight, style, bias, skip, backend=backend)
    want = grouped.to_rgb(x, weight, style, bias, skip)
    assert relative_error(y, want) < 1e-12
    sent = torch.randn_like(want)
    for value, other in zip(torch.autograd.grad(y, leaves, sent), torch.autograd.grad(want, leaves, sent)):
        assert relative_error(value, other) < 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("demodulate", [True, False])
def test_modulate_is_the_kernel_of_the_convolution(demodulate, backend):
    weight, style = double(O, I), double(B, I)
    m = functional.modulate(weight, style, demodulate=demodulate, backend=backend)
    x = torch.randn(B, I, H, W, dtype=torch.float64)
    want = grouped.modulated_conv(x, weight, style, demodulate)
    assert m.is_contiguous() and relative_error(torch.einsum("boi,bihw->bohw", m, x), want) < 1e-12
    if demodulate:
        assert torch.allclose(m.square().sum(-1), torch.ones(B, O, dtype=torch.float64), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_modulate_in_other_dtypes(dtype):
    weight, style = torch.randn(O, I), torch.randn(B, I)
    m = functional.modulate(weight, style, dtype=dtype)
    exact = functional.modulate(weight.double(), style.double())
    assert m.dtype == dtype
    assert_close_as_eager("m", m, exact.to(dtype), exact)
    narrow = functional.modulate(weight.to(dtype), style.to(dtype))
    assert narrow.dtype == dtype
    rounded = functional.modulate(weight.to(dtype).double(), style.to(dtype).double())
    assert_close_as_eager("narrow", narrow, rounded.to(dtype), rounded)


def test_style_a_pixel():
    x, weight, style, bias = double(B, I, H, W), double(O, I), double(B, P, I), double(O)
    noise, strength = double(B, P), double()
    y = functional.modfc(x, weight, style, bias, noise, strength)
    for p in range(P):
        h, w = divmod(p, W)
        n = noise[:, p].view(B, 1, 1, 1)
        want = grouped.styled_conv(x[:, :, h : h + 1, w : w + 1], weight, style[:, p], bias, n, strength)
        assert relative_error(y[:, :, h : h + 1, w : w + 1], want) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_dtypes_of_results(dtype, backend):
    case = random_stack((I, O), (0,), dtype=dtype)
    features, rgb = case.call(functional.modfc_stack, backend=backend)
    assert features.dtype == dtype and rgb.dtype == torch.float32
    narrow = case.cast(dtype, parameters=dtype)  # parameters may also be in the dtype of x
    features, rgb = narrow.call(functional.modfc_stack, backend=backend)
    assert features.dtype == dtype and rgb.dtype == torch.float32


# --- noise ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_noise_forms(backend):
    x, weight, style = double(B, P, I), double(O, I), double(B, I)

    def layer(noise, **options) -> Tensor:
        return functional.modfc(x, weight, style, None, noise, backend=backend, **options)

    assert torch.equal(layer(5), layer(torch.tensor(5)))
    assert not torch.equal(layer(5), layer(6)) and not torch.equal(layer(5), layer(5, layer=1))
    # another product, with a column more, may round otherwise
    assert relative_error(layer(torch.zeros(B, P, dtype=torch.float64)), layer(None)) < 1e-14
    ones = torch.ones(B, P, dtype=torch.float64)
    half = functional.modfc(
        x, weight, style, None, 2 * ones, torch.tensor(0.5, dtype=torch.float64), backend=backend
    )
    assert relative_error(half, layer(ones)) < 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_patch_equals_the_same_part_of_the_full_image(backend):
    coords = torch.stack(
        torch.meshgrid(torch.linspace(-1, 1, W), torch.linspace(-1, 1, H), indexing="xy"), -1
    )
    case = random_stack((I, 8, O), (1,), batch=B, pixels=P, noise=17)
    full = case.call(functional.modfc_stack, coords=coords.reshape(-1, 2), backend=backend)
    inside = torch.zeros(H, W, dtype=torch.bool)
    inside[1:, 1:3] = True
    chosen = inside.flatten().nonzero()[:, 0]
    patch = case.map(lambda name, t: t[:, chosen] if name == "x" else t)
    cut = patch.call(functional.modfc_stack, coords=coords.reshape(-1, 2)[chosen], backend=backend)
    for value, want in zip(cut, full):
        torch.testing.assert_close(value, want[:, chosen], rtol=1e-5, atol=1e-5)
    elsewhere = patch.call(functional.modfc_stack, backend=backend)  # keyed by index: another noise
    assert relative_error(elsewhere[0], full[0][:, chosen]) > 0.01


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_noise_of_the_backward_is_that_of_the_forward(backend):
    # x = 0, unit strength: the output is the noise itself, and dnu = sum of gradient times noise
    x, weight, style = torch.zeros(B, 40, I), torch.randn(O, I), torch.randn(B, I)
    strength = torch.ones((), requires_grad=True)
    y = functional.modfc(x, weight, style, None, 21, strength, activation="linear", gain=1.0, backend=backend)
    sent = torch.randn_like(y)
    y.backward(sent)
    assert y.std() > 0.5
    assert strength.grad.item() == pytest.approx((y * sent).sum().item(), rel=1e-4)


# --- one input for all images ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["bpc", "bchw"])
def test_one_input_for_all_images(layout, backend):
    case = random_stack((I, 8, O), (0, 1), batch=3, pixels=P, shared=True, dtype=torch.float64)
    leaves, copied = (
        case.leaves(),
        case.map(lambda name, t: t.expand(3, -1, -1) if name == "x" else t).leaves(),
    )
    x = in_layout(case.x, layout).requires_grad_()
    shared = leaves.map(lambda name, t: x if name == "x" else t)
    out = shared.call(functional.modfc_stack, layout=layout, backend=backend)
    want = copied.call(functional.modfc_stack, backend=backend)
    sent = [torch.randn_like(o) for o in want]
    assert all(relative_error(as_pixels(a, layout), b) < 1e-12 for a, b in zip(out, want))
    torch.autograd.backward(out, [from_pixels(s, layout, x) for s in sent])
    torch.autograd.backward(want, sent)
    assert relative_error(as_pixels(x.grad, layout), copied.x.grad.sum(0, keepdim=True)) < 1e-12
    for name, tensor in shared.tensors().items():
        if name != "x":
            assert relative_error(tensor.grad, copied.tensors()[name].grad) < 1e-12, name


def test_default_constants_are_those_of_the_paper():
    x = torch.full((1, 1, 1), -1.0, dtype=torch.float64)
    one = torch.ones(1, 1, dtype=torch.float64)
    y = functional.modfc(x, one, one, demodulate=False, layout="bpc")
    assert y.item() == pytest.approx(-0.2 * math.sqrt(2.0), rel=1e-12)
