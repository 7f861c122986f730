"""Counter noise inside a kernel: the words and the transform of `cips_kernels.noise`."""

import triton
import triton.language as tl


@triton.jit
def cos_turns(t):
    """`cos(2 pi t)` for t in [0, 1): quarter turns taken off exactly, then a polynomial. The library's cosine keeps a
    table in local memory for arguments that never come here."""
    quarter = tl.floor(4.0 * t + 0.5)
    f = (t - 0.25 * quarter) * 6.283185307179586
    z = f * f
    cos = 1.0 + z * (-0.5 + z * (4.16666418e-2 + z * (-1.38873162e-3 + z * 2.44331571e-5)))
    sin = f * (1.0 + z * (-1.66666546e-1 + z * (8.33216087e-3 + z * -1.95152959e-4)))
    q = quarter.to(tl.int32) & 3
    value = tl.where((q & 1) == 0, cos, sin)
    return tl.where((q == 1) | (q == 2), -value, value)


@triton.jit
def counter_noise(seed, c0, c1, image, layer):
    """Standard normal values for uint32 counter words `c0`, `c1` (tensors) and int32 scalars `image`, `layer`."""
    c2 = tl.zeros_like(c0) + image.to(tl.uint32)
    c3 = tl.zeros_like(c0) + layer.to(tl.uint32)
    r0, r1, _, _ = tl.philox(seed, c0, c1, c2, c3)
    u = ((r0 >> 8).to(tl.float32) + 0.5) * 5.9604644775390625e-08
    return tl.sqrt(-2.0 * tl.log(u)) * cos_turns((r1 >> 8).to(tl.float32) * 5.9604644775390625e-08)


@triton.jit
def _noise_of(
    offs_p, inside, image, layer, seed_ptr, coords_ptr, stride_coords_b, first_pixel, first_layer, first_image,
    COORDS: tl.constexpr,
):  # fmt: skip
    """Noise of some pixels of one image at one layer."""
    if COORDS:
        point = coords_ptr + image.to(tl.int64) * stride_coords_b + 2 * offs_p
        # adding +0.0 turns -0.0 into +0.0: one point, one noise
        c0 = (tl.load(point, mask=inside, other=0.0) + 0.0).to(tl.uint32, bitcast=True)
        c1 = (tl.load(point + 1, mask=inside, other=0.0) + 0.0).to(tl.uint32, bitcast=True)
    else:
        index = offs_p + first_pixel
        c0 = (index & 0xFFFFFFFF).to(tl.uint32)
        c1 = (index >> 32).to(tl.uint32)
    return counter_noise(tl.load(seed_ptr), c0, c1, image + first_image, layer + first_layer)


@triton.jit(do_not_specialize=["first_layer", "first_pixel", "first_image"])
def counter_noise_kernel(
    out_ptr, seed_ptr, coords_ptr, stride_coords_b, batch, pixels, first_pixel, first_layer, first_image,
    COORDS: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Noise of every layer, `[L, B, P]` float32: program (pixels of one image, layer).

    The layers' kernels would wait for these hundred dependent instructions in every tail (12% of a forward pass); here
    they cost half a percent of it, and four bytes a pixel and layer while the call lasts.
    """
    tiles_p = tl.cdiv(pixels, BLOCK_P)
    image, layer = tl.program_id(0) // tiles_p, tl.program_id(1)
    offs_p = (tl.program_id(0) % tiles_p).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = offs_p < pixels
    n = _noise_of(
        offs_p, inside, image, layer, seed_ptr, coords_ptr, stride_coords_b, first_pixel, first_layer, first_image, COORDS
    )
    tl.store(out_ptr + (layer.to(tl.int64) * batch + image) * pixels + offs_p, n, mask=inside)


@triton.jit(do_not_specialize=["first_layer"])
def counter_strength_kernel(
    part_ptr, rows_ptr, seed_ptr, coords_ptr, stride_coords_b, batch, pixels, first_layer,
    COORDS: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Parts `[L, programs]` of `sum_p n_p rows_p`, the noise drawn anew: it is not written and read again."""
    tiles_p = tl.cdiv(pixels, BLOCK_P)
    image, layer = tl.program_id(0) // tiles_p, tl.program_id(1)
    offs_p = (tl.program_id(0) % tiles_p).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = offs_p < pixels
    rows = tl.load(rows_ptr + (layer.to(tl.int64) * batch + image) * pixels + offs_p, mask=inside, other=0.0)
    n = _noise_of(offs_p, inside, image, layer, seed_ptr, coords_ptr, stride_coords_b, 0, first_layer, 0, COORDS)
    part = part_ptr + layer * tl.num_programs(0) + tl.program_id(0)
    tl.store(part, tl.sum(tl.where(inside, n * rows, 0.0), axis=0))
