"""The gradients of noise strengths with the noise drawn anew, against sums in float64 of the noise that PyTorch draws."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="this machine has no triton")

from cips_kernels import noise
from cips_kernels.spec import StackInputs, StackSpec
from cips_kernels.triton import layers

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FIRST = 3  # number of the first layer in the noise's counter


def inputs_of(batch: int, pixels: int, coords: torch.Tensor | None) -> StackInputs:
    empty = torch.zeros(0, device=DEVICE)
    x, styles = torch.zeros(1, pixels, 8, device=DEVICE), torch.zeros(batch, 8, device=DEVICE)
    return StackInputs(x, empty, styles, empty, empty, None, torch.tensor(11, device=DEVICE), None, coords)


@pytest.mark.parametrize("places", ["index", "shared", "per image"])
@pytest.mark.parametrize(("batch", "pixels"), [(1, 1), (3, 127), (2, 1500)])
def test_sums_are_those_of_the_drawn_noise(batch, pixels, places):
    spec = StackSpec((8, 8, 8), (1,), 3, first_layer=FIRST)
    draw = torch.Generator().manual_seed(batch)
    rows = torch.randn(spec.depth, batch, pixels, generator=draw)
    coords = None
    if places != "index":
        coords = torch.rand(*((batch,) if places == "per image" else ()), pixels, 2, generator=draw) * 2 - 1
    moved = None if coords is None else coords.to(DEVICE)
    found = layers.strength_grads(rows.to(DEVICE), inputs_of(batch, pixels, moved), spec)
    values = torch.stack([noise.normal(torch.tensor(11), FIRST + k, batch, pixels, coords) for k in range(spec.depth)])
    truth = (values.double() * rows.double()).sum((1, 2))
    eager = ((values * rows).sum((1, 2)).double() - truth).abs()
    # the kernel's normal numbers are within 2e-5 of PyTorch's, see test_noise.py
    allowed = 2 * eager + 2e-5 * rows.double().norm(dim=(1, 2))
    assert ((found.double().cpu() - truth).abs() <= allowed).all()
