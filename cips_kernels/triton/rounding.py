"""Rounding of operands and of sums."""

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


@triton.jit
def add_product(a, b, acc, PRECISION: tl.constexpr):
    """`acc + a b`. In float32 a tile's product is summed by itself first: added one by one to sums that grow, 512 products have
    twice the error of eager PyTorch's. The limit on imprecise sums, which means nothing in float32, keeps the compiler from
    making one chain of them again."""
    if PRECISION == "ieee" and a.dtype == tl.float32:
        return acc + tl.dot(a, b, input_precision=PRECISION, max_num_imprecise_acc=16)
    return tl.dot(a, b, acc, input_precision=PRECISION)
