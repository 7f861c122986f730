"""What the cpu backend's tiling promises: no dependence on the tile, the same bits every run, memory that does not grow with
pixels, images that do not touch each other, sums over tiles in float32."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cips_kernels import cpu, cpu_plan, reference
from cips_kernels.testing import StackCase, poisoned_empty, random_stack, relative_error
from cpu_stacks import (
    DTYPES,
    EVERYTHING,
    TILE,
    random_grads,
    run_backward,
    run_forward,
    stack_of,
    use_small_tiles,
)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    use_small_tiles(monkeypatch)


def everything(case: StackCase, dtype: torch.dtype, channel_major: bool = False) -> list[Tensor]:
    """Outputs and gradients of the cpu backend."""
    inputs, spec = stack_of(case.cast(dtype), channel_major)
    with poisoned_empty():
        features, rgb, saved = cpu.forward(inputs, spec, True, True)
        grads = cpu.backward(*random_grads(case, dtype), inputs, spec, saved, EVERYTHING)
    return [features, rgb, *(g for g in grads if g is not None)]


@pytest.mark.parametrize("channel_major", [False, True])
def test_the_tile_does_not_matter(monkeypatch, channel_major):
    case = random_stack((16, 24, 12), (0, 1), pixels=53, noise=9, dtype=torch.float64)
    whole = None
    for tile in (53, 1, 7, 32, 52):
        monkeypatch.setattr(cpu_plan, "tile_pixels", lambda spec, dtype, pixels, tile=tile: tile)
        results = everything(case, torch.float64, channel_major)
        whole = whole or results
        for got, want in zip(results, whole):
            torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_every_run(dtype):
    case = random_stack((16, 24, 12), (0, 1), batch=3, pixels=5 * TILE + 3, shared=True, noise=9, dtype=dtype)
    for first, second in zip(everything(case, dtype), everything(case, dtype)):
        assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("widths", [(16, 32, 12, 60), (16, 60, 12, 32)])
def test_an_image_of_nan_leaves_the_others_alone(monkeypatch, widths, dtype):
    # products of fewer rows do not use the kernel that reads past the end of a row
    monkeypatch.setattr(cpu_plan, "tile_pixels", lambda spec, dtype, pixels: 40)
    case = random_stack(widths, (0, 1), batch=2, pixels=85, noise=9, dtype=dtype)
    grads = random_grads(case, dtype)
    poisoned, poisoned_grads = case.x.clone(), [g.clone() for g in grads]
    for tensor in (poisoned, *poisoned_grads):
        tensor[0] = torch.nan
    (features, rgb), (features_nan, rgb_nan) = (
        run_forward(cpu, replace(case, x=x))[1] for x in (case.x, poisoned)
    )
    assert features_nan[0].isnan().all() and rgb_nan[0].isnan().all()
    assert torch.equal(features[1], features_nan[1]) and torch.equal(rgb[1], rgb_nan[1])
    clean, nan = (run_backward(cpu, case, dtype, grads=g)[1] for g in (grads, poisoned_grads))
    assert nan.x[0].isnan().all() and nan.styles[0].isnan().all()
    assert torch.equal(clean.x[1], nan.x[1]) and torch.equal(clean.styles[1], nan.styles[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_are_summed_over_tiles_in_float32(monkeypatch, dtype):
    """Sums of one sign over 256 tiles: in half precision the last tiles would not count."""
    monkeypatch.setattr(cpu_plan, "compute_dtype", lambda dtype: dtype)
    case = random_stack((8, 8, 8), (), batch=1, pixels=256 * TILE, noise="given", dtype=dtype)
    case = case.map(lambda name, t: t.abs())
    grads = torch.rand(1, 256 * TILE, 8, generator=torch.Generator().manual_seed(0)).to(dtype), None
    _, value, exact = run_backward(cpu, case, dtype, grads=grads)
    for name in ("weights", "styles", "biases", "noise_strengths"):
        assert relative_error(getattr(value, name), getattr(exact, name)) < torch.finfo(dtype).eps, name


class LiveBytes(TorchDispatchMode):
    """The peak of bytes that tensors made within, and not views of `given`, hold at one time."""

    def __init__(self, given: Iterable[Tensor | None]) -> None:
        super().__init__()
        self._given = {t.untyped_storage().data_ptr() for t in given if t is not None}
        self._made: list[weakref.ref] = []
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        outs = out if isinstance(out, tuple | list) else [out]
        self._made = [ref for ref in self._made if ref() is not None]
        self._made += [weakref.ref(t) for t in outs if isinstance(t, Tensor)]
        storages = [t.untyped_storage() for ref in self._made if (t := ref()) is not None]
        sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
        self.peak = max(self.peak, sum(size for address, size in sizes.items() if address not in self._given))
        return out


@pytest.mark.parametrize("channel_major", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_memory_of_inference_does_not_grow_with_pixels(monkeypatch, shared, channel_major):
    monkeypatch.setattr(cpu_plan, "_GRAIN", 1)

    def workspace(module, pixels: int) -> int:
        case = random_stack((24, 16, 16, 16), (0, 2), batch=2, pixels=pixels, shared=shared, noise=3)
        inputs, spec = stack_of(case, channel_major)
        with LiveBytes(inputs) as live:
            _, rgb, _ = module.forward(inputs, spec, False, False)
        return live.peak - rgb.untyped_storage().nbytes()

    assert workspace(cpu, 32 * TILE) <= workspace(cpu, 2 * TILE)
    assert workspace(reference, 32 * TILE) > 4 * workspace(reference, 2 * TILE)
