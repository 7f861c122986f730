"""The activations inside a kernel: a leaky ReLU, or a sine with its cosine.

Sums of a layer are tens of radians. For results that are rounded to 16 bits the hardware's sine serves: it takes the
fraction of a turn, and its error, 5e-7 and what rounding the angle to float32 makes, is small beside that rounding. For
float32 half turns are taken off first, and a polynomial serves what is left; the library's sine would keep a table in local
memory for arguments that never come here.
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice

# angles are added to 1.5 * 2^23, which leaves the nearest integer in a float's last bits: no conversion, no rounding
_TO_INTEGER = tl.constexpr(12582912.0)
_HALF_TURNS = tl.constexpr(0.3183098861837907)  # 1 / pi
# pi in three parts of 11, 11 and 24 bits: up to 2^13 half turns the first two are taken off exactly
_PI_HIGH = tl.constexpr(3.140625)
_PI_MIDDLE = tl.constexpr(9.675025939941406e-4)
_PI_LOW = tl.constexpr(1.5099580252808664e-07)
_MOST = tl.constexpr(1.6)  # more than pi / 2


@triton.jit
def _signed(x, sign):
    """`-x` where the first bit of `sign` is set."""
    return (x.to(tl.int32, bitcast=True) ^ sign).to(tl.float32, bitcast=True)


@triton.jit
def sin_cos(y, FAST: tl.constexpr):
    """`sin(y)` and `cos(y)` of a float32 `y`, in float32; what is not used is not computed.

    FAST: by the hardware. Otherwise to 2e-7, and beyond 2^13 half turns to what a rounding or two of `y` make.
    """
    if FAST:
        sin, cos = libdevice.fast_sinf(y), libdevice.fast_cosf(y)
    else:
        shifted = y * _HALF_TURNS + _TO_INTEGER
        k = shifted - _TO_INTEGER
        sign = shifted.to(tl.int32, bitcast=True) << 31  # odd half turns change it
        f = ((y - k * _PI_HIGH) - k * _PI_MIDDLE) - k * _PI_LOW
        # larger only where a float32 no longer knows the fraction of a turn: bounded there, and NaN stays
        f = tl.minimum(f, _MOST, propagate_nan=tl.PropagateNan.ALL)
        f = tl.maximum(f, -_MOST, propagate_nan=tl.PropagateNan.ALL)
        z = f * f
        # minimax over a quarter turn to either side: 5e-9 and 3e-10
        sin = z * (-0.16666657096 + z * (0.0083330172910 + z * (-0.00019806615162 + z * 2.60005468e-6)))
        cos = z * (-0.4999999954955 + z * (0.041666640728 + z * (-0.00138884035 + z * (2.4761886e-5 + z * -2.6077105e-7))))
        sin, cos = _signed(f + f * sin, sign), _signed(1.0 + cos, sign)
    return sin, cos


@triton.jit
def activate(y, channel, evens, negative_slope, gain, ACTIVATION: tl.constexpr, FAST: tl.constexpr):
    """The output of a layer from its sums `y` `[P, C]` float32, whose columns are the channels `channel`.

    ACTIVATION "sinrelu": the first `evens` channels are leaky ReLUs, the others sines (see `order`).
    """
    if ACTIVATION == "lrelu":
        out = tl.where(y > 0, y, negative_slope * y)
    else:
        out, _ = sin_cos(y, FAST)
        if ACTIVATION == "sinrelu":
            out = tl.where((channel < evens)[None, :], tl.where(y > 0, y, negative_slope * y), out)
    return gain * out


@triton.jit
def activate_backward(h, act, channel, evens, negative_slope, gain, ACTIVATION: tl.constexpr, FAST: tl.constexpr):
    """The gradient of a layer's sums from `h`, that of its output; and the output again.

    `act`: what the layer kept, of which a leaky ReLU reads the sign: its output, or, with a sine, its sums.
    """
    if ACTIVATION == "lrelu":
        u, out = tl.where(act > 0, h, negative_slope * h), act
    else:
        y = act.to(tl.float32)
        sin, cos = sin_cos(y, FAST)
        if ACTIVATION == "sinrelu":
            step, slope = (channel < evens)[None, :], tl.where(y > 0, 1.0, negative_slope)
            sin, cos = tl.where(step, slope * y, sin), tl.where(step, slope, cos)
        u, out = h * cos, gain * sin
    return gain * u, out
