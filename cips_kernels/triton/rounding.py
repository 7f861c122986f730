"""Rounding of operands."""

import triton
import triton.language as tl


@triton.jit
def operand(x, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """`x` as a product should see it.

    The matrix units cut float32 to TF32's ten bits; cuBLAS rounds first, which has a third of the error. So do we, half
    away from zero. Under UPCAST half precision is widened.
    """
    if UPCAST:
        return x.to(tl.float32)
    if PRECISION == "tf32":
        return ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return x
