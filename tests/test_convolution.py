"""The convolution of the discriminator: PyTorch's values and derivatives, and no kernel as large as an image."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cips.convolution import conv2d
from cips.discriminator import Discriminator
from cips.training.losses import r1_penalty

# kernel, stride, padding, groups, size
SHAPES = [
    (3, 1, 1, 1, (8, 8)), (3, 2, 0, 1, (9, 11)), (3, 2, 0, 1, (8, 10)), (1, 1, 0, 1, (5, 6)), (3, 2, 1, 1, (7, 8)),
    (1, 2, 0, 1, (6, 7)), (4, 1, 2, 4, (5, 6)), (4, 2, 1, 2, (7, 6)),
]  # fmt: skip


def make(kernel: int, size: tuple[int, int], groups: int = 1, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 4, *size), (8, 4 // groups, kernel, kernel), (8,))
    return tuple(torch.randn(s, generator=generator, dtype=dtype).requires_grad_() for s in shapes)


@pytest.mark.parametrize(("kernel", "stride", "padding", "groups", "size"), SHAPES)
def test_derivatives(kernel: int, stride: int, padding: int, groups: int, size: tuple[int, int]) -> None:
    """By finite differences, and the third as PyTorch's own."""
    tensors = make(kernel, size, groups)
    options = {"stride": stride, "padding": padding, "groups": groups}

    def call(*t: Tensor) -> Tensor:
        return conv2d(*t, **options)

    assert torch.equal(call(*tensors), F.conv2d(*tensors, **options))
    torch.autograd.gradcheck(call, tensors)
    torch.autograd.gradgradcheck(call, tensors)

    def third(function) -> list[Tensor]:
        y = function(*tensors, **options)
        first = torch.autograd.grad(y.pow(3).sum(), tensors, create_graph=True)
        second = torch.autograd.grad(sum(g.pow(2).sum() for g in first), tensors, create_graph=True)
        return list(torch.autograd.grad(sum(g.pow(2).sum() for g in second), tensors))

    for ours, theirs in zip(third(conv2d), third(F.conv2d)):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


class Kernels(TorchDispatchMode):
    """Notes the height of every convolution's kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.heights: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution.default:
            self.heights.append(args[1].shape[2])
        return func(*args, **(kwargs or {}))


def test_r1_has_small_kernels_alone() -> None:
    discriminator = Discriminator(16)
    images = torch.randn(2, 3, 16, 16).requires_grad_()
    with Kernels() as seen:
        r1_penalty(discriminator(images), images).backward()
    assert len(seen.heights) > 20
    assert max(seen.heights) <= 4  # the blur's, which on a CPU is a depthwise convolution


@pytest.mark.gpu
@pytest.mark.parametrize("form", [torch.channels_last, torch.contiguous_format])
def test_on_a_gpu(form: torch.memory_format) -> None:
    """Second derivatives of bfloat16 in both memory formats, against float64."""

    def second(function, dtype: torch.dtype) -> list[Tensor]:
        tensors = [t.detach().cuda().to(dtype) for t in make(3, (32, 32))]
        tensors[0] = tensors[0].contiguous(memory_format=form)
        tensors = [t.requires_grad_() for t in tensors]
        y = function(*tensors, stride=2, padding=1)
        (dx,) = torch.autograd.grad(y.square().sum(), tensors[0], create_graph=True)
        return list(torch.autograd.grad(dx.square().sum(), tensors))

    exact = second(F.conv2d, torch.float64)
    for ours, eager, truth in zip(second(conv2d, torch.bfloat16), second(F.conv2d, torch.bfloat16), exact):
        error, allowed = ((t.double() - truth).norm() / truth.norm() for t in (ours, eager))
        assert error <= 2 * allowed
