"""The layer's kernel for GPUs with a tensor copy engine (compute capability 9.0): the same sums as `forward`.

A fixed number of programs walk over all tiles, and the loop over tiles and the loop over channels are one: the loads of
the next tile run while this one's tail is computed. The result leaves in PARTS slices, so that its staging in shared
memory leaves room for four stages of operands.
"""

import triton
import triton.language as tl

from .waves import activate


@triton.jit
def _store(desc, y, image, p0, o0, BLOCK_P: tl.constexpr, BLOCK_O: tl.constexpr, PARTS: tl.constexpr):
    """A tile of one image, rounded, in PARTS slices."""
    out = y.to(desc.dtype)
    if PARTS == 1:
        desc.store([image, p0, o0], out.reshape(1, BLOCK_P, BLOCK_O))
    else:
        HALF: tl.constexpr = BLOCK_O // 2
        low, high = tl.split(tl.permute(tl.reshape(out, (BLOCK_P, 2, HALF)), (0, 2, 1)))
        desc.store([image, p0, o0], low.reshape(1, BLOCK_P, HALF))
        desc.store([image, p0, o0 + HALF], high.reshape(1, BLOCK_P, HALF))


@triton.jit(do_not_specialize=["x_step"])
def modfc_fwd_descriptor_kernel(
    x_desc, x_step, m_desc, out_desc, sums_desc,
    bias_ptr, strength_ptr, noise_ptr, stride_noise_b,
    rgb_m_ptr, stride_rb, stride_rc, rgb_part_ptr,
    batch, pixels, in_features, out_features, evens, negative_slope, gain, programs,
    NOISE: tl.constexpr, CHANNELS: tl.constexpr, STORE: tl.constexpr, SUMS: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """`x_step` is 0 where all images share one input, 1 otherwise; `CHANNELS` is 0 where no ToRGB reads. SUMS: as in `forward`."""
    tiles_o = tl.cdiv(out_features, BLOCK_O)
    tiles_p = tl.cdiv(pixels, BLOCK_P)
    for tile in tl.range(tl.program_id(0), tiles_o * tiles_p * batch, programs, flatten=True):
        tile_o = tile % tiles_o
        tile_p = (tile // tiles_o) % tiles_p
        image = tile // (tiles_o * tiles_p)
        p0, o0 = tile_p * BLOCK_P, tile_o * BLOCK_O
        offs_p = p0.to(tl.int64) + tl.arange(0, BLOCK_P)
        inside_p = offs_p < pixels
        if NOISE:  # asked for before the sum, so that it is there after it
            n = tl.load(noise_ptr + image.to(tl.int64) * stride_noise_b + offs_p, mask=inside_p, other=0.0)
            noise = tl.load(strength_ptr) * n
        acc = tl.zeros((BLOCK_P, BLOCK_O), dtype=tl.float32)
        for k in range(0, in_features, BLOCK_I):
            a = x_desc.load([image * x_step, p0, k]).reshape(BLOCK_P, BLOCK_I)
            b = m_desc.load([image, o0, k]).reshape(BLOCK_O, BLOCK_I)
            acc = tl.dot(a, b.T, acc)

        offs_o = o0 + tl.arange(0, BLOCK_O)
        inside_o = offs_o < out_features
        y = acc + tl.load(bias_ptr + offs_o, mask=inside_o, other=0.0)[None, :]
        if NOISE:
            y += noise[:, None]
        if SUMS:
            _store(sums_desc, y, image, p0, o0, BLOCK_P, BLOCK_O, PARTS)
        y = activate(y, offs_o, evens, negative_slope, gain, ACTIVATION, True)
        if CHANNELS > 0:
            part = rgb_part_ptr + ((tile_o.to(tl.int64) * batch + image) * pixels + offs_p) * CHANNELS
            r_row = rgb_m_ptr + image.to(tl.int64) * stride_rb + offs_o
            for c in tl.static_range(CHANNELS):
                r = tl.load(r_row + c * stride_rc, mask=inside_o, other=0.0).to(tl.float32)
                share = tl.sum(y * r[None, :], axis=1)
                tl.store(part + c, share, mask=inside_p)
        if STORE:
            _store(out_desc, y, image, p0, o0, BLOCK_P, BLOCK_O, PARTS)
