"""Residual blocks on every backend: the sum and its gradients, what is saved for them, where they live in the flat
tensors, and the module that has them."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import Tensor

import grouped
from cips_kernels import Encoding, FusedModFCStack, PreparedStack, cuda_onchip, functional, packing
from cips_kernels.spec import StackSpec
from cips_kernels.testing import StackCase, poisoned_empty, random_stack, relative_error
from cpu_stacks import BLOCKS, DTYPES, TILE, check_backward, check_forward, use_small_tiles

BACKENDS = ["reference", "cpu"]
B, P, S = 2, 7, 5


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    use_small_tiles(monkeypatch)


def gradients(case: StackCase, outputs: tuple[Tensor | None, ...]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)
    outputs = [out for out in outputs if out is not None]
    sent = [torch.randn(out.shape, generator=generator, dtype=out.dtype) for out in outputs]
    leaves = case.tensors()
    found = torch.autograd.grad(outputs, list(leaves.values()), sent, allow_unused=True)
    return {name: torch.zeros_like(t) if g is None else g for (name, t), g in zip(leaves.items(), found)}


# --- the cpu backend in small tiles ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channel_major", [False, True])
@pytest.mark.parametrize("widths, rgb_after, blocks", BLOCKS)
def test_cpu_tiles(widths, rgb_after, blocks, channel_major, dtype):
    options = dict(batch=3, pixels=2 * TILE + 3, blocks=blocks, dtype=dtype)
    case = random_stack(widths, rgb_after, shared=channel_major, skip=True, **options)
    check_forward(case, dtype, channel_major)
    check_backward(case, dtype, channel_major)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("widths, rgb_after, blocks", BLOCKS)
def test_stack_equals_published_blocks(widths, rgb_after, blocks, backend):
    case = random_stack(widths, rgb_after, pixels=2 * TILE + 3, blocks=blocks, dtype=torch.float64)
    ours, theirs = case.leaves(), case.leaves()
    with poisoned_empty():
        outputs = ours.call(functional.modfc_stack, backend=backend)
        got = gradients(ours, outputs)
    want_outputs = theirs.call(grouped.stack)
    assert relative_error(outputs, want_outputs) < 1e-13
    for name, want in gradients(theirs, want_outputs).items():
        assert relative_error(got[name], want) < 1e-12, name
    plain = case.call(functional.modfc_stack, blocks=(), skip_weights=(), backend=backend)
    assert relative_error(plain, outputs) > 0.1, "the blocks are seen"


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_slope_is_that_of_the_sign_before_the_addition(backend):
    # y = -0.2 g everywhere, and z > 0: who reads the sign off the sum takes the slope to be 1
    gain, x = 3.0, torch.full((1, 4, 1), 10.0, dtype=torch.float64, requires_grad=True)
    one, bias = torch.ones(1, 1, dtype=torch.float64), torch.tensor([-11.0], dtype=torch.float64, requires_grad=True)
    constants = dict(demodulate=False, gain=gain, layout="bpc", blocks=((0, 0),), backend=backend)
    z, _ = functional.modfc_stack(x, [one], [one], [bias], [None], **constants)
    assert z.detach().flatten().tolist() == pytest.approx([(10 - 0.2 * gain) / math.sqrt(2)] * 4)
    grad_x, grad_bias = torch.autograd.grad(z.sum(), (x, bias))
    assert grad_bias.item() == pytest.approx(4 * 0.2 * gain / math.sqrt(2))
    assert grad_x.flatten().tolist() == pytest.approx([(0.2 * gain + 1) / math.sqrt(2)] * 4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wanted", ["skip_weights", "x", "biases"])
def test_a_single_gradient_is_what_it_is_among_all(wanted, backend):
    case = random_stack((6, 5, 4, 4, 3), (1, 3), blocks=((0, 1), (2, 3)), shared=True, dtype=torch.float64)
    everything, alone = case.leaves(), case.map(lambda name, t: t.clone().requires_grad_(name == wanted))
    full = gradients(everything, everything.call(functional.modfc_stack, backend=backend))
    alone.call(functional.modfc_stack, backend=backend)[1].sum().backward()
    ones = everything.call(functional.modfc_stack, backend=backend)[1].sum()
    names = [name for name in full if name.split("[")[0] == wanted]
    want = torch.autograd.grad(ones, [everything.tensors()[name] for name in names])
    for name, grad in zip(names, want):
        assert grad.abs().max() > 0 and relative_error(alone.tensors()[name].grad, grad) < 1e-12


# --- places ---------------------------------------------------------------------------------------------------------


def test_skips_lie_behind_the_modulated_weights():
    widths, rgb_after, blocks = (6, 5, 5, 4, 4), (1, 3), ((0, 1), (2, 2), (3, 3))
    plain, plan = packing.pack(widths, rgb_after, 3, True, 2), StackSpec(widths, rgb_after, blocks=blocks).packing(2)
    assert plan.matrices == plain.matrices and (plan.style_width, plan.bias_numel) == (
        plain.style_width,
        plain.bias_numel,
    )
    assert plan.mod_numel == plain.mod_numel
    first, second, third = plan.skips
    assert (first.out_features, first.in_features, first.weight_offset) == (5, 6, plain.weight_numel)
    assert (second.out_features, second.in_features, second.weight_offset) == (4, 5, plain.weight_numel + 30)
    assert third is None and plan.weight_numel == plain.weight_numel + 30 + 20
    flat = torch.arange(plan.weight_numel)
    assert plan.weight(flat, second)[1, 2] == plain.weight_numel + 30 + 7


def test_summands_are_kept_behind_the_outputs():
    widths, blocks, sizes = (6, 5, 5, 4), ((0, 1), (2, 2)), (2, 7)
    plain, offsets = packing.activation_offsets(widths, *sizes), packing.activation_offsets(widths, *sizes, blocks)
    assert offsets[: len(plain)] == plain and len(offsets) == len(plain) + 2
    flat = packing.empty_activations(torch.zeros(2, 7, 6), widths, *sizes, blocks)
    assert flat.numel() == offsets[-1]
    views = [packing.activation(flat, widths, *sizes, layer) for layer in range(2)]
    views += [packing.summand(flat, widths, *sizes, blocks, block) for block in range(2)]
    assert [view.shape for view in views] == [(2, 7, 5), (2, 7, 5), (2, 7, 5), (2, 7, 4)]
    for k, view in enumerate(views):
        view.fill_(k + 1)
    assert [view.unique().tolist() for view in views] == [[1], [2], [3], [4]]


@pytest.mark.parametrize(
    "blocks", [(), ((0, 1), (2, 3)), ((1, 4), (5, 5)), ((0, 6),), ((3, 5),), ((1, 1), (2, 2), (3, 6))]
)
def test_no_output_is_written_over_what_is_read_again(blocks):
    spec = StackSpec((4,) * 8, (6,), blocks=blocks)
    buffers = spec.output_buffers()
    holds: dict[int, int] = {}  # buffer -> layer whose output is there
    for layer, buffer in enumerate(buffers):
        assert layer == 0 or holds[buffers[layer - 1]] == layer - 1
        holds[buffer] = layer
        for first, last in blocks:
            if first <= layer <= last and first > 0:
                assert holds[buffers[first - 1]] == first - 1
    assert max(buffers) == (1 if not any(last > first > 0 for first, last in blocks) else 2)


# --- the module -----------------------------------------------------------------------------------------------------


def make(**options) -> FusedModFCStack:
    torch.manual_seed(0)
    stack = FusedModFCStack([9, 8, 8, 8, 6, 6], S, **{"rgb_after": [4], "blocks": [(1, 2), (3, 4)], **options}).double()
    for parameter in stack.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return stack


def by_hand(stack: FusedModFCStack, x: Tensor, style: Tensor) -> Tensor:
    """The stack module by module."""
    entered = None
    for index, layer in enumerate(stack.layers):
        for first, _ in stack.blocks:
            entered = x if index == first else entered
        x = layer(x, style, "off")
        for k, (_, last) in enumerate(stack.blocks):
            if index == last:
                one = math.sqrt(x.shape[2]) * torch.eye(x.shape[2], dtype=x.dtype)
                skip = stack.skips[str(k)] if str(k) in stack.skips else one
                x = (x + entered @ skip.t() / entered.shape[2] ** 0.5) / math.sqrt(2)
    return stack.to_rgbs[0](x, style)


@pytest.mark.parametrize("backend", BACKENDS)
def test_module(backend):
    stack = make(backend=backend)
    assert [(name, tuple(p.shape)) for name, p in stack.named_parameters() if name.startswith("skips")] == [
        ("skips.1", (6, 8))
    ]
    x, style = torch.randn(B, P, 9, dtype=torch.float64, requires_grad=True), torch.randn(B, S, dtype=torch.float64)
    got, want = stack(x, style, "off"), by_hand(stack, x, style)
    assert relative_error(got, want) < 1e-12
    leaves = [x, *(p for name, p in stack.named_parameters() if "noise" not in name)]
    for a, b in zip(torch.autograd.grad(got.square().sum(), leaves), torch.autograd.grad(want.square().sum(), leaves)):
        assert b.abs().max() > 0 and relative_error(a, b) < 1e-11
    assert "rgb_after=[4], blocks=[(1, 2), (3, 4)], backend=" in repr(stack)
    assert "blocks" not in repr(FusedModFCStack([4, 4], 3)) and not list(FusedModFCStack([4, 4], 3).skips)


def test_skips_start_normal_and_keep_the_variance():
    torch.manual_seed(0)
    stack = FusedModFCStack([64, 96, 96], 8, blocks=[(0, 1)])
    skip = stack.skips["0"]
    assert (
        skip.shape == (96, 64) and skip.std().item() == pytest.approx(1.0, abs=0.05) and abs(skip.mean().item()) < 0.05
    )
    features, _ = stack(torch.randn(4, 500, 64), torch.zeros(4, 8), return_features=True)
    assert features.square().mean().item() == pytest.approx(1.02, abs=0.15)


@pytest.mark.parametrize("size", [{"size": (3, 4)}, {"coords": torch.tensor([[0.1, 0.2], [-1.0, 0.5], [0.3, -0.3]])}])
def test_encodings_and_prepared_stacks(monkeypatch, size):
    from cips_kernels import encoding

    monkeypatch.setitem(encoding._TILE, "cpu", 5)
    stack = make().float()
    e = Encoding(torch.randn(4, 2), torch.randn(4), torch.randn(3, 4, 5), **size)
    style = torch.randn(B, S)
    want = stack(encoding.encode(e), style, 3, coords=encoding.points(e), layout="bpc")
    with torch.no_grad():
        torch.testing.assert_close(stack(e, style, 3), want, rtol=1e-5, atol=1e-5)
    prepared = PreparedStack(stack)
    torch.testing.assert_close(prepared(e, style, 3), want, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        stack.skips["1"].mul_(3)
    prepared.refresh()
    assert relative_error(prepared(e, style, 3), want) > 0.05
    with torch.no_grad():
        torch.testing.assert_close(prepared(e, style, 3), stack(e, style, 3), rtol=1e-5, atol=1e-5)


def test_compiles_to_the_same():
    torch._dynamo.reset()
    stack = make().float()
    x, style = torch.randn(B, P, 9, requires_grad=True), torch.randn(B, S)
    leaves = [x, *(p for name, p in stack.named_parameters() if "noise" not in name)]
    fast = torch.compile(stack, fullgraph=True, backend="aot_eager")
    got, want = fast(x, style, 3), stack(x, style, 3)
    torch.testing.assert_close(got, want)
    for a, b in zip(torch.autograd.grad(got.sum(), leaves), torch.autograd.grad(want.sum(), leaves)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# --- refusals -------------------------------------------------------------------------------------------------------


def test_the_on_chip_kernel_says_why_not():
    refused, served = (StackSpec((64, 64, 64), (1,), blocks=blocks) for blocks in (((0, 1),), ((1, 1),)))
    assert cuda_onchip.why_not(refused, torch.bfloat16) == "a residual block begins at the input"
    assert cuda_onchip.why_not(served, torch.bfloat16) is None
    assert cuda_onchip.why_not(StackSpec((64, 64, 64), (1,)), torch.bfloat16) is None


ERRORS = {
    "not pairs": (dict(blocks=[(0, 1, 2)]), TypeError, r"blocks\[0\]: expected \(first, last\) layer, got \(0, 1, 2\)"),
    "a number": (dict(blocks=[3]), TypeError, r"blocks\[0\]: expected \(first, last\) layer, got 3"),
    "a flag": (dict(blocks=[(False, 1)]), TypeError, r"blocks\[0\]"),
    "floats": (dict(blocks=[(0, 1), (2.0, 3)]), TypeError, r"blocks\[1\]: expected \(first, last\)"),
    "too deep": (dict(blocks=[(2, 4)]), ValueError, r"blocks\[0\]: expected 0 <= first <= last < 4, got \(2, 4\)"),
    "negative": (dict(blocks=[(-1, 1)]), ValueError, r"blocks\[0\]: expected 0 <= first"),
    "backwards": (dict(blocks=[(1, 0)]), ValueError, r"blocks\[0\]: expected 0 <= first <= last < 4, got \(1, 0\)"),
    "overlap": (
        dict(blocks=[(0, 1), (1, 2)]),
        ValueError,
        r"blocks\[1\]: .* behind layer 1 of the block before, got \(1, 2\)",
    ),
    "disorder": (dict(blocks=[(2, 3), (0, 1)]), ValueError, r"blocks\[1\]: .* behind layer 3"),
}
WEIGHTS = {
    "missing": ([None, None], TypeError, r"skip_weights\[0\]: expected a tensor \[O, I\], got NoneType"),
    "left out": ([], TypeError, r"skip_weights\[0\]: expected a tensor"),
    "count": ([None], ValueError, r"skip_weights: expected 2 entries, one for each block, got 1"),
    "shape": (
        [torch.zeros(6, 5), None],
        ValueError,
        r"skip_weights\[0\]: expected \[O, I\] = \[5, 6\], got float32 \[6, 5\]",
    ),
    "dtype": ([torch.zeros(5, 6).half(), None], TypeError, r"skip_weights\[0\]: expected float32"),
    "device": ([torch.zeros(5, 6, device="meta"), None], ValueError, r"skip_weights\[0\]: is on meta but x is on cpu"),
    "one too many": (
        [torch.zeros(5, 6), torch.zeros(5, 5)],
        ValueError,
        r"skip_weights\[1\]: expected None, since the block keeps 5",
    ),
}


@pytest.mark.parametrize("change", ERRORS)
def test_errors_name_the_block(change):
    options, error, words = ERRORS[change]
    with pytest.raises(error, match=words):
        FusedModFCStack([6, 5, 5, 5, 5], S, **options)
    with pytest.raises(error, match=words):
        random_stack((6, 5, 5, 5, 5), (3,)).call(functional.modfc_stack, **options)


@pytest.mark.parametrize("change", WEIGHTS)
def test_errors_name_the_skip_weight(change):
    weights, error, words = WEIGHTS[change]
    with pytest.raises(error, match=words):
        random_stack((6, 5, 5, 5, 5), (3,)).call(functional.modfc_stack, blocks=[(0, 1), (2, 3)], skip_weights=weights)


@pytest.mark.parametrize("backend", BACKENDS)
def test_identities_need_no_weights_and_nothing_gives_nothing(backend):
    case = random_stack((5, 5, 5), (1,))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        left_out = case.call(functional.modfc_stack, blocks=[[0, 1]], backend=backend)
        named = case.call(functional.modfc_stack, blocks=((0, 1),), skip_weights=[None], backend=backend)
    assert torch.equal(left_out[0], named[0]) and torch.equal(left_out[1], named[1])
    empty = random_stack((5, 4), (0,), pixels=0, blocks=((0, 0),)).leaves()
    features, rgb = empty.call(functional.modfc_stack, backend=backend)
    assert features.shape == (2, 0, 4) and rgb.shape == (2, 0, 3)
    rgb.sum().backward()
    assert empty.skip_weights[0].grad.eq(0).all()
