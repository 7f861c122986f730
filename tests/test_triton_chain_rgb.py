"""The weight gradients of every ToRGB in one launch: whole numbers, whose sums are exact, so that every bit is known."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="this machine has no triton")

from cips_kernels import cuda_saved, cuda_training
from cips_kernels.spec import StackSpec
from cips_kernels.testing import poisoned_empty
from cips_kernels.triton import config, layers
from cips_kernels.triton.config import StreamTile
from cips_kernels.triton.fragment import to_natural

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
# reads in small steps, so that small calls have many of them and many splits
SMALL = StreamTile(2, 64, 1, 16)

STACKS = {
    # widths of the layers, the layer that each ToRGB reads
    "one": ((64,), (0,)),
    "every other": ((96, 32, 64, 160, 96), (0, 2, 4)),
    "two after one, out of order": ((32, 288, 64), (2, 1, 1)),
}


def whole_numbers(*shape: int, seed: int) -> torch.Tensor:
    """Float64 of -4 to 4: products and sums over a few thousand are exact in float32."""
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(seed)).double()


def make(stack: str, batch: int, pixels: int, channels: int) -> tuple:
    """A stack's outputs, the colours' gradients, and the matrices they make, in float64."""
    widths, rgb_after = STACKS[stack]
    spec = StackSpec((16, *widths), rgb_after, channels)
    outputs = [whole_numbers(batch, pixels, width, seed=layer) for layer, width in enumerate(widths)]
    drgb = whole_numbers(batch, pixels, channels, seed=99)
    truth = [0.375 * torch.einsum("bpc,bpi->bci", drgb, outputs[layer]) for layer in rgb_after]
    return spec, outputs, drgb, truth


def in_memory(outputs: list[torch.Tensor]) -> torch.Tensor:
    """Every layer's output as the forward leaves it: in fragment order, one after the other."""
    return torch.cat([to_natural(t).reshape(-1) for t in outputs]).to(DEVICE, torch.float16)


def table_of(spec: StackSpec, batch: int) -> torch.Tensor:
    """Channels before the layer that each ToRGB reads, its width, where its matrix begins, and the row stride."""
    rows = [
        (sum(spec.widths[1 : after + 1]), spec.widths[after + 1], matrix.mod_offset, matrix.row_stride)
        for after, matrix in zip(spec.rgb_after, spec.packing(batch).rgbs)
    ]
    return torch.tensor(rows, device=DEVICE)


def check(spec: StackSpec, batch: int, out: torch.Tensor, truth: list[torch.Tensor]) -> None:
    """Every bit of the matrices, and nothing but them in `out`, which was NaN."""
    packing = spec.packing(batch)
    for matrix, expected in zip(packing.rgbs, truth, strict=True):
        assert torch.equal(packing.mod(out, matrix).double().cpu(), expected)
    assert int(out.isnan().sum()) == out.numel() - sum(t.numel() for t in truth)


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("tile", [SMALL, None], ids=["small steps", "as chosen"])
@pytest.mark.parametrize(("batch", "pixels", "channels"), [(1, 1, 3), (3, 131, 3), (2, 64, 1), (1, 333, 2)])
def test_every_matrix_in_one_launch(stack, tile, batch, pixels, channels):
    spec, outputs, drgb, truth = make(stack, batch, pixels, channels)
    table = table_of(spec, batch)
    out = torch.full((spec.packing(batch).mod_numel,), float("nan"), device=DEVICE)
    widest = max(outputs[layer].shape[2] for layer in spec.rgb_after)
    with poisoned_empty():
        layers.rgb_wgrad_chain(
            drgb.to(DEVICE, torch.float32), in_memory(outputs), table, widest, out, 0.375, tile
        )
    check(spec, batch, out, truth)


def test_what_no_torgb_reads_is_not_touched():
    """It is NaN. Colours' gradients may be of half precision."""
    spec, outputs, drgb, truth = make("every other", 2, 77, 3)
    x = in_memory([t if i in spec.rgb_after else t * float("nan") for i, t in enumerate(outputs)])
    out = torch.full((spec.packing(2).mod_numel,), float("nan"), device=DEVICE)
    table = table_of(spec, 2)
    layers.rgb_wgrad_chain(drgb.to(DEVICE, torch.float16), x, table, 96, out, 0.375, SMALL)
    check(spec, 2, out, truth)


@pytest.mark.parametrize("stack", STACKS)
def test_a_training_call_reads_the_last_output_alone(stack):
    """Of ToRGBs that read it, where `activations` has it: weight gradients bring the others' along."""
    widths, rgb_after = STACKS[stack]
    spec, batch, pixels = StackSpec((16, *widths), rgb_after), 2, 5
    saved = cuda_saved.empty_saved(torch.empty((batch, pixels, 16), dtype=torch.bfloat16), spec, batch)
    last = cuda_saved.activations(saved, spec, batch, pixels)[-1]
    table = cuda_training._rgb_table(spec, batch, torch.device("cpu"))
    assert table.dtype == torch.int64
    packing = spec.packing(batch)
    readers = [matrix for after, matrix in zip(rgb_after, packing.rgbs) if after == len(widths) - 1]
    assert readers and len(readers) == len(table)
    for (before, width, offset, row), matrix in zip(table.tolist(), readers):
        assert last.shape == (batch, pixels, width)
        assert last.storage_offset() == before * batch * pixels
        assert (offset, row) == (matrix.mod_offset, matrix.row_stride)


@pytest.mark.parametrize("sums", [1, 14, 224, 1792, 3000])
@pytest.mark.parametrize("pixels", [1, 127, 4096, 65536, 1 << 22])
def test_waves_are_whole_where_there_is_a_choice(sums, pixels):
    """At most 15 % more than an even deal to every slot, of calls that are large enough to be dealt."""
    tile, device = config.rgb_chain_tile(), torch.device(DEVICE)
    slots = tile.programs * config.device_limits(device)[2]
    splits = config.rgb_chain_splits(sums, pixels, tile, device)
    assert 1 <= splits <= max(1, pixels // (16 * tile.rows))
    if sums * pixels >= slots * 4096:
        assert -(-sums * splits // slots) * -(-pixels // splits) <= 1.15 * sums * pixels / slots


def test_what_does_not_fit_is_refused():
    drgb, x = torch.zeros(2, 8, 3), torch.zeros(2 * 8 * 64)
    table, out = torch.tensor([[0, 64, 0, 64]]), torch.zeros(2 * 3 * 64)
    for match, wrong in {
        "drgb has 4 channels, expected 1 to 3": dict(drgb=torch.zeros(2, 8, 4)),
        r"drgb has strides \(24, 1, 8\)": dict(drgb=drgb.mT.contiguous().mT),
        r"table is torch.int32 \(1, 4\)": dict(table=table.int()),
        r"table is torch.int64 \(1, 3\)": dict(table=table[:, :3]),
        "expected at least 1024 elements": dict(x=x[1:]),
        "x has shape .*, flat": dict(x=x.view(2, -1)),
        "out is torch.float64": dict(out=out.double()),
        "x has 48 channels, expected a multiple of 32": dict(widest=48),
    }.items():
        arguments = {"drgb": drgb, "x": x, "table": table, "widest": 64, "out": out, **wrong}
        with pytest.raises(ValueError, match=match):
            layers.rgb_wgrad_chain(**arguments)
