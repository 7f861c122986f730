"""The chain's kernel for GPUs with a tensor copy engine (compute capability 9.0): the same sums as `dgrad`."""

import triton
import triton.language as tl

from .rgb import add_rgb_grad
from .waves import activate_backward


@triton.jit
def _slice(
    h, act_desc, out_desc, made_desc, image, p0, i0, tile, offs_p, inside_p, drgb_ptr, rgb_m_ptr, stride_rb, stride_rc,
    bias_part_ptr, pixels, in_features, evens, negative_slope, gain, rows,
    CHANNELS: tl.constexpr, PARTS: tl.constexpr, MADE: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_P: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """WIDTH channels of the tail; returns `rows` with these channels' sums of `u` added."""
    offs_i = i0 + tl.arange(0, WIDTH)
    inside_i = offs_i < in_features
    h = add_rgb_grad(
        h, drgb_ptr, pixels * CHANNELS, CHANNELS, 1, rgb_m_ptr, stride_rb, stride_rc,
        image, offs_p, offs_i, inside_p, inside_i, CHANNELS,
    )  # fmt: skip
    act = act_desc.load([image, p0, i0]).reshape(BLOCK_P, WIDTH)
    u, made = activate_backward(h, act, offs_i, evens, negative_slope, gain, ACTIVATION, True)
    if MADE:
        made_desc.store([image, p0, i0], made.to(made_desc.dtype).reshape(1, BLOCK_P, WIDTH))
    out_desc.store([image, p0, i0], u.to(out_desc.dtype).reshape(1, BLOCK_P, WIDTH))
    if PARTS:
        # rows past the image are zero already: their u came from zeros
        tl.store(bias_part_ptr + tile * in_features + offs_i, tl.sum(u, axis=0), mask=inside_i)
        rows += tl.sum(u, axis=1)
    return rows


@triton.jit
def modfc_dgrad_descriptor_kernel(
    u_desc, m_desc, act_desc, out_desc, made_desc, drgb_ptr, rgb_m_ptr, stride_rb, stride_rc, bias_part_ptr, rows_part_ptr,
    batch, pixels, in_features, out_features, evens, negative_slope, gain, programs,
    CHANNELS: tl.constexpr, PARTS: tl.constexpr, MADE: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_O: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    """`u` `[B, P, O]` -> `u` `[B, P, I]` of the layer below; `drgb` `[B, P, CHANNELS]` float32, contiguous."""
    tiles_i = tl.cdiv(in_features, BLOCK_I)
    tiles_p = tl.cdiv(pixels, BLOCK_P)
    for tile in tl.range(tl.program_id(0), tiles_i * tiles_p * batch, programs, flatten=FLATTEN):
        tile_i = tile % tiles_i
        tile_p = (tile // tiles_i) % tiles_p
        image = tile // (tiles_i * tiles_p)
        p0, i0 = tile_p * BLOCK_P, tile_i * BLOCK_I
        h = tl.zeros((BLOCK_P, BLOCK_I), dtype=tl.float32)
        for k in range(0, out_features, BLOCK_O):
            a = u_desc.load([image, p0, k]).reshape(BLOCK_P, BLOCK_O)
            b = m_desc.load([image, k, i0]).reshape(BLOCK_O, BLOCK_I)
            h = tl.dot(a, b, h)

        HALF: tl.constexpr = BLOCK_I // 2
        low, high = tl.split(tl.permute(tl.reshape(h, (BLOCK_P, 2, HALF)), (0, 2, 1)))
        offs_p = p0.to(tl.int64) + tl.arange(0, BLOCK_P)
        inside_p = offs_p < pixels
        row_tile = (image * tiles_p + tile_p).to(tl.int64)
        rows = tl.zeros((BLOCK_P,), dtype=tl.float32)
        rows = _slice(
            low, act_desc, out_desc, made_desc, image, p0, i0, row_tile, offs_p, inside_p, drgb_ptr, rgb_m_ptr,
            stride_rb, stride_rc, bias_part_ptr, pixels, in_features, evens, negative_slope, gain, rows,
            CHANNELS, PARTS, MADE, ACTIVATION, BLOCK_P, HALF,
        )  # fmt: skip
        rows = _slice(
            high, act_desc, out_desc, made_desc, image, p0, i0 + HALF, row_tile, offs_p, inside_p, drgb_ptr, rgb_m_ptr,
            stride_rb, stride_rc, bias_part_ptr, pixels, in_features, evens, negative_slope, gain, rows,
            CHANNELS, PARTS, MADE, ACTIVATION, BLOCK_P, HALF,
        )  # fmt: skip
        if PARTS:
            at = (tile_i.to(tl.int64) * batch + image) * pixels + offs_p
            tl.store(rows_part_ptr + at, rows, mask=inside_p)
