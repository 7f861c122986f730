"""The weight gradients in CUDA on a GPU: whole numbers, whose sums are exact, so that every bit is known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cips_kernels import cuda_saved, cuda_wgrad
from cips_kernels.packing import ROW_MULTIPLE
from cips_kernels.spec import StackSpec
from cips_kernels.testing import poisoned_empty
from cips_kernels.triton.fragment import to_natural

STACKS = {
    # widths, layers after which a ToRGB reads
    "paper": ((1024, 512, 512, 512, 512), (1, 2, 3)),
    "released, narrow end": ((512, 512, 256, 128, 64, 32, 32), (0, 2, 4, 5)),
    "several that read one": ((96, 160, 96, 416, 32), (0, 1, 1, 3)),
    "odd input": ((712, 384, 512), (0, 1)),
}


pytestmark = pytest.mark.usefixtures("served")


def whole_numbers(*shape: int, seed: int, most: int = 3) -> Tensor:
    """Of -most to most: products and sums over some ten thousand are exact in float32."""
    return torch.randint(-most, most + 1, shape, generator=torch.Generator().manual_seed(seed)).double()


def runs_of(spec: StackSpec, us: list[Tensor], xs: list[Tensor], scale: float, dtype: torch.dtype) -> list:
    """The layers in runs of equal widths, operands as the on-chip stack leaves them."""
    widths, runs, first = spec.widths, [], 0
    for layer in range(1, spec.depth + 1):
        alike = layer < spec.depth and layer > 1 and widths[layer : layer + 2] == widths[layer - 1 : layer + 1]
        if alike:
            continue
        u = to_natural(torch.stack(us[first:layer])).to("cuda", dtype).contiguous()
        x = torch.stack(xs[first:layer])
        x = (to_natural(x) if first > 0 else x).to("cuda", dtype).contiguous()
        runs.append(cuda_wgrad.Run(first, layer - 1, u, x, scale))
        first = layer
    return runs


def check(stack: str, images: int, pixels: int, shared: bool = False, channels: int = 3, dtype=torch.float16) -> None:
    """Every matrix of the layers and of the ToRGBs in front of them, all bits; nothing else is written."""
    widths, rgb_after = STACKS[stack]
    spec = StackSpec(widths, rgb_after, channels)
    batch = images + 2
    packing, scale, colour_scale = spec.packing(batch), 0.375, 0.75
    us = [whole_numbers(images, pixels, o, seed=k) for k, o in enumerate(widths[1:])]
    xs = [
        whole_numbers(1 if shared and k == 0 else images, pixels, i, seed=50 + k) for k, i in enumerate(widths[:-1])
    ]
    drgb = whole_numbers(images, pixels, channels, seed=99)
    colours = torch.zeros(images, cuda_saved.padded(pixels), cuda_wgrad.COLOUR_COLUMNS, dtype=torch.float64)
    rest = whole_numbers(images, pixels, channels, seed=98, most=1)  # stands for what rounding left
    colours[:, :pixels, :channels], colours[:, :pixels, 3 : 3 + channels] = drgb - rest, rest
    n = torch.full((packing.mod_numel,), float("nan"), device="cuda")
    with poisoned_empty():
        arguments = (packing, spec, n, colours.to("cuda", dtype), colour_scale, 1)  # images 1 to `images`
        cuda_wgrad.wgrad(runs_of(spec, us, xs, scale, dtype), *arguments)
    written = 0
    for matrix, u, x in zip(packing.layers, us, xs, strict=True):
        truth = scale * u.mT @ x
        assert torch.equal(packing.mod(n, matrix)[1:-1].double().cpu(), truth), f"layer {matrix}"
        written += truth.numel()
    for after, matrix in zip(rgb_after, packing.rgbs):
        if after < spec.depth - 1:
            truth = colour_scale * drgb.mT @ xs[after + 1]
            assert torch.equal(packing.mod(n, matrix)[1:-1].double().cpu(), truth), f"ToRGB after {after}"
            written += truth.numel()
    assert int(n.isnan().sum()) == n.numel() - written, "something else was written"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("stack", STACKS)
def test_every_matrix(stack: str, images: int, dtype: torch.dtype) -> None:
    check(stack, images, 300, dtype=dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("pixels", [1, 63, 64, 65, 127, 257, 4096, 5000])
def test_every_number_of_pixels(pixels: int) -> None:
    check("released, narrow end", 2, pixels)


@pytest.mark.gpu
@pytest.mark.parametrize("clusters", [1, 3, 4, 7, 20])
def test_cut_sums_are_added_up(clusters: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few clusters: their ranges begin and end within matrices."""
    monkeypatch.setattr(cuda_wgrad, "_clusters", lambda dtype, device: clusters)
    for stack in STACKS:
        check(stack, 2, 1000)


@pytest.mark.gpu
@pytest.mark.parametrize("channels", [1, 2])
def test_few_colours_and_a_shared_input(channels: int) -> None:
    check("paper", 3, 200, shared=True, channels=channels)


@pytest.mark.gpu
def test_more_runs_than_a_launch_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    widths = (64, *(32 * n for n in (3, 1, 2, 4, 1, 3, 2, 1, 4, 2, 3)))
    monkeypatch.setitem(STACKS, "many", (widths, (2, 5, 10)))
    check("many", 2, 150)


def test_what_the_copy_engine_can_read() -> None:
    assert cuda_wgrad.usable(torch.zeros(1, 2, 10, 64))
    assert not cuda_wgrad.usable(torch.zeros(1, 2, 10, 100))
    assert not cuda_wgrad.usable(torch.zeros(1, 2, 64, 10).mT)
    assert not cuda_wgrad.usable(torch.zeros(1, 2, 10, 65)[..., 1:])
    assert ROW_MULTIPLE % 4 == 0  # rows of a matrix are stored 16 bytes at a time
