"""The discriminator's filter and tails: the specification against scipy and differences, the kernels against the
specification, interpreted on a CPU with small shapes, compiled on a GPU with real ones."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.signal
import torch
import torch.nn.functional as F
from torch.library import opcheck

from cips_kernels import filters, use_backend
from cips_kernels.testing import poisoned_empty, relative_error

pytest.importorskip("triton", reason="this machine has no triton")

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
OPS = torch.ops.cips_kernels
FLOAT16, BFLOAT16, FLOAT32, FLOAT64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
SLOPE = 0.2

# batch, channels, height, width, padding, stride
SMALL = [
    (2, 5, 9, 7, 2, 1),
    (1, 3, 8, 8, 1, 2),
    (2, 6, 11, 4, 2, 2),
    # several tiles of channels, columns and rows
    (1, 70, 4, 21, 1, 1),
    (1, 70, 4, 36, 1, 2),
    (1, 2, 37, 4, 2, 1),
    (1, 2, 40, 5, 1, 2),
    (1, 8, 12, 19, 3, 2),
    (1, 1, 5, 4, 0, 2),
    (2, 4, 4, 6, 0, 1),
    (1, 2, 1, 2, 2, 1),
]
LARGE = [(16, 128, 256, 256, 2, 1), (4, 512, 64, 64, 1, 2), (3, 33, 77, 130, 2, 1)]
# the interpreter is slow, and cuts bfloat16 instead of rounding it
DTYPES = [FLOAT32, FLOAT16, BFLOAT16] if CUDA else [FLOAT32, FLOAT16]
SHAPES = [(s, d) for s in SMALL + (LARGE if CUDA else []) for d in DTYPES if CUDA or d == FLOAT32 or s in SMALL[:2]]


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = FLOAT64) -> torch.Tensor:
    """Channels-last normal values that every dtype holds exactly."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16().to(DEVICE, dtype)
    return values.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else values


def by_scipy(x: torch.Tensor, padding: int, stride: int) -> torch.Tensor:
    kernel = np.outer([1, 3, 3, 1], [1, 3, 3, 1]) / 64
    pads = ((0, 0), (0, 0), (padding, padding), (padding, padding))
    padded = np.pad(x.detach().cpu().numpy(), pads)
    planes = [[scipy.signal.correlate2d(p, kernel, mode="valid") for p in image] for image in padded]
    return torch.from_numpy(np.array(planes))[:, :, ::stride, ::stride].to(x.device)


def plain(x, bias, padding, stride, slope):
    """The same by PyTorch's own operators, in the dtype of `x`: what the kernels may err twice as much as."""
    if slope is not None:
        x = F.leaky_relu(x + bias.to(x.dtype)[:, None, None], slope)
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=x.dtype, device=x.device)
    kernel = (taps[:, None] * taps / 64).expand(x.shape[1], 1, -1, -1)
    return F.conv2d(x, kernel, padding=padding, stride=stride, groups=x.shape[1])


def check(name, value, eager, exact, dtype, cancelled=1.0):
    """Twice the error of eager PyTorch, at least two roundings to `dtype`: a sum of few rounded gradients is luck.

    `cancelled`: size of a sum's terms in multiples of the sum.
    """
    assert value.dtype == eager.dtype, name
    error = relative_error(value, exact)
    allowed = 2 * max(relative_error(eager, exact), torch.finfo(dtype).eps * cancelled)
    assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e}"


def first_and_second(function, tensors):
    """Result, first derivatives along a random direction, and the derivatives of their squared norm."""
    leaves = [t.detach().requires_grad_(True) for t in tensors]
    y = function(*leaves)
    weight = draw(*y.shape, seed=5).to(y.dtype).requires_grad_(True)
    first = torch.autograd.grad(y, leaves, weight, create_graph=True)
    penalty = sum(g.to(torch.promote_types(g.dtype, FLOAT32)).square().sum() for g in first[:1])
    (second,) = torch.autograd.grad(penalty, weight)
    return [y, *first, second]


@pytest.mark.parametrize("shape", SMALL, ids=str)
def test_the_specification_is_the_filter(shape):
    *size, padding, stride = shape
    x, bias = draw(*size), draw(size[1], seed=1)
    torch.testing.assert_close(filters.blur(x, padding=padding, stride=stride), by_scipy(x, padding, stride))
    activated = F.leaky_relu(x + bias[:, None, None], SLOPE)
    ours = filters.blur(x, bias, padding=padding, stride=stride, negative_slope=SLOPE)
    torch.testing.assert_close(ours, by_scipy(activated, padding, stride))


@pytest.mark.parametrize("shape", SMALL, ids=str)
@pytest.mark.parametrize("activate", [False, True])
def test_the_transpose_is_the_transpose(shape, activate):
    """`<F D u, v> = <u, D F^T v>` for random u and v."""
    *size, padding, stride = shape
    u, mask, bias = draw(*size), draw(*size, seed=1), draw(size[1], seed=2)
    masks = (mask, bias) if activate else (None, None)
    blurred = OPS.blur(u, *masks, padding, stride, SLOPE, False, "reference")
    v = draw(*blurred.shape, seed=3)
    back, sums = OPS.blur_transposed(v, *masks, *size[2:], padding, stride, SLOPE, True, "reference")
    torch.testing.assert_close(sums, back.sum((0, 2, 3)))
    assert back.shape == u.shape
    torch.testing.assert_close((blurred * v).sum(), (u * back).sum())
    assert (blurred * v).sum().abs() > 1e-6


@pytest.mark.parametrize("padding, stride", [(2, 1), (1, 2), (2, 2), (1, 1)])
@pytest.mark.parametrize("slope", [None, SLOPE])
def test_every_derivative_by_differences(padding, stride, slope):
    x = draw(2, 3, 5, 6).add_(0.01).requires_grad_(True)
    bias = None if slope is None else draw(3, seed=1).add_(0.003).requires_grad_(True)

    def call(x, bias=None):
        return filters.blur(x, bias, padding=padding, stride=stride, negative_slope=slope)

    inputs = (x,) if bias is None else (x, bias)
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)
    # third order: the second derivative of a cube of the result
    (first,) = torch.autograd.grad((call(*inputs) ** 3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x, create_graph=True)
    (third,) = torch.autograd.grad(second.sum(), x)
    step, direction = 1e-5, draw(*x.shape, seed=7)
    values = []
    for sign in (1, -1):
        moved = (x + sign * step * direction).detach().requires_grad_(True)
        (g,) = torch.autograd.grad((call(moved, *inputs[1:]) ** 3).sum(), moved, create_graph=True)
        values.append(torch.autograd.grad(g.square().sum(), moved)[0].sum())
    slope_found = (values[0] - values[1]) / (2 * step)
    torch.testing.assert_close((third * direction).sum(), slope_found, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("residual", [False, True])
def test_every_derivative_of_the_tail_by_differences(residual):
    x, bias = draw(2, 3, 4, 3).add_(0.01).requires_grad_(True), draw(3, seed=1).add_(0.003).requires_grad_(True)
    inputs = (x, bias, draw(2, 3, 4, 3, seed=2).requires_grad_(True)) if residual else (x, bias)
    expected = F.leaky_relu(x + bias[:, None, None], SLOPE) + (inputs[2] if residual else 0)
    torch.testing.assert_close(filters.bias_lrelu(*inputs), expected)
    assert torch.autograd.gradcheck(filters.bias_lrelu, inputs)
    assert torch.autograd.gradgradcheck(filters.bias_lrelu, inputs)


@pytest.mark.parametrize("slope", [None, SLOPE])
@pytest.mark.parametrize("shape, dtype", SHAPES, ids=str)
def test_blur_kernels(shape, dtype, slope):
    """Result, gradients and second derivatives: at most twice the error of PyTorch's operators, on memory poisoned with
    NaN, and the same bits in a second run."""
    *size, padding, stride = shape
    x, bias = draw(*size, dtype=dtype), draw(size[1], seed=1, dtype=FLOAT32)
    tensors = (x,) if slope is None else (x, bias)

    def ours(x, bias=None):
        return filters.blur(
            x, bias, padding=padding, stride=stride, negative_slope=slope, backend="triton"
        )

    def theirs(x, bias=None):
        return plain(x, bias, padding, stride, slope)

    with poisoned_empty():
        first, again = first_and_second(ours, tensors), first_and_second(ours, tensors)
    exact = first_and_second(theirs, [t.double() for t in tensors])
    eager = first_and_second(theirs, tensors)
    names = ("y", "dx", "second") if slope is None else ("y", "dx", "db", "second")
    for name, a, b, e, r in zip(names, first, again, eager, exact, strict=True):
        assert torch.equal(a, b), f"{name}: two runs differ"
        if a.dim() == 4:
            assert a.is_contiguous(memory_format=torch.channels_last), name
        terms = exact[1].abs().sum((0, 2, 3)).norm() / r.norm() if name == "db" else torch.ones(())
        check(name, a, e, r, dtype, float(terms.detach()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("size", [(2, 5, 9, 7), (1, 130, 3, 5), (3, 8, 16, 16)], ids=str)
def test_tail_kernel(size, residual, dtype):
    tensors = [draw(*size, dtype=dtype), draw(size[1], seed=1, dtype=FLOAT32)]
    tensors += [draw(*size, seed=2, dtype=dtype)] if residual else []

    def theirs(x, bias, residual=None):
        y = F.leaky_relu(x + bias.to(x.dtype)[:, None, None], SLOPE)
        return y if residual is None else y + residual

    def ours(*tensors):
        return filters.bias_lrelu(*tensors, backend="triton")

    with poisoned_empty():
        first, again = first_and_second(ours, tensors), first_and_second(ours, tensors)
    exact = first_and_second(theirs, [t.double() for t in tensors])
    eager = first_and_second(theirs, tensors)
    for k, (a, b, e, r) in enumerate(zip(first, again, eager, exact, strict=True)):
        assert torch.equal(a, b), f"{k}: two runs differ"
        terms = exact[1].abs().sum((0, 2, 3)).norm() / r.norm() if k == 2 else torch.ones(())  # the bias's gradient
        check(str(k), a, e, r, dtype, float(terms.detach()))


@pytest.mark.parametrize("stride", [1, 2])
def test_planes_and_views_are_read_where_they_lie(stride):
    """NCHW memory, a gradient that is one number everywhere, and a slice of a larger tensor."""
    wide = draw(2, 6, 9, 10, dtype=FLOAT32)
    for x in (wide.contiguous(), wide[:, 1:5, 2:, :-1], wide[:1].expand(2, -1, -1, -1)):
        x = x.detach().requires_grad_(True)
        ours = filters.blur(x, padding=1, stride=stride, backend="triton")
        (dx,) = torch.autograd.grad(ours.sum(), x)
        theirs = plain(x, None, 1, stride, None)
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(dx, torch.autograd.grad(theirs.sum(), x)[0])


def test_padding_lies_behind_the_activation():
    """With a bias that makes a zero positive: a padded zero is still zero."""
    x, bias = torch.zeros(1, 1, 4, 4, device=DEVICE), torch.ones(1, device=DEVICE)
    y = filters.blur(x, bias, padding=2, negative_slope=SLOPE, backend="triton")
    torch.testing.assert_close(y[0, 0, 0, 0].item(), 16 / 64)  # the corner sees two of four taps each way: (3 + 1)^2


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("stride", [1, 2])
def test_opcheck(backend, stride):
    x = draw(2, 3, 2, 4, dtype=FLOAT32).add_(0.01).requires_grad_(True)
    bias = draw(3, seed=1, dtype=FLOAT32).requires_grad_(True)
    mask = draw(2, 3, 2, 4, seed=2, dtype=FLOAT32)
    opcheck(OPS.blur.default, (x, None, None, 2, stride, 1.0, False, backend))
    opcheck(OPS.blur.default, (x, None, bias, 1, stride, SLOPE, True, backend))
    opcheck(OPS.blur.default, (x, mask, bias.detach(), 1, stride, SLOPE, False, backend))
    y = OPS.blur(x, None, None, 1, stride, 1.0, False, backend).detach().requires_grad_(True)
    for sums in (False, True):
        opcheck(OPS.blur_transposed.default, (y, mask, bias.detach(), 2, 4, 1, stride, SLOPE, sums, backend))
        opcheck(OPS.bias_lrelu_backward.default, (x, mask, bias.detach(), SLOPE, sums, backend))
    opcheck(OPS.bias_lrelu.default, (x, bias, None, SLOPE, backend))
    opcheck(OPS.bias_lrelu.default, (x, bias, mask, SLOPE, backend))


def test_what_serves():
    x = draw(1, 4, 4, 4, dtype=FLOAT32)
    assert filters.serves(x) == CUDA  # on a CPU PyTorch's convolution is faster
    with use_backend("reference"):
        assert not filters.serves(x)
    with use_backend("triton"):
        assert filters.serves(x)
        assert not filters.serves(draw(1, 4, 4, 4)) and not filters.serves(draw(2, 4, 4, 4, dtype=FLOAT32).contiguous())
        assert not filters.serves(x[:0])


def test_no_images_give_no_images():
    x = torch.zeros(0, 3, 8, 8, device=DEVICE, requires_grad=True)
    y = filters.blur(x, padding=1, stride=2)
    assert y.shape == (0, 3, 4, 4)
    assert torch.autograd.grad(y.sum(), x)[0].shape == x.shape


def test_errors_name_the_argument():
    x = torch.zeros(1, 3, 8, 8)
    for match, error, call in (
        ("stride: expected 1 or 2, got 3", ValueError, lambda: filters.blur(x, padding=1, stride=3)),
        ("padding: expected an integer from 0 to 3, got 4", ValueError, lambda: filters.blur(x, padding=4)),
        ("x: expected at least 4 rows and columns", ValueError, lambda: filters.blur(x[:, :, :3], padding=0)),
        (r"x: expected \[B, C, H, W\]", ValueError, lambda: filters.blur(x[0], padding=1)),
        ("x: expected float16, .* got torch.int64", TypeError, lambda: filters.blur(x.long(), padding=1)),
        ("bias: expected None", ValueError, lambda: filters.blur(x, torch.zeros(3), padding=1)),
        (r"bias: expected \[C\] = \[3\]", ValueError, lambda: filters.bias_lrelu(x, torch.zeros(4))),
        ("bias: expected float32", TypeError, lambda: filters.bias_lrelu(x, torch.zeros(3).double())),
        ("residual: expected", ValueError, lambda: filters.bias_lrelu(x, torch.zeros(3), x[:, :, :1])),
        ("residual: expected torch.float32", TypeError, lambda: filters.bias_lrelu(x, torch.zeros(3), x.half())),
        ("negative_slope: expected", ValueError, lambda: filters.bias_lrelu(x, torch.zeros(3), negative_slope=-0.1)),
        ("cannot serve this call", RuntimeError, lambda: filters.blur(x.double(), padding=1, backend="triton")),
        ("backend: expected", ValueError, lambda: filters.blur(x, padding=1, backend="fast")),
    ):
        with pytest.raises(error, match=match):
            call()


@pytest.mark.gpu
def test_offsets_beyond_int32():
    """2.3 billion elements: the last rows are those of the last image alone."""
    x = torch.zeros(35, 512, 512, 256, device="cuda", dtype=torch.bfloat16).permute(0, 3, 1, 2)  # channels last
    x[-1].normal_()
    y = filters.blur(x, padding=1, stride=2, backend="triton")
    last = x[-1:].contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y[-1:], filters.blur(last, padding=1, stride=2, backend="triton"), rtol=0, atol=0)
    back = OPS.blur_transposed(y, None, None, 512, 512, 1, 2, 1.0, False, "triton")[0]
    alone = y[-1:].contiguous(memory_format=torch.channels_last)
    back_alone = OPS.blur_transposed(alone, None, None, 512, 512, 1, 2, 1.0, False, "triton")[0]
    torch.testing.assert_close(back[-1:], back_alone, rtol=0, atol=0)


@pytest.mark.gpu
def test_compiled_and_captured():
    x, bias = draw(2, 16, 32, 32, dtype=BFLOAT16), draw(16, seed=1, dtype=FLOAT32)

    def step(x):
        y = filters.blur(x, bias, padding=2, negative_slope=SLOPE)
        return filters.bias_lrelu(filters.blur(y, padding=1, stride=2), bias)

    expected = step(x)
    assert torch.equal(torch.compile(step, fullgraph=True)(x), expected)
    graph, still = torch.cuda.CUDAGraph(), x.clone()
    with torch.cuda.graph(graph):
        captured = step(still)
    still.copy_(x.flip(0))
    graph.replay()
    assert torch.equal(captured, expected.flip(0))
