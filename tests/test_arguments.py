"""Bad input: each kind gets an exception that names the argument, what came and what was expected, before any launch.
Empty and non-contiguous input is not bad input."""

from __future__ import annotations

import importlib
import math
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from cips_kernels import FusedModFC, FusedModFCStack, FusedToRGB, functional, ops
from cips_kernels.testing import random_stack

B, P, I, O, H, W, S = 2, 12, 6, 5, 3, 4, 7  # noqa: E741  (the letters of the documentation)
META = torch.device("meta")


@pytest.fixture
def no_launch(monkeypatch):
    """Nothing may be launched."""
    monkeypatch.setattr(ops, "backend_module", lambda name: pytest.fail(f"backend {name} was launched"))


def says(error: BaseException, *parts: str) -> None:
    message = str(error)
    for part in parts:
        assert part in message, f"{part!r} is not in {message!r}"


def layer_arguments(**changes) -> dict:
    arguments = dict(
        x=torch.randn(B, P, I),
        weight=torch.randn(O, I),
        style=torch.randn(B, I),
        bias=torch.randn(O),
        noise=torch.randn(B, P),
        noise_strength=torch.ones(()),
    )
    return arguments | changes


NAN_STYLE = torch.ones(B, I)
NAN_STYLE[1, 3] = math.nan
INF_PIXEL_STYLE = torch.ones(B, P, I)
INF_PIXEL_STYLE[1, 2, 3] = math.inf

# what is changed, the exception, and what its message holds: the argument, what came, what was expected
LAYER = {
    "x of wrong rank": (dict(x=torch.randn(P, I)), ValueError, ("x: expected", "[B, P, 6]", "[B, 6, P]", "[B, 6, H, W]", "float32 [12, 6]")),
    "x of rank 5": (dict(x=torch.randn(B, I, 1, 1, 1)), ValueError, ("x: expected", "[B, 6, H, W]", "[2, 6, 1, 1, 1]")),
    "x with other channels": (dict(x=torch.randn(B, P, 9)), ValueError, ("x: expected", "[B, P, 6]", "float32 [2, 12, 9]")),
    "planes with other channels": (dict(x=torch.randn(B, 9, H, W)), ValueError, ("x: expected [B, 6, H, W]", "float32 [2, 9, 3, 4]")),
    "planes as pixels": (dict(x=torch.randn(B, I, H, W), layout="bpc"), ValueError, ("x: expected [B, P, 6]", "[2, 6, 3, 4]")),
    "x of integers": (dict(x=torch.ones(B, P, I, dtype=torch.int32)), TypeError, ("x: expected float16, bfloat16, float32 or float64", "int32 [2, 12, 6]")),
    "x is a list": (dict(x=[[1.0]]), TypeError, ("x: expected a floating-point tensor", "list")),
    "ambiguous layout": (dict(x=torch.randn(B, I, I)), ValueError, ("layout: x [2, 6, 6]", "layout='bpc'", "layout='bcp'")),
    "unknown layout": (dict(layout="nchw"), ValueError, ("layout: expected one of bpc, bcp, bchw", "'nchw'")),
    "weight of wrong rank": (dict(weight=torch.randn(1, O, I)), ValueError, ("weight: expected [O, I]", "float32 [1, 5, 6]")),
    "weight with other channels": (dict(weight=torch.randn(O, I + 1), layout="bpc"), ValueError, ("x: expected [B, P, 7]", "[2, 12, 6]")),
    "weight of integers": (dict(weight=torch.ones(O, I, dtype=torch.int64)), TypeError, ("weight: expected float32", "int64 [5, 6]")),
    "weight of another dtype": (dict(weight=torch.randn(O, I).double()), TypeError, ("weight: expected float32", "torch.float32", "float64 [5, 6]")),
    "weight of another half": (
        dict(x=torch.randn(B, P, I).half(), weight=torch.randn(O, I).bfloat16()), TypeError,
        ("weight: expected float16 or float32", "bfloat16 [5, 6]"),
    ),
    "weight elsewhere": (dict(weight=torch.randn(O, I, device=META)), ValueError, ("weight: is on meta", "x is on cpu")),
    "weight is an array": (dict(weight=[[1.0]]), TypeError, ("weight: expected a tensor [O, I]", "list")),
    "style of wrong rank": (dict(style=torch.randn(I)), ValueError, ("style: expected [B, I]", "float32 [6]")),
    "style of another batch": (dict(style=torch.randn(3, I)), ValueError, ("style: expected the batch size of x, 2", "float32 [3, 6]")),
    "style with other channels": (dict(style=torch.randn(B, 8)), ValueError, ("style: expected [B, I] = [2, 6]", "float32 [2, 8]")),
    "style of integers": (dict(style=torch.ones(B, I, dtype=torch.int64)), TypeError, ("style: expected float32", "int64 [2, 6]")),
    "style of another dtype": (dict(style=torch.ones(B, I).half()), TypeError, ("style: expected float32", "float16 [2, 6]")),
    "style elsewhere": (dict(style=torch.randn(B, I, device=META)), ValueError, ("style: is on meta", "x is on cpu")),
    "style with NaN": (dict(style=NAN_STYLE), ValueError, ("style: expected finite values", "nan at index [1, 3]")),
    "style is missing": (dict(style=None), TypeError, ("style: expected a tensor [B, I]", "NoneType")),
    "pixel style of other pixels": (dict(style=torch.randn(B, P + 1, I)), ValueError, ("style: expected [B, P, I] = [2, 12, 6]", "[2, 13, 6]")),
    "pixel style with infinity": (dict(style=INF_PIXEL_STYLE), ValueError, ("style: expected finite values", "inf at index [1, 2, 3]")),
    "pixel style and bad bias": (dict(style=torch.randn(B, P, I), bias=torch.randn(O + 1)), ValueError, ("bias: expected [O] = [5]", "[6]")),
    "pixel style and bad strength": (dict(style=torch.randn(B, P, I), noise_strength=0.5), TypeError, ("noise_strength: expected a tensor", "float 0.5")),
    "pixel style and bad slope": (dict(style=torch.randn(B, P, I), negative_slope=-1.0), ValueError, ("negative_slope: expected", "-1.0")),
    "bias of wrong shape": (dict(bias=torch.randn(1, O)), ValueError, ("bias: expected [O] = [5]", "float32 [1, 5]")),
    "bias of integers": (dict(bias=torch.ones(O, dtype=torch.int32)), TypeError, ("bias: expected float32", "int32 [5]")),
    "bias elsewhere": (dict(bias=torch.randn(O, device=META)), ValueError, ("bias: is on meta", "x is on cpu")),
    "noise of other pixels": (dict(noise=torch.randn(B, P - 1)), ValueError, ("noise: expected [B, P] =", "2, 12]", "11]")),
    "noise of another batch": (dict(noise=torch.randn(1, P)), ValueError, ("noise: expected [B, P] =", "2, 12]", "1, 12]")),
    "noise as planes": (dict(noise=torch.randn(B, 1, H, W)), ValueError, ("noise: expected [B, P]", "[2, 1, 3, 4]")),
    "noise of integers": (dict(noise=torch.ones(B, P, dtype=torch.int64)), TypeError, ("noise: expected a floating-point tensor or an int64 scalar", "int64 [2, 12]")),
    "noise elsewhere": (dict(noise=torch.randn(B, P, device=META)), ValueError, ("noise: is on meta", "x is on cpu")),
    "noise is a word": (dict(noise="on"), TypeError, ("noise: expected None, an int seed or a tensor", "str 'on'")),
    "noise is a bool": (dict(noise=True), TypeError, ("noise: expected None, an int seed or a tensor", "bool True")),
    "seed out of range": (dict(noise=2**63), ValueError, ("noise: expected a seed in [-2**63, 2**63)", str(2**63))),
    "strength of many values": (dict(noise_strength=torch.ones(O)), ValueError, ("noise_strength: expected one value", "float32 [5]")),
    "strength is a number": (dict(noise_strength=0.5), TypeError, ("noise_strength: expected a tensor of one value", "float 0.5")),
    "strength of integers": (dict(noise_strength=torch.tensor(1)), TypeError, ("noise_strength: expected float32", "int64 []")),
    "coords of wrong shape": (dict(coords=torch.rand(P, 3)), ValueError, ("coords: expected [P, 2] or [B, P, 2]", "[12, 3]")),
    "coords of another batch": (dict(coords=torch.rand(3, P, 2)), ValueError, ("coords: expected", "[2, 12, 2]", "[3, 12, 2]")),
    "coords of integers": (dict(coords=torch.ones(P, 2, dtype=torch.int64)), TypeError, ("coords: expected a floating-point tensor", "int64 [12, 2]")),
    "coords elsewhere": (dict(coords=torch.rand(P, 2, device=META)), ValueError, ("coords: is on meta", "x is on cpu")),
    "unknown activation": (dict(activation="relu"), ValueError, ("activation: expected 'lrelu', 'linear', 'sin' or 'sinrelu'", "'relu'")),
    "negative slope below 0": (dict(negative_slope=-0.1), ValueError, ("negative_slope: expected a finite number of at least 0", "-0.1")),
    "gain of 0": (dict(gain=0.0), ValueError, ("gain: expected a finite number above 0", "0.0")),
    "eps is NaN": (dict(eps=math.nan), ValueError, ("eps: expected a finite number of at least 0", "nan")),
    "layer below 0": (dict(layer=-1), ValueError, ("layer: expected a number in [0, 2**31)", "-1")),
    "unknown backend": (dict(backend="metal"), ValueError, ("backend: expected auto, reference, cpu, triton, cuda", "'metal'")),
}  # fmt: skip


@pytest.mark.usefixtures("no_launch")
@pytest.mark.parametrize("name", LAYER)
def test_bad_layer(name):
    changes, error, parts = LAYER[name]
    with pytest.raises(error) as caught:
        functional.modfc(**layer_arguments(**changes))
    says(caught.value, *parts)


@pytest.mark.usefixtures("no_launch")
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_backend_that_cannot_serve(monkeypatch, backend):
    registry = importlib.import_module("cips_kernels.backends")
    monkeypatch.setitem(registry._STATUS, backend, lambda: registry.Status(False, "the sun is in Cancer"))
    x, weight, style = torch.randn(B, P, I), torch.randn(O, I), torch.randn(B, I)
    for call in (
        lambda: functional.modfc(x, weight, style, backend=backend),
        lambda: functional.to_rgb(x, weight, style, backend=backend),
        lambda: functional.modfc_stack(x, [weight], [style], [None], [None], backend=backend),
        lambda: functional.modulate(weight, style, backend=backend),
        lambda: functional.modfc(x, weight, x, backend=backend),
        lambda: FusedModFC(I, O, S, backend=backend)(x, torch.randn(B, S)),
    ):
        with pytest.raises(RuntimeError) as caught:
            call()
        says(caught.value, f"backend '{backend}' cannot serve this call: the sun is in Cancer")


@pytest.mark.usefixtures("no_launch")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="triton serves here")
def test_dtype_that_a_backend_cannot_serve():
    x, weight, style = (torch.randn(*shape).double() for shape in ((B, P, I), (O, I), (B, I)))
    with pytest.raises(RuntimeError) as caught:
        functional.modfc(x, weight, style, backend="triton")
    says(
        caught.value,
        "backend 'triton' cannot serve this call: it computes in float16, bfloat16 or float32, not in torch.float64",
    )


@pytest.mark.usefixtures("no_launch")
def test_a_style_a_pixel_from_a_backend_without_one():
    with pytest.raises(RuntimeError) as caught:
        functional.modfc(torch.randn(B, P, I), torch.randn(O, I), torch.randn(B, P, I), backend="cpu")
    says(caught.value, "backend 'cpu' cannot serve this call: a style a pixel is served by 'reference'")


RGB = {
    "skip of wrong rank": (dict(skip=torch.randn(B, 3, P)), ValueError, ("skip: expected [B, C, H, W]", "[2, 3, 12]")),
    "skip of other channels": (dict(skip=torch.randn(B, 4, H, W)), ValueError, ("skip: expected [B, P, C] = [2, 12, 3]", "[2, 12, 4]")),
    "skip of another batch": (dict(skip=torch.randn(1, 3, H, W)), ValueError, ("skip: expected [B, P, C] = [2, 12, 3]", "[1, 12, 3]")),
    "skip turned": (dict(skip=torch.randn(B, 3, W, H)), ValueError, ("skip: expected [B, C, H, W] = [any, any, 3, 4]", "[2, 3, 4, 3]")),
    "skip of integers": (dict(skip=torch.ones(B, 3, H, W, dtype=torch.uint8)), TypeError, ("skip: expected a floating-point tensor", "uint8")),
    "skip elsewhere": (dict(skip=torch.randn(B, 3, H, W, device=META)), ValueError, ("skip: is on meta", "x is on cpu")),
    "skip is a number": (dict(skip=0.0), TypeError, ("skip: expected a tensor [B, C, H, W]", "float 0.0")),
    "weight with other channels": (dict(weight=torch.randn(3, 9)), ValueError, ("x: expected [B, 9, H, W]", "[2, 6, 3, 4]")),
    "style of another batch": (dict(style=torch.randn(3, I)), ValueError, ("style: expected the batch size of x, 2", "[3, 6]")),
    "style with NaN": (dict(style=NAN_STYLE), ValueError, ("style: expected finite values", "nan at index [1, 3]")),
    "bias of wrong shape": (dict(bias=torch.randn(4)), ValueError, ("bias: expected [O] = [3]", "[4]")),
    "unknown backend": (dict(backend="gpu"), ValueError, ("backend: expected auto", "'gpu'")),
}  # fmt: skip


@pytest.mark.usefixtures("no_launch")
@pytest.mark.parametrize("name", RGB)
def test_bad_to_rgb(name):
    changes, error, parts = RGB[name]
    arguments = dict(
        x=torch.randn(B, I, H, W), weight=torch.randn(3, I), style=torch.randn(B, I), bias=torch.randn(3)
    )
    with pytest.raises(error) as caught:
        functional.to_rgb(**(arguments | changes))
    says(caught.value, *parts)


def first_as(value):
    """A list with its first entry replaced."""
    return lambda tensors: [value, *tensors[1:]]


STACK = {
    "no layers": (dict.fromkeys(("weights", "styles", "biases", "noise_strengths", "rgb_weights", "rgb_styles", "rgb_biases", "rgb_after"), lambda _: []),
                  ValueError, ("weights: expected at least one layer or ToRGB",)),
    "a style too few": (dict(styles=lambda t: t[:1]), ValueError, ("styles: expected 2 entries, one for each weight", "got 1")),
    "a bias too many": (dict(biases=lambda t: [*t, None]), ValueError, ("biases: expected 2 entries", "got 3")),
    "a strength too few": (dict(noise_strengths=lambda t: []), ValueError, ("noise_strengths: expected 2 entries", "got 0")),
    "a place too few": (dict(rgb_after=lambda t: []), ValueError, ("rgb_after: expected 1 entries", "got 0")),
    "a place out of range": (dict(rgb_after=lambda t: [2]), ValueError, ("rgb_after[0]: expected a layer from -1 (the input) to 1", "got 2")),
    "weights that do not meet": (dict(weights=lambda t: [t[0], torch.randn(4, 9)]), ValueError, ("weights[1]: expected [O, I] = [any, 8]", "float32 [4, 9]")),
    "style of another batch": (dict(styles=lambda t: [t[0], torch.randn(3, 8)]), ValueError, ("styles[1]: expected [B, I] = [2, 8]", "float32 [3, 8]")),
    "first style of another batch": (dict(styles=first_as(torch.randn(3, I))), ValueError, ("styles[0]: expected the batch size of x, 2", "float32 [3, 6]")),
    "NaN in a style": (dict(styles=first_as(NAN_STYLE)), ValueError, ("styles[0]: expected finite values", "nan at index [1, 3]")),
    "NaN in a ToRGB's style": (dict(rgb_styles=lambda t: [t[0] * math.nan]), ValueError, ("rgb_styles[0]: expected finite values", "nan at index [0, 0]")),
    "weight of another dtype": (dict(weights=lambda t: [t[0], t[1].double()]), TypeError, ("weights[1]: expected float32", "float64 [5, 8]")),
    "bias elsewhere": (dict(biases=first_as(torch.randn(8, device=META))), ValueError, ("biases[0]: is on meta", "x is on cpu")),
    "ToRGB of other channels": (dict(rgb_weights=lambda t: [torch.randn(3, 9)]), ValueError, ("rgb_weights[0]: expected [O, I] = [any, 5]", "[3, 9]")),
    "noise for one layer": (dict(noise=lambda t: t[0]), ValueError, ("noise: expected [L, B, P] = [2, 2, 12]", "[2, 12]")),
    "noise of other layers": (dict(noise=lambda t: torch.cat([t, t])), ValueError, ("noise: expected [L, B, P] = [2, 2, 12]", "[4, 2, 12]")),
    "x of another batch": (dict(x=lambda t: torch.randn(3, P, I)), ValueError, ("styles[0]: expected the batch size of x, 3", "[2, 6]")),
}  # fmt: skip


@pytest.mark.usefixtures("no_launch")
@pytest.mark.parametrize("name", STACK)
def test_bad_stack(name):
    changes, error, parts = STACK[name]
    case = random_stack((I, 8, O), (1,), batch=B, pixels=P)
    fields = (
        "x",
        "weights",
        "styles",
        "biases",
        "noise_strengths",
        "rgb_weights",
        "rgb_styles",
        "rgb_biases",
        "rgb_after",
        "noise",
    )
    arguments = {field: getattr(case, field) for field in fields}
    arguments |= {field: change(arguments[field]) for field, change in changes.items()}
    with pytest.raises(error) as caught:
        functional.modfc_stack(**arguments)
    says(caught.value, *parts)


@pytest.mark.usefixtures("no_launch")
def test_skip_without_to_rgb():
    with pytest.raises(ValueError) as caught:
        random_stack((I, O), batch=B, pixels=P).call(functional.modfc_stack, skip=torch.randn(B, P, 3))
    says(caught.value, "skip: expected None without a ToRGB", "float32 [2, 12, 3]")


@pytest.mark.usefixtures("no_launch")
def test_to_rgbs_of_different_channels():
    case = random_stack((I, O), (-1, 0), batch=B, pixels=P)
    case.rgb_weights[1] = torch.randn(4, O)
    with pytest.raises(ValueError) as caught:
        case.call(functional.modfc_stack)
    says(caught.value, "rgb_weights[1]: expected 3 output channels as the first", "float32 [4, 5]")


MODULATE = {
    "style of other channels": (dict(style=torch.randn(B, 9)), ValueError, ("style: expected [B, I] = [any, 6]", "[2, 9]")),
    "weight of integers": (dict(weight=torch.ones(O, I, dtype=torch.int32)), TypeError, ("weight: expected float16, bfloat16, float32 or float64", "int32")),
    "style of another dtype": (dict(style=torch.randn(B, I).double()), TypeError, ("style: expected float32 to go with weight", "float64 [2, 6]")),
    "style elsewhere": (dict(style=torch.randn(B, I, device=META)), ValueError, ("style: is on meta", "weight is on cpu")),
    "integer result": (dict(dtype=torch.int8), TypeError, ("dtype: expected float16, bfloat16, float32 or float64", "int8")),
    "NaN": (dict(style=NAN_STYLE), ValueError, ("style: expected finite values", "nan at index [1, 3]")),
    "eps below 0": (dict(eps=-1.0), ValueError, ("eps: expected a finite number of at least 0", "-1.0")),
}  # fmt: skip


@pytest.mark.usefixtures("no_launch")
@pytest.mark.parametrize("name", MODULATE)
def test_bad_modulate(name):
    changes, error, parts = MODULATE[name]
    with pytest.raises(error) as caught:
        functional.modulate(**(dict(weight=torch.randn(O, I), style=torch.randn(B, I)) | changes))
    says(caught.value, *parts)


# --- modules --------------------------------------------------------------------------------------------------------

CALLS = {
    "style of wrong rank": (lambda: FusedModFC(I, O, S)(torch.randn(B, P, I), torch.randn(S)), ValueError, ("style: expected [B, 7] or [B, P, 7]", "float32 [7]")),
    "style of another width": (lambda: FusedModFC(I, O, S)(torch.randn(B, P, I), torch.randn(B, 9)), ValueError, ("style: expected [B, 7]", "[2, 9]")),
    "style of another batch": (lambda: FusedModFC(I, O, S)(torch.randn(B, P, I), torch.randn(3, S)), ValueError, ("style: expected the batch size of x, 2", "[3, 6]")),
    "style of integers": (lambda: FusedModFC(I, O, S)(torch.randn(B, P, I), torch.ones(B, S, dtype=torch.int64)), TypeError, ("style: expected float32", "int64 [2, 7]")),
    "style elsewhere": (lambda: FusedModFC(I, O, S)(torch.randn(B, P, I), torch.randn(B, S, device=META)), ValueError, ("style: is on meta", "the module is on cpu")),
    "style with NaN": (lambda: FusedModFC(I, O, S)(torch.randn(B, P, I), torch.full((B, S), math.nan)), ValueError, ("style: expected finite values", "nan")),
    "style is a list": (lambda: FusedToRGB(I, S)(torch.randn(B, P, I), [1.0]), TypeError, ("style: expected [B, 7]", "list")),
    "style a pixel of a ToRGB": (lambda: FusedToRGB(I, S)(torch.randn(B, P, I), torch.randn(B, P, S)), ValueError, ("style: expected [B, 7]", "[2, 12, 7]")),
    "x elsewhere": (lambda: FusedModFC(I, O, S)(torch.randn(B, P, I, device=META), torch.randn(B, S)), ValueError, ("weight: is on cpu", "x is on meta")),
    "x of another dtype": (lambda: FusedModFC(I, O, S)(torch.randn(B, P, I).double(), torch.randn(B, S)), TypeError, ("weight: expected float64", "float32 [5, 6]")),
    "noise is a word": (lambda: FusedModFC(I, O, S)(torch.randn(B, P, I), torch.randn(B, S), "none"), ValueError, ("noise: expected None, 'fresh', 'off', an int seed or a tensor", "'none'")),
    "noise turned": (lambda: FusedModFC(I, O, S)(torch.randn(B, I, H, W), torch.randn(B, S), torch.randn(B, 1, W, H)), ValueError, ("noise: expected [B, 1, H, W]", "3, 4]", "[2, 1, 4, 3]")),
    "noise of two channels": (lambda: FusedModFC(I, O, S)(torch.randn(B, I, H, W), torch.randn(B, S), torch.randn(B, 2, H, W)), ValueError, ("noise: expected [B, 1, H, W]", "[2, 2, 3, 4]")),
    "styles of other layers": (lambda: FusedModFCStack([I, O], S)(torch.randn(B, P, I), torch.randn(B, 5, S)), ValueError, ("style: expected [B, 2, 7], one for each layer and ToRGB", "[2, 5, 7]")),
    "width of 0": (lambda: FusedModFC(0, O, S), ValueError, ("in_features: expected an int of at least 1", "0")),
    "width of 1.5": (lambda: FusedToRGB(I, 1.5), ValueError, ("style_dim: expected an int of at least 1", "1.5")),
    "unknown activation": (lambda: FusedModFC(I, O, S, activation="gelu"), ValueError, ("activation: expected", "'sin'", "'gelu'")),
    "gain of infinity": (lambda: FusedModFC(I, O, S, gain=math.inf), ValueError, ("gain: expected a finite number", "inf")),
    "unknown backend": (lambda: FusedModFC(I, O, S, backend="gpu"), ValueError, ("backend: expected auto", "'gpu'")),
    "no layers": (lambda: FusedModFCStack([I], S), ValueError, ("widths: expected the input's width and at least one layer's", "[6]")),
    "place out of range": (lambda: FusedModFCStack([I, O], S, rgb_after=[1]), ValueError, ("rgb_after[0]: expected a layer from 0 to 0", "1")),
}  # fmt: skip


@pytest.mark.usefixtures("no_launch")
@pytest.mark.parametrize("name", CALLS)
def test_bad_module_call(name):
    call, error, parts = CALLS[name]
    with pytest.raises(error) as caught:
        call()
    says(caught.value, *parts)


# --- what is served -------------------------------------------------------------------------------------------------


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, requires_grad=True)


@pytest.mark.parametrize("backend", ["auto", "reference", "cpu"])
@pytest.mark.parametrize(
    "batch, shape", [(0, (0, I, H, W)), (B, (B, I, 0, W)), (B, (B, 0, I)), (0, (0, P, I)), (B, (1, 0, I))]
)
def test_empty_input_gives_empty_output(batch, shape, backend):
    x, weight, style, bias, strength = leaf(*shape), leaf(O, I), leaf(batch, I), leaf(O), leaf()
    layout = None if len(shape) == 4 else "bpc"
    y = functional.modfc(x, weight, style, bias, 5, strength, layout=layout, backend=backend)
    rgb_weight, rgb_style = leaf(3, O), leaf(batch, O)
    rgb = functional.to_rgb(y, rgb_weight, rgb_style, layout=layout, backend=backend)
    sizes = [batch, *shape[1:]]
    sizes[1 if layout is None else 2] = 3
    assert list(rgb.shape) == sizes and rgb.numel() == 0
    rgb.sum().backward()
    for tensor in (x, weight, style, bias, strength, rgb_weight, rgb_style):
        assert tensor.grad.shape == tensor.shape and (tensor.grad == 0).all()


def test_empty_input_of_modules():
    stack = FusedModFCStack([I, 8, O], S)
    for x, style in (
        (torch.randn(0, I, H, W), torch.randn(0, S)),
        (torch.randn(B, I, 0, W), torch.randn(B, S)),
    ):
        rgb = stack(x, style)
        assert rgb.shape == (x.shape[0], 3, *x.shape[2:])
        rgb.sum().backward()
    assert all((p.grad == 0).all() for p in stack.parameters())


@pytest.mark.parametrize("batch", [0, B])
def test_empty_modulate(batch):
    weight, style = leaf(O, I), leaf(batch, I)
    m = functional.modulate(weight, style)
    m.sum().backward()
    assert m.shape == (batch, O, I) and weight.grad.shape == (O, I)


def test_parameters_that_are_views():
    whole = torch.randn(2 * O, 2 * I)
    weight, style, bias = whole[::2, ::2], torch.randn(I, B).T, torch.randn(2 * O)[::2]
    x, noise = torch.randn(P, B, I).transpose(0, 1), torch.randn(P, B).T
    assert not any(t.is_contiguous() for t in (weight, style, bias, x, noise))
    got = functional.modfc(x, weight, style, bias, noise)
    want = functional.modfc(*(t.contiguous() for t in (x, weight, style, bias, noise)))
    assert torch.equal(got, want)


def test_nan_outside_the_styles_is_not_an_error():
    x = torch.randn(B, P, I)
    x[0, 3] = math.nan
    y = functional.modfc(x, torch.randn(O, I), torch.randn(B, I))
    assert y[0, 3].isnan().all() and y.isnan().sum() == O


CHECK = """
import torch
from cips_kernels import functional
x = torch.randn(2, 5, 4, device="meta")
functional.modfc(x, torch.randn(3, 4, device="meta"), torch.randn(2, 4, device="meta"), noise=1)
"""


@pytest.mark.parametrize("check", ["0", "1"])
def test_tensors_without_values_are_not_checked(check):
    environment = {**os.environ, "CIPS_KERNELS_CHECK": check}
    done = subprocess.run(
        [sys.executable, "-c", CHECK], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
