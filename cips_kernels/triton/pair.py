"""Two modulated layers and the ToRGB that reads the second, in one kernel: what lies between them is never in memory.

A program owns BLOCK_P pixels of one image with all their channels. The input is read once; a slice of the first layer's
output at a time is computed, rounded as the chain rounds it, and multiplied into the second layer's sums, which stay in
registers. It needs the copy engine (compute capability 9.0), as `descriptor_forward` does.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["x_step"])
def modfc_pair_fwd_kernel(
    x_desc, x_step, m1_desc, m2_desc, out_desc,
    bias1_ptr, bias2_ptr, strength1_ptr, strength2_ptr, noise1_ptr, noise2_ptr, stride_noise_b,
    rgb_m_ptr, stride_rb, stride_rc, rgb_part_ptr,
    pixels, middle_features, out_features, negative_slope, gain,
    NOISE: tl.constexpr, CHANNELS: tl.constexpr, STORE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_O: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """`x_step` is 0 where all images share one input, 1 otherwise; `CHANNELS` is 0 where no ToRGB reads. BLOCK_I and
    BLOCK_O hold all channels of the input and of the output; what a block has beyond them reads as zero."""
    tiles_p = tl.cdiv(pixels, BLOCK_P)
    image = tl.program_id(0) // tiles_p
    p0 = (tl.program_id(0) % tiles_p) * BLOCK_P
    offs_p = p0.to(tl.int64) + tl.arange(0, BLOCK_P)
    inside_p = offs_p < pixels
    offs_h = tl.arange(0, BLOCK_H)
    noise_row = image.to(tl.int64) * stride_noise_b + offs_p

    x = x_desc.load([image * x_step, p0, 0]).reshape(BLOCK_P, BLOCK_I)
    if NOISE:
        noise1 = tl.load(strength1_ptr) * tl.load(noise1_ptr + noise_row, mask=inside_p, other=0.0)
    acc = tl.zeros((BLOCK_P, BLOCK_O), dtype=tl.float32)
    for h0 in range(0, middle_features, BLOCK_H):
        m1 = m1_desc.load([image, h0, 0]).reshape(BLOCK_H, BLOCK_I)
        h = tl.dot(x, m1.T)
        h += tl.load(bias1_ptr + h0 + offs_h, mask=h0 + offs_h < middle_features, other=0.0)[None, :]
        if NOISE:
            h += noise1[:, None]
        h = gain * tl.where(h > 0, h, negative_slope * h)
        # beyond the middle's width h is not zero, but the second layer's matrix reads as zero there
        m2 = m2_desc.load([image, 0, h0]).reshape(BLOCK_O, BLOCK_H)
        acc = tl.dot(h.to(x.dtype), m2.T, acc)

    offs_o = tl.arange(0, BLOCK_O)
    inside_o = offs_o < out_features
    y = acc + tl.load(bias2_ptr + offs_o, mask=inside_o, other=0.0)[None, :]
    if NOISE:  # asked for late: no register holds it during the sum
        y += (tl.load(strength2_ptr) * tl.load(noise2_ptr + noise_row, mask=inside_p, other=0.0))[:, None]
    y = gain * tl.where(y > 0, y, negative_slope * y)
    if CHANNELS > 0:
        part = rgb_part_ptr + (image.to(tl.int64) * pixels + offs_p) * CHANNELS
        r_row = rgb_m_ptr + image.to(tl.int64) * stride_rb + offs_o
        for c in tl.static_range(CHANNELS):
            r = tl.load(r_row + c * stride_rc, mask=inside_o, other=0.0).to(tl.float32)
            tl.store(part + c, tl.sum(y * r[None, :], axis=1), mask=inside_p)
    if STORE:
        out = y.to(out_desc.dtype)
        if PARTS == 1:
            out_desc.store([image, p0, 0], out.reshape(1, BLOCK_P, BLOCK_O))
        else:
            HALF: tl.constexpr = BLOCK_O // 2
            low, high = tl.split(tl.permute(tl.reshape(out, (BLOCK_P, 2, HALF)), (0, 2, 1)))
            out_desc.store([image, p0, 0], low.reshape(1, BLOCK_P, HALF))
            out_desc.store([image, p0, HALF], high.reshape(1, BLOCK_P, HALF))
