"""A style a pixel as a blend of K: against a grouped convolution pixel by pixel, against the formulation of a style a
pixel, and what it promises of memory, chunks and errors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

import grouped
from cips_kernels import Encoding, FusedModFCStack, blended, encoding, functional, ops, reference
from cips_kernels.arguments import stack_call
from cips_kernels.testing import StackCase, assert_close_as_eager, random_stack, relative_error

BACKENDS = ["reference", "cpu"]
B, P, S = 2, 11, 5
CASES = {
    "layers": dict(widths=(6, 5, 7), rgb_after=(0, 1), skip=True),
    "blocks": dict(widths=(6, 4, 4, 3), rgb_after=(-1, 2), blocks=((0, 1), (2, 2))),
    "shared": dict(widths=(4, 6, 3), rgb_after=(1,), shared=True),
    "one-rgb": dict(widths=(4,), rgb_after=(-1,), skip=True),
    "no-rgb": dict(widths=(4, 3, 5)),
}


def make(name: str, blended: int = 3, **options) -> StackCase:
    options = {"batch": B, "pixels": P, "dtype": torch.float64, **CASES[name], **options}
    return random_stack(blended=blended, **options)


def blend_of(case: StackCase) -> Tensor:
    """The blend `[B, P, K]`, whether or not all images share it."""
    return case.blend.expand((case.styles or case.rgb_styles)[0].shape[0], -1, -1)


def one_pixel(case: StackCase, p: int) -> StackCase:
    """The ordinary case of pixel p alone: its own style for each image, `sum_k blend_pk s_k`."""
    weights = blend_of(case)[:, p, :, None]

    def cut(name: str, t: Tensor) -> Tensor:
        if name in ("styles", "rgb_styles"):
            return (weights * t).sum(1)
        return t[:, p : p + 1] if name in ("x", "skip") else t[:, :, p : p + 1] if name == "noise" else t

    alone = case.map(cut)
    return StackCase(**{**vars(alone), "blend": None})


def by_pixels(case: StackCase, **options) -> tuple[Tensor | None, Tensor | None]:
    """The whole, one pixel after the other, by grouped convolutions."""
    found = [one_pixel(case, p).call(grouped.stack, **options) for p in range(P)]
    return tuple(None if part[0] is None else torch.cat(part, 1) for part in zip(*found))


def gradients(case: StackCase, outputs: tuple[Tensor | None, ...]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)
    outputs = [out for out in outputs if out is not None]
    sent = [torch.randn(out.shape, generator=generator, dtype=out.dtype) for out in outputs]
    leaves = case.tensors()
    found = torch.autograd.grad(outputs, list(leaves.values()), sent, allow_unused=True)
    return {name: torch.zeros_like(t) if g is None else g for (name, t), g in zip(leaves.items(), found)}


# --- the formulas ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("name", CASES)
def test_each_pixel_has_the_blend_for_its_style(name, count, backend):
    ours, theirs = make(name, count).leaves(), make(name, count).leaves()
    eps = 0.05  # with a small one the length of a single style has no effect, and no gradient but rounding
    got, want = ours.call(functional.modfc_stack, eps=eps, backend=backend), by_pixels(theirs, eps=eps)
    with torch.no_grad():
        inference = ours.call(functional.modfc_stack, eps=eps, backend=backend)
    for value, other, expected in zip(got, inference, want):
        assert (value is None) == (other is None) == (expected is None)
        if expected is not None:
            assert value.shape == expected.shape and relative_error(value, expected) < 1e-13
            assert relative_error(other, expected) < 1e-13 and not other.requires_grad
    found = gradients(ours, got)
    for key, value in gradients(theirs, want).items():
        assert relative_error(found[key], value) < 1e-12, key
    assert any(value.abs().max() > 0 for key, value in found.items() if key.endswith("blend"))


@pytest.mark.parametrize("options", [{}, dict(demodulate=False), dict(eps=0.3, negative_slope=0.1, gain=1.3)], ids=str)
@pytest.mark.parametrize("sums_to_one", [True, False])
def test_a_layer_is_the_layer_of_a_style_a_pixel(sums_to_one, options):
    case = make("no-rgb")
    x, weight, style, bias, strength = case.x, case.weights[0], case.styles[0], case.biases[0], case.noise_strengths[0]
    blend = case.blend if sums_to_one else torch.randn_like(case.blend)  # of either sign
    noise = case.noise[:1]
    got, _ = functional.modfc_stack(x, [weight], [style], [bias], [strength], noise=noise, blend=blend, **options)
    each = torch.einsum("bpk,bki->bpi", blend, style)
    want = functional.modfc(x, weight, each, bias, noise[0], strength, **options)
    assert relative_error(got, want) < 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_a_single_style_is_the_ordinary_stack(name, backend):
    case = make(name, 1, noise=5)
    assert torch.equal(case.blend, torch.ones_like(case.blend))
    plain = StackCase(**{**vars(case.map(lambda key, t: t[:, 0] if "styles" in key else t)), "blend": None})
    for value, want in zip(
        case.call(functional.modfc_stack, backend=backend), plain.call(functional.modfc_stack, backend=backend)
    ):
        if want is not None:
            assert relative_error(value, want) < 1e-13


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_hard_masks_cut_the_images_of_each_style(dtype):
    case = make("blocks", 2, dtype=dtype, noise=5)
    left = torch.arange(P) < 4
    mask = torch.stack((left, ~left), -1).to(case.blend.dtype)
    features, rgb = case.call(functional.modfc_stack, blend=mask)
    for k, inside in enumerate((left, ~left)):
        whole = torch.zeros_like(mask)
        whole[:, k] = 1
        own = case.call(functional.modfc_stack, blend=whole)
        assert torch.equal(features[:, inside], own[0][:, inside]) and torch.equal(rgb[:, inside], own[1][:, inside])
        chosen = case.map(lambda key, t: t[:, k] if "styles" in key else t)  # noqa: B023
        plain = StackCase(**{**vars(chosen), "blend": None}).call(functional.modfc_stack, backend="reference")
        tolerance = 1e-13 if dtype == torch.float64 else 0.02
        assert relative_error(own[0], plain[0]) < tolerance and relative_error(own[1], plain[1]) < tolerance


def test_styles_that_cancel_stay_finite():
    case = make("layers", 2, dtype=torch.float32).map(
        lambda key, t: torch.stack((t[:, 0], -t[:, 0]), 1) if "styles" in key else t
    )
    leaves = case.leaves()
    features, rgb = leaves.call(functional.modfc_stack, blend=torch.full((P, 2), 0.5, requires_grad=True))
    assert features.isfinite().all() and rgb.isfinite().all()
    for name, grad in gradients(leaves, (features, rgb)).items():
        assert grad.isfinite().all(), name


@pytest.mark.parametrize("name", ["layers", "blocks", "one-rgb"])
def test_gradcheck_and_gradgradcheck(name):
    options = dict(
        batch=2, pixels=2, noise="given", **{**CASES[name], "widths": (3, 2, 2, 2)[: len(CASES[name]["widths"])]}
    )
    case = random_stack(blended=2, dtype=torch.float64, **options).leaves()

    def stack(*leaves: Tensor):
        rest = iter(leaves)
        outputs = case.map(lambda _name, _tensor: next(rest)).call(functional.modfc_stack)
        return tuple(out for out in outputs if out is not None)

    leaves = tuple(case.tensors().values())
    assert gradcheck(stack, leaves) and gradgradcheck(stack, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_that_of_a_style_a_pixel(dtype):
    case = random_stack((40, 48, 32), (), blended=3, pixels=67, dtype=dtype)

    def each(case: StackCase) -> Tensor:
        x = case.x
        for layer, (weight, style) in enumerate(zip(case.weights, case.styles)):
            styles = torch.einsum("bpk,bki->bpi", case.blend, style)
            x = reference.modfc(
                x, weight, styles, case.biases[layer], case.noise[layer], case.noise_strengths[layer], layout="bpc"
            )
        return x

    features, _ = case.call(functional.modfc_stack)
    assert_close_as_eager("features", features, each(case), each(case.cast(torch.float64)))


# --- chunks, tiles and memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [None, 7, "given", "coords"])
@pytest.mark.parametrize("name", CASES)
def test_chunks_of_pixels_are_the_whole(monkeypatch, name, noise):
    case = make(name, noise=7 if noise == "coords" else noise, dtype=torch.float32)
    coords = torch.rand(2, P, 2) if noise == "coords" else None
    want = case.call(reference.modfc_stack, coords=coords)
    seen = []
    stack_layers = reference.stack_layers
    monkeypatch.setattr(
        reference, "stack_layers", lambda inputs, *a: seen.append(inputs.pixels) or stack_layers(inputs, *a)
    )
    monkeypatch.setattr(blended, "_CHUNK_ROWS", 4 * B)
    for value, expected in zip(case.call(functional.modfc_stack, coords=coords), want):
        if expected is not None:
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)
    assert seen == [4, 4, 3]


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("places", [{"size": (3, 4)}, {"coords": torch.rand(2, 12, 2) * 2 - 1}], ids=["grid", "points"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_tiles_of_an_encoding_are_the_whole(monkeypatch, backend, places, shared):
    monkeypatch.setitem(encoding._TILE, "cpu", 5)
    generator = torch.Generator().manual_seed(2)
    e = Encoding(*(torch.randn(shape, generator=generator) for shape in ((4, 2), (4,), (3, 4, 5))), **places)
    case = random_stack((9, 8, 6), (0, 1), batch=2, pixels=12, shared=shared, blended=3, noise=3)
    case = StackCase(**{**vars(case), "x": encoding.encode(e)})
    want = case.call(reference.modfc_stack, coords=encoding.points(e))[1]
    tiled = StackCase(**{**vars(case), "x": e}).call(
        functional.modfc_stack, layout=None, want_features=False, backend=backend
    )
    torch.testing.assert_close(tiled[1], want, rtol=1e-5, atol=1e-5)
    whole = StackCase(**{**vars(case), "x": e}).call(functional.modfc_stack, layout=None, backend=backend)
    torch.testing.assert_close(whole[1], want, rtol=1e-5, atol=1e-5)


class Largest(TorchDispatchMode):
    """Size of the largest tensor that any operation returned."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


@pytest.mark.parametrize("grad", [False, True])
def test_no_weight_a_pixel_is_ever_made(monkeypatch, grad):
    pixels, width = 200, 64
    case = random_stack((width, width), (0,), batch=1, pixels=pixels, blended=3)
    case = case.leaves() if grad else case
    with Largest() as largest:
        outputs = case.call(functional.modfc_stack)
        if grad:
            sum(out.square().sum() for out in outputs).backward()
    assert largest.numel <= max(pixels, width) * width * 2 < pixels * width * width / 30
    monkeypatch.setattr(blended, "_CHUNK_ROWS", 10)
    if not grad:
        with Largest() as largest:
            functional.modfc_stack(
                Encoding(torch.randn(width, 2), torch.randn(width), size=(20, 10)),
                case.weights, case.styles, [None], [None], case.rgb_weights, case.rgb_styles, [None], (0,),
                blend=case.blend[0], want_features=False,
            )  # fmt: skip
        assert largest.numel <= pixels * width


# --- operators, layouts, compilers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    inputs, spec = make("blocks", dtype=torch.float32).call(lambda x, *a, layout, **k: stack_call(x, *a, **k))
    values = ops._spec_values(spec)
    opcheck(torch.ops.cips_kernels.modfc_stack.default, (*inputs, *values, True, "none", backend))
    with pytest.raises(RuntimeError, match="modfc_stack: with blend it keeps nothing for a backward"):
        torch.ops.cips_kernels.modfc_stack(*inputs, *values, True, "all", backend)
    e = Encoding(torch.randn(6, 2), torch.randn(6), size=(1, P))
    call = inputs._replace(x=torch.zeros(1, 0, 6), noise=None)
    arguments = (*e[:3], None, list(e.size), "exact", *call, *values, backend)
    opcheck(torch.ops.cips_kernels.synthesis.default, arguments)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_images_keep_their_memory_order(order, grad):
    case = random_stack((6, 5, 7), (1,), batch=2, pixels=12, blended=2, dtype=torch.float64)
    want = case.call(reference.modfc_stack)
    image = grouped.planes(case.x, 3, 4).contiguous(memory_format=order).requires_grad_(grad)
    moved = StackCase(**{**vars(case), "x": image})
    for value, expected in zip(moved.call(functional.modfc_stack, layout="bchw"), want):
        assert value.is_contiguous(memory_format=order) and value.requires_grad == grad
        assert relative_error(grouped.pixels(value), expected) < 1e-12


def test_autocast_is_a_cast_of_the_input():
    case = make("layers", dtype=torch.float32)
    half = case.map(lambda name, t: t.bfloat16() if name == "x" else t)
    for cast in (False, True):
        leaves, other = (c.leaves() if cast else c for c in (case, half))
        with torch.autocast("cpu", torch.bfloat16):
            got = leaves.call(functional.modfc_stack)
        want = other.call(functional.modfc_stack)
        assert got[0].dtype == torch.bfloat16 and got[1].dtype == torch.float32
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


@pytest.mark.parametrize("grad", [False, True])
def test_compiles_to_the_same(grad):
    torch._dynamo.reset()
    stack = FusedModFCStack([6, 5, 5], S, blocks=[(0, 1)])
    x, style, blend = torch.randn(B, P, 6), torch.randn(B, 3, S), torch.rand(B, P, 3, requires_grad=True)
    with torch.set_grad_enabled(grad):
        fast = torch.compile(stack, fullgraph=True, backend="aot_eager")(x, style, 3, blend=blend)
        slow = stack(x, style, 3, blend=blend)
    torch.testing.assert_close(fast, slow)
    if grad:
        torch.testing.assert_close(*(torch.autograd.grad(out.sum(), blend)[0] for out in (fast, slow)))


def test_the_cuda_backend_leaves_it_to_the_reference():
    pytest.importorskip("triton")
    from cips_kernels import cuda_stack

    inputs, spec = make("layers", noise=None, dtype=torch.bfloat16).call(
        lambda x, *a, layout, **k: stack_call(x, *a, **k)
    )
    want = reference.stack_layers(inputs, spec, [])
    _, rgb, _ = cuda_stack.forward(inputs, spec, False, False)
    assert torch.equal(rgb, want.rgb)
    e = Encoding(torch.randn(6, 2), torch.randn(6), size=(1, P), dtype=torch.bfloat16)
    inputs = inputs._replace(x=encoding.encode(e), skip=None)
    cuda_stack.synthesis(e, torch.bfloat16, inputs, spec, rgb)
    assert torch.equal(rgb, reference.stack_layers(inputs, spec, []).rgb)


# --- the module -----------------------------------------------------------------------------------------------------


def make_stack() -> FusedModFCStack:
    torch.manual_seed(0)
    stack = FusedModFCStack([6, 5, 4], S, rgb_after=[0, 1]).double()
    for parameter in stack.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return stack


@pytest.mark.parametrize("each_image", [False, True])
def test_module_blends_w_where_weights_add_up_to_one(each_image):
    stack = make_stack()
    x, w = torch.randn(B, P, 6, dtype=torch.float64), torch.randn(B, 3, S, dtype=torch.float64)
    blend = torch.randn(*((B,) if each_image else ()), P, 3, dtype=torch.float64).softmax(-1)
    features, rgb = stack(x, w, 3, blend=blend, return_features=True)
    of_pixel = torch.einsum("bpk,bks->bps", blend.expand(B, -1, -1), w)
    for p in range(P):
        found = stack(x, of_pixel[:, p], 3, return_features=True)
        assert relative_error(features[:, p], found[0][:, p]) < 1e-12
        assert relative_error(rgb[:, p], found[1][:, p]) < 1e-12
    doubled = stack(x, w, 3, blend=2 * blend)
    assert relative_error(doubled, stack(x, 2 * w, 3, blend=blend)) > 0.01, "biases of the affine maps are blended too"


def test_module_takes_a_style_for_each_layer_of_each():
    stack = make_stack()
    x, w = torch.randn(B, P, 6, dtype=torch.float64), torch.randn(B, 2, 4, S, dtype=torch.float64)
    mask = (torch.arange(P) % 2)[:, None] == torch.tensor([0, 1])
    rgb = stack(x, w, 3, blend=mask.double())
    for k in range(2):
        want = stack(x, w[:, k], 3)
        assert relative_error(rgb[:, mask[:, k]], want[:, mask[:, k]]) < 1e-12
    same = stack(x, w[:, :, :1].expand(-1, -1, 4, -1), 3, blend=mask.double())
    assert relative_error(same, stack(x, w[:, :, 0], 3, blend=mask.double())) < 1e-12


def test_nothing_gives_nothing():
    stack = make_stack()
    x, w = torch.randn(B, P, 6, dtype=torch.float64), torch.randn(B, 3, S, dtype=torch.float64)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            assert stack(x[:, :0], w, blend=torch.zeros(0, 3), layout="bpc").shape == (B, 0, 3)
            assert stack(x[:0], w[:0], blend=torch.zeros(P, 3)).shape == (0, P, 3)


ERRORS = {
    "rank of style": (dict(style=torch.zeros(B, S)), ValueError, r"style: expected \[B, K, 5\] or \[B, K, layers and"),
    "layers of style": (
        dict(style=torch.zeros(B, 3, 3, S)),
        ValueError,
        r"style: expected \[B, K, 4, 5\], .* \[2, 3, 3, 5\]",
    ),
    "batch of style": (dict(style=torch.zeros(3, 3, S)), ValueError, r"styles\[0\]: expected the batch size of x, 2"),
    "no style": (dict(style=torch.zeros(B, 0, S)), ValueError, r"styles\[0\]: expected at least one style to blend"),
    "count": (
        dict(blend=torch.zeros(P, 2)),
        ValueError,
        r"blend: expected \[P, K\] = \[11, 3\], got float32 \[11, 2\]",
    ),
    "pixels": (dict(blend=torch.zeros(P - 1, 3)), ValueError, r"blend: expected \[P, K\] = \[11, 3\]"),
    "images": (dict(blend=torch.zeros(3, P, 3)), ValueError, r"blend: expected \[B, P, K\] = \[2, 11, 3\]"),
    "rank": (dict(blend=torch.zeros(3)), ValueError, r"blend: expected \[B, P, K\]"),
    "ints": (
        dict(blend=torch.zeros(P, 3, dtype=torch.int64)),
        TypeError,
        r"blend: expected a floating-point tensor \[P, K\]",
    ),
    "a list": (dict(blend=[0.5, 0.5]), TypeError, r"blend: expected a floating-point tensor .* got list"),
    "device": (dict(blend=torch.zeros(P, 3, device="meta")), ValueError, "blend: is on meta but x is on cpu"),
    "infinite": (dict(blend=torch.full((P, 3), torch.inf)), ValueError, "blend: expected finite values, got inf"),
}


@pytest.mark.parametrize("change", ERRORS)
def test_errors_name_the_argument(change):
    changes, error, words = ERRORS[change]
    arguments = {"style": torch.zeros(B, 3, S), "blend": torch.zeros(P, 3), **changes}
    with pytest.raises(error, match=words):
        make_stack().float()(torch.zeros(B, P, 6), arguments["style"], blend=arguments["blend"])


def test_errors_of_single_styles():
    case = make("layers", dtype=torch.float32)
    with pytest.raises(ValueError, match=r"styles\[0\]: expected \[B, K, I\]"):
        case.map(lambda name, t: t[:, 0] if name == "styles" else t).call(functional.modfc_stack)
    with pytest.raises(
        ValueError, match=r"rgb_styles\[0\]: expected \[B, K, I\] = \[2, 3, 5\], got float32 \[2, 2, 5\]"
    ):
        case.map(lambda name, t: t[:, :2] if name == "rgb_styles" else t).call(functional.modfc_stack)
    with pytest.raises(ValueError, match=r"styles\[0\]: expected \[B, I\]"):
        StackCase(**{**vars(case), "blend": None}).call(functional.modfc_stack)
