"""`cips_kernels.cuda.modulate` and its backward, on a GPU, against float64 in plain PyTorch.

The same kernels run on the host in test_csrc_host.py; here are the launches and the real hardware.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from cips_kernels import cuda
from cips_kernels.packing import Matrix, Packing, pack
from cips_kernels.testing import assert_close_as_eager, poisoned_empty

EPS = 1e-8
# widths, layers after which a ToRGB reads, its channels, demodulate
STACKS = {
    "paper": ((1024, *(512,) * 15), tuple(range(2, 15, 2)), 3, True),
    "tapered": ((512, 256, 128, 64, 32, 16), (1, 3, 4), 3, True),
    "odd": ((37, 131, 75, 9), (0, 2), 3, True),
    "odd, together even": ((30, 50, 34), (), 3, True),
    "no demodulation": ((48, 40, 97), (1,), 4, False),
    "one input": ((1, 300), (), 3, True),
    "one output": ((300, 1), (0,), 1, True),
    "over a tile": ((516, 1027, 70), (0,), 3, True),
    "wide": ((4096, 130), (), 3, True),
    "wide and odd": ((4999, 67), (), 3, True),
    "64 matrices": ((24,) * 33, tuple(range(32)), 3, True),
}
BATCHES = [1, 3, 16]


pytestmark = pytest.mark.usefixtures("served")


@dataclass
class Inputs:
    packing: Packing
    weights: Tensor
    styles: Tensor
    grad_mods: Tensor


def make_inputs(stack: str, batch: int, device: str = "cuda") -> Inputs:
    """Random inputs; the padding columns of `grad_mods` are NaN, as uninitialised memory may be."""
    packing = pack(*STACKS[stack], batch)
    generator = torch.Generator().manual_seed(batch)
    weights = torch.randn(packing.weight_numel, generator=generator)
    styles = 1 + torch.randn(batch, packing.style_width, generator=generator)
    grad_mods = torch.full((packing.mod_numel,), torch.nan)
    for matrix in packing.matrices:
        shape = (batch, matrix.out_features, matrix.in_features)
        packing.mod(grad_mods, matrix).copy_(torch.randn(shape, generator=generator))
    return Inputs(packing, weights.to(device), styles.to(device), grad_mods.to(device))


def brute_force(inputs: Inputs, matrix: Matrix, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """M, dW and ds of one matrix, each step in `dtype`."""
    packing = inputs.packing
    w = packing.weight(inputs.weights, matrix).to(dtype)
    s = packing.style(inputs.styles, matrix).to(dtype)
    n = packing.mod(inputs.grad_mods, matrix).to(dtype)
    c = matrix.in_features**-0.5
    v = c * s[:, None, :] * w
    if not matrix.demodulate:
        return v, c * (s[:, None, :] * n).sum(0), c * (w * n).sum(1)
    d = torch.rsqrt(v.square().sum(-1, keepdim=True) + EPS)
    m = d * v
    dv = d * (n - m * (n * m).sum(-1, keepdim=True))
    return m, c * (s[:, None, :] * dv).sum(0), c * (w * dv).sum(1)


def cancels(matrix: Matrix) -> bool:
    """With one input channel M is the sign of W s, and its gradient is rounding, in eager PyTorch as well."""
    return matrix.in_features == 1 and matrix.demodulate


def assert_same_bits(name: str, first: Tensor, second: Tensor) -> None:
    width = {2: torch.int16, 4: torch.int32}[first.element_size()]
    different = torch.nonzero(first.flatten().view(width) != second.flatten().view(width))
    assert different.numel() == 0, (
        f"{name}: first of {len(different)} different elements: {int(different[0])}"
    )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("stack", STACKS)
def test_forward(stack: str, batch: int, dtype: torch.dtype) -> None:
    inputs = make_inputs(stack, batch)
    packing = inputs.packing
    with poisoned_empty():
        mods = cuda.modulate(inputs.weights, inputs.styles, packing, dtype, EPS)
    assert mods.isfinite().all(), "an element was not written"
    for index, matrix in enumerate(packing.matrices):
        exact, eager = (brute_force(inputs, matrix, kind)[0] for kind in (torch.float64, torch.float32))
        assert_close_as_eager(f"M of {index}", packing.mod(mods, matrix), eager.to(dtype), exact)
        rows = batch * matrix.out_features * matrix.row_stride
        padded = mods[matrix.mod_offset : matrix.mod_offset + rows].view(-1, matrix.row_stride)
        assert (padded[:, matrix.in_features :] == 0).all(), f"padding columns of {index}"
    again = cuda.modulate(inputs.weights, inputs.styles, packing, dtype, EPS)
    assert_same_bits("mods", mods, again)


@pytest.mark.gpu
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("stack", STACKS)
def test_backward(stack: str, batch: int) -> None:
    inputs = make_inputs(stack, batch)
    packing = inputs.packing
    arguments = (inputs.grad_mods, inputs.weights, inputs.styles, packing, EPS)
    with poisoned_empty():
        grad_weights, grad_styles = cuda.modulate_backward(*arguments)
    assert grad_weights.isfinite().all() and grad_styles.isfinite().all(), "an element was not written"
    for index, matrix in enumerate(packing.matrices):
        if cancels(matrix):
            continue
        _, *exact = brute_force(inputs, matrix, torch.float64)
        _, *eager = brute_force(inputs, matrix, torch.float32)
        assert_close_as_eager(f"dW of {index}", packing.weight(grad_weights, matrix), eager[0], exact[0])
        assert_close_as_eager(f"ds of {index}", packing.style(grad_styles, matrix), eager[1], exact[1])
    for name, first, second in zip(
        ("dW", "ds"), (grad_weights, grad_styles), cuda.modulate_backward(*arguments)
    ):
        assert_same_bits(name, first, second)


@pytest.mark.gpu
@pytest.mark.parametrize("stack", ["tapered", "over a tile"])
def test_any_alignment_gives_the_same_bits(stack: str) -> None:
    """Weights and styles that start amid 16 bytes take the scalar path: the same sums in the same order."""
    inputs = make_inputs(stack, 3)

    def shifted(tensor: Tensor) -> Tensor:
        moved = tensor.new_empty(tensor.numel() + 1)[1:].view(tensor.shape)
        return moved.copy_(tensor)

    weights, styles, packing = shifted(inputs.weights), shifted(inputs.styles), inputs.packing
    expected = cuda.modulate(inputs.weights, inputs.styles, packing, torch.bfloat16, EPS)
    assert_same_bits("mods", cuda.modulate(weights, styles, packing, torch.bfloat16, EPS), expected)
    expected = cuda.modulate_backward(inputs.grad_mods, inputs.weights, inputs.styles, packing, EPS)
    found = cuda.modulate_backward(inputs.grad_mods, weights, styles, packing, EPS)
    for name, first, second in zip(("dW", "ds"), found, expected):
        assert_same_bits(name, first, second)


@pytest.mark.gpu
def test_side_stream_and_graph() -> None:
    """The launches follow the current stream, and a captured graph repeats them on new numbers."""
    inputs = make_inputs("tapered", 3)
    packing = inputs.packing

    def both() -> tuple[Tensor, Tensor, Tensor]:
        mods = cuda.modulate(inputs.weights, inputs.styles, packing, torch.float16, EPS)
        return mods, *cuda.modulate_backward(inputs.grad_mods, inputs.weights, inputs.styles, packing, EPS)

    expected = both()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)  # the default stream would overtake this
        inputs.styles.neg_()
        found = both()
    stream.synchronize()
    inputs.styles.neg_()
    signs = (-1, -1, 1)  # M and dW are odd in s, ds is even
    for name, first, second, sign in zip(("mods", "dW", "ds"), found, expected, signs):
        assert torch.equal(first, sign * second), name

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both()
    inputs.weights.mul_(0.75)
    inputs.styles.add_(0.5)
    graph.replay()
    for name, first, second in zip(("mods", "dW", "ds"), captured, both()):
        assert_same_bits(name, first, second)


@pytest.mark.gpu
def test_offsets_beyond_32_bits() -> None:
    """More than 2^31 elements of mods: the last image is right."""
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of free GPU memory")
    batch, wide = 135, 4096
    packing = pack((wide, wide), (), 3, True, batch)
    assert packing.mod_numel > 2**31
    weights = torch.randn(packing.weight_numel, device="cuda")
    styles = torch.randn(batch, wide, device="cuda")
    (matrix,) = packing.matrices
    last = pack((wide, wide), (), 3, True, 1)
    mods = cuda.modulate(weights, styles, packing, torch.bfloat16, EPS)
    expected = cuda.modulate(weights, styles[-1:].contiguous(), last, torch.bfloat16, EPS)
    assert_same_bits("mods of the last image", packing.mod(mods, matrix)[-1], last.mod(expected, matrix)[0])
    del mods
    grad_mods = torch.zeros(packing.mod_numel, device="cuda")
    last_grad = torch.randn(last.mod_numel, device="cuda")
    packing.mod(grad_mods, matrix)[-1].copy_(last.mod(last_grad, matrix)[0])
    found = cuda.modulate_backward(grad_mods, weights, styles, packing, EPS)
    expected = cuda.modulate_backward(last_grad, weights, styles[-1:].contiguous(), last, EPS)
    assert_same_bits("dW", found[0], expected[0])
    assert_same_bits("ds", found[1][-1], expected[1][0])
    assert (found[1][:-1] == 0).all()


@pytest.mark.gpu
def test_second_device() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    inputs, elsewhere = make_inputs("odd", 3), make_inputs("odd", 3, "cuda:1")
    expected = cuda.modulate(inputs.weights, inputs.styles, inputs.packing, torch.float16, EPS)
    found = cuda.modulate(elsewhere.weights, elsewhere.styles, inputs.packing, torch.float16, EPS)
    assert found.device == torch.device("cuda:1") and torch.cuda.current_device() == 0
    assert_same_bits("mods", found.to("cuda:0"), expected)


@pytest.mark.gpu
def test_empty_batch() -> None:
    packing = pack((20, 10), (), 3, True, 0)
    weights, styles = torch.randn(200, device="cuda"), torch.empty(0, 20, device="cuda")
    mods = cuda.modulate(weights, styles, packing, torch.float16, EPS)
    assert mods.shape == (0,)
    grad_weights, grad_styles = cuda.modulate_backward(mods.float(), weights, styles, packing, EPS)
    assert grad_weights.shape == (200,) and (grad_weights == 0).all() and grad_styles.shape == (0, 20)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda a: a | {"weights": a["weights"].double()}, TypeError, "weights: expected torch.float32, got"),
        (lambda a: a | {"weights": a["weights"][:-1]}, ValueError, "weights: expected the packing's shape"),
        (lambda a: a | {"styles": a["styles"].cpu()}, ValueError, "styles: expected a tensor on cuda:0, got"),
        (lambda a: a | {"styles": a["styles"].T.contiguous().T}, ValueError, "styles: expected a contiguous"),
        (lambda a: a | {"styles": a["styles"][:1]}, ValueError, "styles: expected the packing's shape"),
        (lambda a: a | {"dtype": torch.float64}, TypeError, "dtype: expected float32, float16 or bfloat16"),
    ],
)  # fmt: skip
def test_refusals(change, error: type[Exception], words: str) -> None:
    inputs = make_inputs("odd", 3)
    arguments = dict(
        weights=inputs.weights, styles=inputs.styles, packing=inputs.packing, dtype=torch.float16, eps=EPS
    )
    with pytest.raises(error, match=words):
        cuda.modulate(**change(arguments))


@pytest.mark.gpu
def test_backward_refusals() -> None:
    inputs = make_inputs("odd", 3)
    rest = (inputs.weights, inputs.styles, inputs.packing, EPS)
    with pytest.raises(TypeError, match="grad_mods: expected torch.float32, got torch.bfloat16"):
        cuda.modulate_backward(inputs.grad_mods.bfloat16(), *rest)
    moved = torch.empty(inputs.packing.mod_numel + 1, device="cuda")[1:]
    with pytest.raises(ValueError, match="grad_mods: expected an address that is a multiple of 16"):
        cuda.modulate_backward(moved, *rest)
    too_deep = pack((8,) * 66, (), 3, True, 2)
    with pytest.raises(ValueError, match="matrices: 65 came, expected 1 to 64"):
        cuda.modulate(
            torch.zeros(too_deep.weight_numel, device="cuda"),
            torch.zeros(2, too_deep.style_width, device="cuda"), too_deep, torch.float16, EPS,
        )  # fmt: skip


def test_tensors_on_the_cpu_are_refused() -> None:
    """Before the extension is even looked for: this needs no GPU."""
    packing = pack((20, 10), (), 3, True, 2)
    with pytest.raises(ValueError, match="weights: expected a tensor on a CUDA device, got one on cpu"):
        cuda.modulate(torch.zeros(200), torch.zeros(2, 20), packing, torch.float16, EPS)


def test_available_gives_a_reason() -> None:
    ok, reason = cuda.available()
    assert isinstance(ok, bool)
    assert ok == (reason == "")
