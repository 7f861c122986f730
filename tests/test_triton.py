"""The `triton` backend against the float64 oracle: interpreted on a CPU with small shapes, compiled on a GPU with real ones.

Every comparison is the rule of `cips_kernels.testing`: at most twice the error of eager PyTorch in the same dtype, on
memory poisoned with NaN, and the same bits in a second run.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="this machine has no triton")

from cips_kernels import functional, reference
from cips_kernels.activations import activate
from cips_kernels.spec import Needs
from cips_kernels.testing import (
    EAGER_FACTOR,
    StackCase,
    assert_close_as_eager,
    poisoned_empty,
    random_stack,
    relative_error,
)
from cips_kernels.triton import layers

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
FLOAT32, FLOAT16, BFLOAT16 = torch.float32, torch.float16, torch.bfloat16
LISTS = ("weights", "styles", "biases", "noise_strengths", "rgb_weights", "rgb_styles", "rgb_biases", "skip_weights")
KINDS = ("x", "weights", "styles", "biases", "rgb_weights", "rgb_styles", "rgb_biases", "skip_weights")


def beside_kinks(case: StackCase, **options) -> torch.Tensor:
    """Pixels `[B, P, 1]` of which a leaky ReLU is within a few float32 roundings of its kink. Its slope there is luck, and one
    other slope in a million is a thousand times the error of float32."""
    sums = []

    def seen(y: torch.Tensor, *constants) -> torch.Tensor:
        sums.append(y)
        return activate(y, *constants)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "activate", seen)
        with torch.no_grad():
            case.cast(torch.float64).call(functional.modfc_stack, backend="reference", **options)
    return sum((y.abs() < 1e-5).any(-1, keepdim=True) for y in sums) > 0


def results(
    case: StackCase, backend: str, left_out: torch.Tensor | None = None, **options
) -> dict[str, list[torch.Tensor]]:
    """Outputs and gradients by name; lists of one kind together, so that no lone scalar decides by luck. The loss does not
    look at pixels that are `left_out`."""
    leaves = case.leaves()
    outputs = [
        out for out in leaves.call(functional.modfc_stack, backend=backend, **options) if out is not None
    ]
    generator = torch.Generator().manual_seed(99)
    grads = [torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out) for out in outputs]
    if left_out is not None:
        grads = [grad.masked_fill(left_out, 0) for grad in grads]
    torch.autograd.backward(outputs, grads)
    found = {f"output {k}": [out] for k, out in enumerate(outputs)} | {"gradient of biases": []}
    for name in ("x", "skip", "noise", *LISTS):
        value = getattr(leaves, name)
        tensors = value if isinstance(value, list) else [value] if isinstance(value, torch.Tensor) else []
        if tensors and all(t.is_floating_point() for t in tensors):
            found.setdefault(f"gradient of {name}", []).extend(t.grad for t in tensors)
    # both are sums over all pixels; a strength alone is one number, whose rounding is luck
    found["gradient of biases"] += found.pop("gradient of noise_strengths", [])
    return found


def check(case: StackCase, backend: str = "triton", dtype: torch.dtype | None = None, **options) -> None:
    """The rule for every output and gradient of `case` in `dtype`."""
    case = case.cast(dtype or case.x.dtype)
    if case.x.dtype == FLOAT32 and case.weights:
        options["left_out"] = beside_kinks(case, **options)
    exact = results(case.cast(torch.float64), "reference", **options)
    eager = results(case, "reference", **options)
    with poisoned_empty():
        first = results(case, backend, **options)
        second = results(case, backend, **options)
    assert first.keys() == exact.keys()
    roundings = 2 * torch.finfo(torch.float32).eps
    for name in exact:
        for a, b in zip(first[name], second[name]):
            assert torch.equal(a, b), f"{name}: two runs differ"
        error = relative_error(first[name], exact[name])
        allowed = EAGER_FACTOR * max(relative_error(eager[name], exact[name]), roundings)
        assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e}"


SMALL = [
    # widths, rgb_after, batch, pixels, options
    ((32, 48, 16), (0, 1), dict(batch=2, pixels=20)),
    ((33, 17, 50, 19), (-1, 1, 1, 2), dict(batch=3, pixels=130, shared=True, skip=True)),
    ((40, 300), (0,), dict(batch=1, pixels=129, channels=1)),
    ((16, 16), (), dict(batch=1, pixels=1, noise=None)),
    ((24,), (-1,), dict(batch=2, pixels=70, skip=True)),
    ((20, 24, 24), (1,), dict(batch=2, pixels=33, noise=1234567890123, channels=6)),
    ((32, 48, 32, 16, 16), (-1, 1, 2, 3), dict(batch=2, pixels=40, blocks=((0, 1), (2, 3)))),
    ((33, 17, 50, 33, 19), (1, 3), dict(batch=3, pixels=70, blocks=((0, 0), (1, 2)), shared=True, skip=True)),
    ((24, 20, 20, 20), (), dict(batch=2, pixels=33, blocks=((1, 2),))),
]


@pytest.mark.parametrize(("widths", "rgb_after", "options"), SMALL, ids=lambda v: str(v).replace(" ", ""))
@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16], ids=["float32", "float16"])
def test_small_stacks(widths: tuple, rgb_after: tuple, options: dict, dtype: torch.dtype) -> None:
    check(random_stack(widths, rgb_after, device=DEVICE, **options), dtype=dtype)


REAL = [
    ((512, 512, 256, 128, 64, 32), (1, 3, 4), dict(batch=3, pixels=1000)),
    ((1024, 512, 512), (1,), dict(batch=2, pixels=4096, shared=True)),
    ((1024, 512, 512), (0, 1), dict(batch=1, pixels=65536, noise=5)),
    ((1024, 1000, 1024), (1,), dict(batch=2, pixels=257)),
    ((513, 511, 129), (0, 1), dict(batch=2, pixels=127, skip=True)),
    ((512, 512), (), dict(batch=16, pixels=128)),
    ((512, 264, 136), (1,), dict(batch=2, pixels=1025)),
    ((64, 96, 40), (1,), dict(batch=2, pixels=128, channels=20)),
    ((512,), (-1,), dict(batch=3, pixels=1001, skip=True)),
    ((1024, 512, 512, 512, 256, 256), (4,), dict(batch=2, pixels=1000, blocks=((1, 2), (3, 4)), shared=True)),
    ((512, 512, 512, 128, 128), (1, 3), dict(batch=3, pixels=257, blocks=((0, 1), (2, 3)), noise=3)),
]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("widths", "rgb_after", "options"), REAL + SMALL, ids=lambda v: str(v).replace(" ", "")
)
@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16, FLOAT32], ids=["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_real_stacks(
    widths: tuple, rgb_after: tuple, options: dict, dtype: torch.dtype, backend: str
) -> None:
    check(random_stack(widths, rgb_after, device=DEVICE, **options), backend, dtype)


@pytest.mark.gpu
def test_paper_stack() -> None:
    check(
        random_stack((1024,) + 15 * (512,), tuple(range(2, 15, 2)), batch=2, pixels=2048, device=DEVICE),
        dtype=BFLOAT16,
    )


@pytest.mark.gpu
def test_tf32_follows_the_switch() -> None:
    before = torch.backends.cuda.matmul.allow_tf32  # which cannot be deleted: nothing for monkeypatch in torch 2.11
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        check(random_stack((512, 512, 512), (1,), batch=2, pixels=500, device=DEVICE), dtype=FLOAT32)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("batched", [False, True])
def test_noise_is_keyed_by_coordinates(batched: bool) -> None:
    coords = torch.rand((2, 30, 2) if batched else (30, 2), device=DEVICE) * 2 - 1
    coords[..., 0, 0] = -0.0
    check(random_stack((16, 32, 16), (1,), batch=2, pixels=30, noise=-7, device=DEVICE), coords=coords)


def assert_same_bits(a: torch.Tensor, b: torch.Tensor) -> None:
    """On a GPU. The interpreter's products are NumPy's, whose last bits depend on a row's place on some processors."""
    if a.is_cuda:
        assert torch.equal(a, b)
    else:
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_patch_equals_full_image_bit_for_bit() -> None:
    coords = torch.rand(200, 2, device=DEVICE) * 2 - 1
    case = random_stack((16, 32, 16), (1,), batch=2, pixels=200, noise=3, device=DEVICE)
    full = case.call(functional.modfc_stack, coords=coords, backend="triton")
    patch = replace(case, x=case.x[:, 50:117])
    part = patch.call(functional.modfc_stack, coords=coords[50:117], backend="triton")
    for whole, piece in zip(full, part):
        assert_same_bits(whole[:, 50:117], piece)


def test_channel_major_input_is_read_and_answered_in_place() -> None:
    case = random_stack((24, 40, 32), (1,), batch=2, pixels=35, device=DEVICE)
    images = replace(case, x=case.x.transpose(1, 2).contiguous().view(2, 24, 5, 7))
    features, rgb = images.call(functional.modfc_stack, layout="bchw", backend="triton")
    plain = case.call(functional.modfc_stack, backend="triton")
    assert features.is_contiguous() and rgb.is_contiguous()
    assert torch.equal(features.flatten(2).mT, plain[0]) and torch.equal(rgb.flatten(2).mT, plain[1])
    leaf = images.x.clone().requires_grad_()
    replace(images, x=leaf).call(functional.modfc_stack, layout="bchw", backend="triton")[
        0
    ].square().sum().backward()
    other = case.x.clone().requires_grad_()
    replace(case, x=other).call(functional.modfc_stack, backend="triton")[0].square().sum().backward()
    assert leaf.grad.is_contiguous()
    torch.testing.assert_close(leaf.grad.flatten(2).mT, other.grad)


@pytest.mark.parametrize("blocks", [(), ((0, 1),), ((0, 0), (1, 2)), ((1, 3),), ((2, 3),)])
@pytest.mark.parametrize("wanted", [True, False], ids=["features", "colours"])
def test_inference_in_chunks_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch, wanted: bool, blocks: tuple) -> None:
    from cips_kernels.triton import stack

    options = dict(batch=2, pixels=100, skip=True, blocks=blocks, device=DEVICE)
    case = random_stack((16, 24, 16, 24, 16), (0, 1, 3), noise=11, **options)
    whole = case.call(functional.modfc_stack, backend="triton")
    monkeypatch.setattr(stack, "_CHUNK_ROWS", 64)
    for a, b in zip(whole, case.call(functional.modfc_stack, want_features=wanted, backend="triton")):
        if b is not None:
            assert_same_bits(a, b)
    given = random_stack((16, 24, 16, 24, 16), (0, 1, 3), **options)
    exact = given.call(reference.modfc_stack)
    with poisoned_empty():
        parts = given.call(functional.modfc_stack, want_features=wanted, backend="triton")
    for a, b in zip(parts, exact):
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "wanted",
    [Needs(True, False, False, False), Needs(False, True, False, False), Needs(False, False, True, True)],
)
def test_only_what_is_needed_is_returned(wanted: Needs) -> None:
    case = random_stack((16, 24), (0,), batch=2, pixels=40, blocks=((0, 0),), device=DEVICE)
    full = results(case, "triton")
    leaves = case.leaves(requires_grad=False)
    groups = {"x": [leaves.x], "weights": [*leaves.weights, *leaves.styles, *leaves.rgb_weights, *leaves.rgb_styles,
                          *leaves.skip_weights],
              "biases": leaves.biases + leaves.rgb_biases, "noise": leaves.noise_strengths}  # fmt: skip
    for name, tensors in groups.items():
        for tensor in tensors:
            tensor.requires_grad_(getattr(wanted, name))
    every = {name: full[f"gradient of {name}"] for name in KINDS}
    every["biases"], every["noise_strengths"] = every["biases"][:1], every["biases"][1:]
    features, rgb = leaves.call(functional.modfc_stack, backend="triton")
    generator = torch.Generator().manual_seed(99)
    grads = [
        torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out) for out in (features, rgb)
    ]
    torch.autograd.backward([features, rgb], grads)
    for name in ("x", *LISTS):
        value = getattr(leaves, name)
        for got, want in zip(value if isinstance(value, list) else [value], every[name]):
            assert (got.grad is not None) == got.requires_grad
            if got.grad is not None:
                torch.testing.assert_close(got.grad, want)


@pytest.mark.gpu
@pytest.mark.parametrize("width", [144, 145], ids=["descriptors", "pointers"])
def test_offsets_beyond_two_billion_elements(width: int) -> None:
    """4096 x 4096 pixels: x has 4.6e9 elements, the features 2.4e9. The last pixels must be what they are by themselves,
    forward and backward."""
    pixels, tail = 4096 * 4096, slice(-64, None)
    x = torch.randn((1, pixels, 272), device=DEVICE, dtype=BFLOAT16)
    case = random_stack((272, width), (0,), batch=1, pixels=64, noise=None, device=DEVICE)
    grads = (
        torch.randn((1, pixels, width), device=DEVICE, dtype=BFLOAT16),
        torch.randn((1, pixels, 3), device=DEVICE),
    )
    found = []
    for part in (slice(None), tail):
        leaf = x[:, part].detach().requires_grad_()
        outputs = replace(case, x=leaf).call(functional.modfc_stack, backend="triton")
        torch.autograd.backward(outputs, [g[:, part] for g in grads])
        found.append([t[:, tail].clone() for t in (*outputs, leaf.grad)])
        with torch.no_grad():
            outputs = replace(case, x=leaf).call(functional.modfc_stack, backend="triton")
        found[-1] += [t[:, tail].clone() for t in outputs]
        del leaf, outputs
    for whole, alone in zip(*found):
        assert torch.equal(whole, alone)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("add", [True, False])
def test_the_input_gradient_is_added_to_what_is_there(shared: bool, add: bool) -> None:
    """In float64 by PyTorch: one sum over images, or one an image; rows of a larger tensor."""
    torch.manual_seed(0)
    u, m = torch.randn(3, 37, 16, device=DEVICE), torch.randn(3, 16, 24, device=DEVICE)
    whole = torch.randn(1 if shared else 3, 50, 24, device=DEVICE)
    before, out = whole.clone(), whole[:, 7:44]
    products = torch.einsum("bpo,boi->bpi", u.double(), m.double())
    expected = (products.sum(0, keepdim=True) if shared else products) + (before[:, 7:44].double() if add else 0)
    layers.input_dgrad(u, m, None, None, out, 3, add=add)
    eager = torch.einsum("bpo,boi->bpi", u, m)
    eager = (eager.sum(0, keepdim=True) if shared else eager) + (before[:, 7:44] if add else 0)
    assert_close_as_eager("gradient", out, eager, expected)
    assert torch.equal(whole[:, :7], before[:, :7]) and torch.equal(whole[:, 44:], before[:, 44:])
