"""The CUDA kernels of csrc/, run on the host: the same sources as C++, with threads as fibers (csrc_host/).

What a GPU would compute is checked here without one: index arithmetic, guards at every edge, the order of
barriers and copies (threads take turns in a random order), reproducibility. What only a GPU can show is in
test_cuda_modulate.py.
"""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from kernels_on_host import compiled

EPS = 1e-8
GUARD = 64  # NaN floats around every buffer: read, they spoil a result; written, they are seen
# in_features, out_features of each matrix; batch
CASES = {
    "paper, narrow": ([(64, 32), (32, 32)], [(32, 3)], 3),
    "odd": ([(37, 13), (13, 9)], [(9, 3)], 2),
    "many rows": ([(16, 150)], [], 2),
    "odd together even": ([(30, 8)], [(34, 3)], 2),
    "one": ([(1, 1)], [], 1),
    "one column": ([(1, 20)], [(20, 1)], 5),
    "one tile exactly": ([(512, 8)], [], 4),
    "over a tile": ([(516, 9)], [], 5),
    "wide and odd": ([(1027, 3)], [(3, 3)], 2),
    "no demodulation": ([], [(48, 5), (7, 4)], 9),
}


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    loaded = compiled(tmp_path_factory.mktemp("csrc_host"), "modulate_on_host", "modulate_plan")
    loaded.host_scratch_numel.restype = ctypes.c_int64
    return loaded


class Stack:
    """A packing, random float32 inputs between guards, and the float64 truth."""

    def __init__(self, layers: list, rgbs: list, batch: int, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        shapes, weight, style, mod = [], 0, 0, 0
        for (i, o), demodulate in [(shape, 1) for shape in layers] + [(shape, 0) for shape in rgbs]:
            stride = -(-i // 16) * 16
            shapes.append((o, i, weight, style, mod, stride, demodulate))
            weight, style, mod = weight + o * i, style + i, mod + -(-batch * o * stride // 128) * 128
        self.shapes, self.batch, self.style_width, self.mod_numel = shapes, batch, style, mod
        self.weights = guarded(weight)
        self.styles = guarded(batch * style)
        self.grad_mods = guarded(mod)  # padding columns stay NaN
        self.weights.inner[:] = rng.standard_normal(weight)
        self.styles.inner[:] = 1 + rng.standard_normal(batch * style)
        for shape in shapes:
            self.mod(self.grad_mods.inner, shape)[..., : shape[1]] = rng.standard_normal((batch, *shape[:2]))

    def mod(self, flat: np.ndarray, shape: tuple) -> np.ndarray:
        o, _, _, _, offset, stride, _ = shape
        return flat[offset : offset + self.batch * o * stride].reshape(self.batch, o, stride)

    def truth(self, shape: tuple) -> tuple[np.ndarray, ...]:
        """M, dW and ds of one matrix in float64; then dW and ds if nothing cancelled, the scale of their error."""
        o, i, weight, style, _, _, demodulate = shape
        w = self.weights.inner[weight : weight + o * i].reshape(o, i).astype(np.float64)
        s = self.styles.inner.reshape(self.batch, -1)[:, style : style + i].astype(np.float64)
        n = self.mod(self.grad_mods.inner, shape)[..., :i].astype(np.float64)
        c = 1 / np.sqrt(i)
        v = c * s[:, None, :] * w
        d = (v**2).sum(-1, keepdims=True) + EPS
        d = d**-0.5 if demodulate else np.ones_like(d)
        t = (n * d * v).sum(-1, keepdims=True) if demodulate else 0
        dv = d * (n - d * v * t)
        bound = d * (abs(n) + abs(d * v * t))

        def gradients(w: np.ndarray, s: np.ndarray, dv: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            return c * np.einsum("bj,bij->ij", s, dv), c * np.einsum("ij,bij->bj", w, dv)

        return d * v, *gradients(w, s, dv), *gradients(abs(w), abs(s), bound)

    def shape_array(self) -> ctypes.Array:
        flat = [number for shape in self.shapes for number in shape]
        return (ctypes.c_int64 * len(flat))(*flat)


class guarded:  # noqa: N801
    """Floats between NaN guards, on 16 bytes."""

    def __init__(self, count: int, dtype: type = np.float32) -> None:
        self.all = np.full(count + 2 * GUARD + 16, np.nan, dtype)
        start = GUARD + -(self.all.ctypes.data + GUARD * self.all.itemsize) % 64 // self.all.itemsize
        self.inner = self.all[start : start + count]
        self._start = start

    @property
    def address(self) -> ctypes.c_void_p:
        return ctypes.c_void_p(self.inner.ctypes.data)

    def check_guards(self) -> None:
        outside = np.concatenate([self.all[: self._start], self.all[self._start + len(self.inner) :]])
        assert np.isnan(outside).all(), "written outside the buffer"


def close(value: np.ndarray, truth: np.ndarray, scale: np.ndarray, tolerance: float) -> None:
    error = np.abs(value.astype(np.float64) - truth)
    worst = np.unravel_index(np.nanargmax(np.where(np.isnan(error), np.inf, error / scale)), truth.shape)
    assert error[worst] <= tolerance * scale[worst], f"at {worst}: {value[worst]} instead of {truth[worst]}"


def same_bits(first: np.ndarray, second: np.ndarray) -> None:
    different = np.flatnonzero(first.view(np.uint32) != second.view(np.uint32))
    assert different.size == 0, f"first different element: {different[0]} of {first.size}"


def forward(host: ctypes.CDLL, stack: Stack, aligned: bool, seed: int, dtype: str = "float32") -> guarded:
    """`mods` of `stack`, halves in the first half of the buffer."""
    mods = guarded(stack.mod_numel)
    host.host_modulate_forward(
        stack.shape_array(), len(stack.shapes), stack.batch, stack.weights.address, stack.styles.address,
        ctypes.c_int64(stack.style_width), mods.address, ["float32", "float16", "bfloat16"].index(dtype),
        ctypes.c_float(EPS), aligned and stack.style_width % 4 == 0, seed,
    )  # fmt: skip
    mods.check_guards()
    return mods


def backward(host: ctypes.CDLL, stack: Stack, aligned: bool, seed: int) -> tuple[guarded, guarded]:
    shapes, count = stack.shape_array(), len(stack.shapes)
    scratch = guarded(host.host_scratch_numel(shapes, count, stack.batch))
    grad_weights, grad_styles = guarded(len(stack.weights.inner)), guarded(len(stack.styles.inner))
    stride = ctypes.c_int64(stack.style_width)
    host.host_modulate_backward(
        shapes, count, stack.batch, stack.grad_mods.address, stack.weights.address, stack.styles.address,
        stride, scratch.address, grad_weights.address, grad_styles.address, stride, ctypes.c_float(EPS),
        aligned and stack.style_width % 4 == 0, seed,
    )  # fmt: skip
    for buffer in (scratch, grad_weights, grad_styles):
        buffer.check_guards()
    return grad_weights, grad_styles


def from_bits(bits: np.ndarray, dtype: str) -> np.ndarray:
    """Half-precision numbers, stored as uint16, as float32."""
    if dtype == "bfloat16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    return bits.view(np.float16).astype(np.float32)


@pytest.mark.parametrize("aligned", [False, True], ids=["scalar", "vector"])
@pytest.mark.parametrize("case", CASES)
def test_forward(host: ctypes.CDLL, case: str, aligned: bool) -> None:
    stack = Stack(*CASES[case])
    mods = forward(host, stack, aligned, seed=1)
    for shape in stack.shapes:
        out, truth = stack.mod(mods.inner, shape), stack.truth(shape)[0]
        close(out[..., : shape[1]], truth, abs(truth), 2e-6)
        assert (out[..., shape[1] :] == 0).all(), "padding columns"
    same_bits(forward(host, stack, aligned, seed=2).inner, mods.inner)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("case", ["paper, narrow", "odd", "wide and odd"])
def test_forward_rounds_once(host: ctypes.CDLL, case: str, dtype: str) -> None:
    stack = Stack(*CASES[case])
    mods = forward(host, stack, True, seed=1, dtype=dtype)
    half_unit = {"float16": 2**-11, "bfloat16": 2**-8}[dtype]  # of the power of two below a normal number
    for shape in stack.shapes:
        out, truth = from_bits(stack.mod(mods.inner.view(np.uint16), shape), dtype), stack.truth(shape)[0]
        below = np.exp2(np.frexp(truth)[1] - 1)
        close(out[..., : shape[1]], truth, np.maximum(below, 2**-14), half_unit + 4e-6)
        assert (out[..., shape[1] :] == 0).all(), "padding columns"


@pytest.mark.parametrize("aligned", [False, True], ids=["scalar", "vector"])
@pytest.mark.parametrize("case", CASES)
def test_backward(host: ctypes.CDLL, case: str, aligned: bool) -> None:
    stack = Stack(*CASES[case])
    grad_weights, grad_styles = backward(host, stack, aligned, seed=1)
    for shape in stack.shapes:
        o, i, weight, style, *_ = shape
        _, dw, ds, dw_scale, ds_scale = stack.truth(shape)
        close(grad_weights.inner[weight : weight + o * i].reshape(o, i), dw, dw_scale, 2e-6)
        close(grad_styles.inner.reshape(stack.batch, -1)[:, style : style + i], ds, ds_scale, 2e-6)
    again = backward(host, stack, aligned, seed=2)
    for first, second in zip((grad_weights, grad_styles), again):
        same_bits(first.inner, second.inner)


@pytest.mark.parametrize("case", ["paper, narrow", "over a tile"])
def test_alignment_does_not_change_a_bit(host: ctypes.CDLL, case: str) -> None:
    """Vector and scalar loads bring the same numbers to the same lanes."""
    stack = Stack(*CASES[case])
    pairs = [(forward(host, stack, True, seed=1), forward(host, stack, False, seed=1))]
    pairs += zip(backward(host, stack, True, seed=1), backward(host, stack, False, seed=1))
    for first, second in pairs:
        same_bits(first.inner, second.inner)


def test_padding_stays_zero_beside_nan(host: ctypes.CDLL) -> None:
    """A NaN style spoils its own image alone: no padding, no other image's mods or gradient of the styles."""
    stack = Stack([(37, 13)], [], 2)
    stack.styles.inner[:37] = np.nan
    out = stack.mod(forward(host, stack, True, seed=1).inner, stack.shapes[0])
    assert np.isnan(out[0, :, :37]).all() and np.isfinite(out[1]).all()
    assert (out[..., 37:] == 0).all()
    grad_styles = backward(host, stack, True, seed=1)[1].inner.reshape(2, 37)
    assert np.isnan(grad_styles[0]).all() and np.isfinite(grad_styles[1]).all()
