"""The packing of blends on the host (csrc_host/): where every weight and form lies in slabs and records, against numpy."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from kernels_on_host import bfloat16, compiled

EPS = 1e-8
FOLD = 1.1
SLAB, HALF = 64, 64  # inputs of a slab, outputs of a half
RECORD = 2 * HALF * 16 + 4 * HALF + 16 + 4 * HALF + 16 * HALF  # forms, bias, strength, styles, ToRGB
# widths, inputs of layer 0 that registers hold
STACKS = {
    "odd numbers of slabs": ((70, 190, 300, 16), 70),
    "full": ((64, 512, 512), 64),
    "streamed": ((598, 130, 20), 512),
    "whole rows of 16 bytes": ((60, 132, 200, 20), 60),
    "narrow": ((16, 16, 40), 16),
}


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return compiled(tmp_path_factory.mktemp("blend_pack"), "blend_pack_on_host", "stack_plan")


def unswizzled(raw: np.ndarray) -> np.ndarray:
    """`[64 outputs, 64 inputs]` of a half slab: 128 bytes an output, its 16-byte units exchanged by the output's number."""
    lines = raw.reshape(HALF, 8, 16)
    lines = np.stack([lines[row, np.arange(8) ^ row % 8] for row in range(HALF)])
    return bfloat16(np.ascontiguousarray(lines).reshape(HALF, 128))


def held_order() -> np.ndarray:
    """Channel of each place along K of a slab that registers hold: place 16 s + 8 h + 2 t + e is channel 16 t + 4 s + 2 h + e."""
    s, h, t, e = np.meshgrid(range(4), range(2), range(4), range(2), indexing="ij")
    return (16 * t + 4 * s + 2 * h + e).ravel()


class Packed:
    """Random tensors and what the kernel made of them; NaN wherever it wrote nothing."""

    def __init__(self, host: ctypes.CDLL, widths: tuple[int, ...], held: int, batch: int = 3) -> None:
        rng = np.random.default_rng(0)
        self.widths, self.held, self.batch, self.depth = widths, held, batch, len(widths) - 1
        pairs = list(zip(widths, widths[1:]))
        self.matrices = [rng.standard_normal((o, i)).astype(np.float32) for i, o in pairs]
        self.rgb = rng.standard_normal((3, widths[-1])).astype(np.float32)
        self.styles = [1 + rng.standard_normal((batch, 2, i)).astype(np.float32) for i in widths]
        self.biases = [rng.standard_normal(o).astype(np.float32) for _, o in pairs]
        self.strengths = strengths = rng.standard_normal(self.depth).astype(np.float32)
        weights = np.concatenate([m.ravel() for m in (*self.matrices, self.rgb)])
        styles = np.ascontiguousarray(np.concatenate(self.styles, -1))
        biases = np.concatenate([*self.biases, np.zeros(3, np.float32)])
        shape = (ctypes.c_int64 * len(widths))(*widths)
        sizes = (ctypes.c_int64 * (2 + self.depth))()
        arguments = (shape, self.depth, ctypes.c_int64(held), ctypes.c_int64(batch))
        host.host_blend_sizes(*arguments, sizes)
        self.slabs = np.full(sizes[0], 0xFF, np.uint8)
        self.records = np.full((batch, sizes[1]), 0xFF, np.uint8)
        self.offsets = list(sizes[2:])
        self.row_styles = np.full((batch, 2, -(-(widths[0] - held) // 8) * 8), 0xFFFF, np.uint16)
        rgb_bias = np.zeros(3, np.float32)
        arrays = (weights, styles, biases, strengths, self.slabs, self.records, self.row_styles, rgb_bias)
        buffers = [a.ctypes.data_as(ctypes.c_void_p) for a in arrays]
        host.host_blend_pack(*arguments, *buffers, ctypes.c_float(FOLD), 1)

    def record(self, image: int, index: int, half: int) -> np.ndarray:
        first = sum(2 * -(-o // 128) for o in self.widths[1 : index + 1])
        return self.records[image].reshape(-1, RECORD)[first + half]

    def half_slab(self, index: int, chunk: int, half: int, order: int) -> np.ndarray:
        """Slab number `order` of a half, as it travels."""
        slabs = -(-min(self.widths[0], self.held) // SLAB) + -(-(self.widths[0] - self.held) // SLAB) if index == 0 else -(-self.widths[index] // SLAB)
        if index == 0:  # a whole slab a slot, its halves one after the other
            at = 2 * (chunk * slabs + order) + half
        else:
            at = 2 * (chunk * 2 * -(-slabs // 2) + half * -(-slabs // 2)) + order
        start = self.offsets[index] + at * HALF * 128
        return unswizzled(self.slabs[start : start + HALF * 128])


@pytest.mark.parametrize("stack", STACKS)
def test_every_weight_lies_where_its_product_reads_it(host: ctypes.CDLL, stack: str) -> None:
    packed = Packed(host, *STACKS[stack])
    assert not np.isnan(bfloat16(packed.slabs)).any(), "what fills a slot travels too"
    for index, matrix in enumerate(packed.matrices):
        outputs, inputs = matrix.shape
        scaled = matrix / np.sqrt(inputs) * (FOLD if index else 1.0)
        held = packed.held if index == 0 else inputs
        parts = [(True, first, min(SLAB, held - first)) for first in range(0, held, SLAB)]
        streamed = [(False, first, min(SLAB, inputs - first)) for first in range(held, inputs, SLAB)]
        # a streamed slab, then one in registers, as long as there are both
        order = [part for pair in zip(streamed, parts) for part in pair] + parts[len(streamed) :] + streamed[len(parts) :]
        for chunk in range(-(-outputs // 128)):
            for half in range(2):
                rows = scaled[128 * chunk + HALF * half :][:HALF]
                for number, (in_registers, first, count) in enumerate(order):
                    expected = np.zeros((HALF, SLAB))
                    expected[: len(rows), :count] = rows[:, first : first + count]
                    if index == 0 and in_registers:
                        expected = expected[:, held_order()]
                    found = packed.half_slab(index, chunk, half, number)
                    np.testing.assert_allclose(found, expected, rtol=2**-8, atol=1e-30)


def test_styles_of_the_streamed_channels(host: ctypes.CDLL) -> None:
    """Rounded, in rows of whole 16 bytes."""
    packed = Packed(host, *STACKS["streamed"])
    rows = bfloat16(packed.row_styles)
    expected = packed.styles[0][:, :, packed.held :]
    assert rows.shape == (packed.batch, 2, 88) and expected.shape == (packed.batch, 2, 86)
    np.testing.assert_allclose(rows[..., :86], expected, rtol=2**-8)
    assert not rows[..., 86:].any()


@pytest.mark.parametrize("stack", STACKS)
def test_forms_of_the_demodulation(host: ctypes.CDLL, stack: str) -> None:
    """q_kl = sum_j W_ij^2 s_kj s_lj / I, twice it where k < l, and the bias, in the order of each layer's records."""
    packed = Packed(host, *STACKS[stack])
    for image in range(packed.batch):
        for index, matrix in enumerate(packed.matrices):
            outputs, inputs = matrix.shape
            squares = matrix.astype(np.float64) ** 2 / inputs
            s = packed.styles[index][image].astype(np.float64)
            exact = np.stack([squares @ (s[0] * s[0]), 2 * squares @ (s[0] * s[1]), squares @ (s[1] * s[1])], -1)
            for half in range(2 * -(-outputs // 128)):
                record = packed.record(image, index, half)
                rows = slice(HALF * half, min(outputs, HALF * (half + 1)))
                count = max(0, rows.stop - rows.start)
                # thread t of a quad holds 16 q + 2 t, + 1 and both + 8
                channel = np.array([16 * q + 2 * t + 8 * (j // 2) + j % 2 for q in range(4) for t in range(4) for j in range(4)])
                columns = bfloat16(record[: 32 * HALF]).reshape(2, HALF, 8)
                assert (columns[..., 0:6:2] == columns[..., 1:6:2]).all(), "both parts of f meet the same q"
                forms = columns[..., 0:6:2].sum(0)
                eps = columns[..., 6].sum(0)
                np.testing.assert_allclose(eps[:count], EPS, rtol=2**-15)
                assert (eps[count:] == 1).all(), "a channel that does not exist is divided by a finite number"
                bias = np.empty(HALF)
                bias[channel] = record[32 * HALF : 36 * HALF].view(np.float32)
                np.testing.assert_allclose(forms[:count], exact[rows], rtol=2**-15, atol=2**-15 * np.abs(exact).max())
                np.testing.assert_array_equal(bias[:count], packed.biases[index][rows])
                assert not forms[count:].any()
                assert not bias[count:].any()


@pytest.mark.parametrize("stack", STACKS)
def test_what_a_half_needs_besides(host: ctypes.CDLL, stack: str) -> None:
    """The noise's strength, the next layer's styles as a thread reads them, and each style's ToRGB by its columns."""
    packed = Packed(host, *STACKS[stack])
    # thread t of a quad has channels 2 t, + 1, + 8 and + 9 of every 16, first of one style and then of the other
    channel = np.array([[[16 * q + 2 * t + c for c in (0, 1, 8, 9)] for t in range(4)] for q in range(4)])
    for image in range(packed.batch):
        for index, matrix in enumerate(packed.matrices):
            outputs, last = matrix.shape[0], index + 1 == packed.depth
            for half in range(2 * -(-outputs // 128)):
                first, count = HALF * half, max(0, min(HALF, outputs - HALF * half))
                strength, styles, colours = np.split(packed.record(image, index, half)[36 * HALF :], [16, 16 + 4 * HALF])
                np.testing.assert_array_equal(strength.view(np.float32), [packed.strengths[index], 0, 0, 0])
                following = np.zeros((2, HALF))
                if not last:
                    following[:, :count] = packed.styles[index + 1][image][:, first : first + count]
                found = bfloat16(styles).reshape(4, 4, 2, 4)
                np.testing.assert_allclose(found, following[:, channel].transpose(1, 2, 0, 3), rtol=2**-8)
                expected = np.zeros((2, 4, HALF))
                if last:
                    rgb = packed.rgb[:, first : first + count] * FOLD / np.sqrt(outputs)
                    expected[:, :3, :count] = rgb * packed.styles[-1][image][:, None, first : first + count]
                found = bfloat16(colours).reshape(HALF // 8, 8, 8).transpose(1, 0, 2).reshape(2, 4, HALF)
                np.testing.assert_allclose(found, expected, rtol=2**-7, atol=1e-30)
