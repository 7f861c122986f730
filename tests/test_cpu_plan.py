"""What the cpu backend chooses for the processor it runs on: the arithmetic of half precision, the size of a tile."""

from __future__ import annotations

import pytest
import torch

from cips_kernels import cpu_plan, functional
from cips_kernels.spec import StackSpec
from cips_kernels.testing import poisoned_empty, random_stack


@pytest.mark.parametrize(
    "capabilities, bfloat16, float16",
    [
        ({}, torch.float32, torch.float32),
        ({"avx512_bf16": False, "amx_fp16": False}, torch.float32, torch.float32),
        ({"avx512_bf16": True, "avx512_fp16": True}, torch.bfloat16, torch.float32),
        ({"amx_bf16": True, "amx_fp16": True}, torch.bfloat16, torch.float16),
        ({"architecture": "aarch64", "bf16": True, "fp16_arith": True}, torch.bfloat16, torch.float32),
    ],
)
def test_half_precision_is_computed_where_the_processor_has_it(monkeypatch, capabilities, bfloat16, float16):
    monkeypatch.setattr(cpu_plan, "processor", lambda: capabilities)
    assert (
        cpu_plan.compute_dtype(torch.bfloat16) == bfloat16
        and cpu_plan.compute_dtype(torch.float16) == float16
    )
    assert (
        cpu_plan.compute_dtype(torch.float32) == torch.float32
        and cpu_plan.compute_dtype(torch.float64) == torch.float64
    )


def test_tiles_fill_the_caches_evenly(monkeypatch):
    monkeypatch.setattr(cpu_plan, "processor", lambda: {"l2_cache_size": 1 << 21})
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    spec = StackSpec((512,) * 4, ())
    tile = cpu_plan.tile_pixels(spec, torch.float32, 10**6)
    assert tile * 512 * 4 == pytest.approx(2 * 2**21, rel=0.02)
    assert cpu_plan.tile_pixels(spec, torch.bfloat16, 10**6) == pytest.approx(2 * tile, rel=0.02)
    for pixels in (1, 5, tile - 1, tile, tile + 1, 5 * tile // 2, 10 * tile + 7):
        size = cpu_plan.tile_pixels(spec, torch.float32, pixels)
        count = -(-pixels // size)
        assert 0 < size <= pixels and size < 1.5 * tile + 1
        assert count * size - pixels < count, "tiles of even size"
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert cpu_plan.tile_pixels(spec, torch.float32, 10**6) == pytest.approx(2 * tile, rel=0.02)
    wide = StackSpec((2048, 2048), ())
    assert cpu_plan.tile_pixels(wide, torch.float64, 10**6) >= 250


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_products_of_full_tiles_read_no_fresh_memory(dtype):
    """Products of this size take oneDNN's blocked path, which reads past its operands; fresh memory is NaN here."""
    case = random_stack((512,) + 3 * (512,), (0, 2), batch=1, pixels=4096, noise=None, dtype=dtype).leaves()
    with poisoned_empty():
        outputs = case.call(functional.modfc_stack, backend="cpu")
        torch.autograd.backward(outputs, [torch.ones_like(out) for out in outputs])
    for name, tensor in case.tensors().items():
        if tensor.grad is not None:
            assert torch.isfinite(tensor.grad).all(), name
