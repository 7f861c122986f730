"""The packing of the chain of gradients on the host (csrc_host/): where every transposed weight and colour lies, against numpy."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from kernels_on_host import bfloat16, compiled

EPS, GAIN, BATCH = 1e-8, 1.3, 3
SLAB, CHUNK = 64, 128  # rows of the forward's matrix in a slab, and its columns in a chunk
STACKS = {
    "odd": (70, 190, 300, 16),
    "full": (64, 512, 512),
    "narrow": (16, 32, 40, 8),
}


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return compiled(tmp_path_factory.mktemp("chain_pack"), "chain_pack_on_host", "stack_plan")


class Packed:
    """Random tensors and what the kernel made of them; NaN wherever it wrote nothing."""

    def __init__(self, host: ctypes.CDLL, widths: tuple[int, ...], demodulate: bool) -> None:
        rng = np.random.default_rng(0)
        pairs = list(zip(widths, widths[1:]))
        self.matrices = [rng.standard_normal((o, i)).astype(np.float32) for i, o in pairs]
        self.rgb = rng.standard_normal((3, widths[-1])).astype(np.float32)
        self.styles = [1 + rng.standard_normal((BATCH, i)).astype(np.float32) for i in widths]
        weights = np.concatenate([m.ravel() for m in (*self.matrices, self.rgb)])
        styles = np.ascontiguousarray(np.concatenate(self.styles, -1))
        shape, sizes = (ctypes.c_int64 * len(widths))(*widths), (ctypes.c_int64 * (2 + len(pairs)))()
        arguments = (shape, len(pairs), ctypes.c_int64(BATCH))
        host.host_chain_sizes(*arguments, sizes)
        self.slabs = np.full((BATCH, sizes[0]), 0xFF, np.uint8)
        self.records = np.full((BATCH, sizes[1]), 0xFF, np.uint8)
        # of the chain, whose layers go backwards
        self.offsets = list(sizes[2:])[::-1]
        buffers = [a.ctypes.data_as(ctypes.c_void_p) for a in (weights, styles, self.slabs, self.records)]
        host.host_chain_pack(*arguments, *buffers, ctypes.c_float(GAIN), int(demodulate), 1)

    def slab(self, image: int, layer: int, chunk: int, slab: int, slabs: int) -> np.ndarray:
        """`[128 columns, 64 rows]` of the forward's matrix of layer + 1: 128 bytes a column, its 16-byte units exchanged."""
        at = self.offsets[layer] + (chunk * slabs + slab) * CHUNK * 128
        lines = self.slabs[image, at : at + CHUNK * 128].reshape(CHUNK, 8, 16)
        lines = np.stack([lines[j, np.arange(8) ^ j % 8] for j in range(CHUNK)])
        return bfloat16(np.ascontiguousarray(lines).reshape(CHUNK, 128))


@pytest.mark.parametrize("demodulate", [True, False])
@pytest.mark.parametrize("stack", STACKS)
def test_every_weight_lies_where_its_product_reads_it(host: ctypes.CDLL, stack: str, demodulate: bool) -> None:
    """g d_i c W_ij s_j, demodulated by the row; zeros in what only pads."""
    packed = Packed(host, STACKS[stack], demodulate)
    assert not np.isnan(bfloat16(packed.slabs.ravel())).any()
    for image in range(BATCH):
        for layer, matrix in enumerate(packed.matrices[1:]):
            rows, columns = matrix.shape
            modulated = matrix.astype(np.float64) * packed.styles[layer + 1][image] / np.sqrt(columns)
            if demodulate:
                modulated /= np.sqrt((modulated**2).sum(1, keepdims=True) + EPS)
            slabs, chunks = -(-rows // SLAB), -(-columns // CHUNK)
            whole = np.zeros((CHUNK * chunks, SLAB * slabs))
            whole[:columns, :rows] = GAIN * modulated.T
            for chunk in range(chunks):
                for slab in range(slabs):
                    found = packed.slab(image, layer, chunk, slab, slabs)
                    expected = whole[CHUNK * chunk :, SLAB * slab :][:CHUNK, :SLAB]
                    np.testing.assert_allclose(found, expected, rtol=2**-8, atol=1e-30)


@pytest.mark.parametrize("stack", STACKS)
def test_colours(host: ctypes.CDLL, stack: str) -> None:
    """Of each channel the three modulated weights, twice, side by side."""
    packed = Packed(host, STACKS[stack], True)
    width = packed.rgb.shape[1]
    for image in range(BATCH):
        found = bfloat16(packed.records[image]).reshape(-1, 8)
        expected = np.zeros((len(found), 8))
        expected[:width, :6] = np.tile((packed.rgb * packed.styles[-1][image] / np.sqrt(width)).T, 2)
        np.testing.assert_allclose(found, expected, rtol=2**-8, atol=1e-30)
