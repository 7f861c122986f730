"""The gradients of every ToRGB's modulated weight in one launch, at the speed of reading once what they read.

A launch a ToRGB would end in a wave of few programs each time and, of one image, be over before memory is busy.
"""

import triton
import triton.language as tl


@triton.jit
def _column(d_rows, below, WHOLE: tl.constexpr):
    """One channel of the colours' gradients, `[ROWS, 1]`, 0 where `below` is not."""
    if WHOLE:
        d = tl.load(d_rows)
    else:
        d = tl.load(d_rows, mask=below, other=0.0)
    return d.to(tl.float32)[:, None]


@triton.jit
def _add_rows(
    acc0, acc1, acc2, x_ptr, d_ptr, rows, width, inside, count,
    CHANNELS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """The sums `[BLOCK_I]` with `rows` `[ROWS]` of `x` added, those below `count` unless WHOLE.

    One load asks for all rows, so that they are on their way at once (one after the other in a loop they wait for one
    another's registers); a thread adds up the rows of its own channels.
    """
    below = rows < count
    x_rows = x_ptr + rows[:, None] * width
    if WHOLE:
        x = tl.load(x_rows, mask=inside).to(tl.float32)  # sums of channels outside come to nothing
    else:
        x = tl.load(x_rows, mask=inside & below[:, None], other=0.0).to(tl.float32)
    d_rows = d_ptr + rows * CHANNELS
    acc0 += tl.sum(x * _column(d_rows, below, WHOLE), axis=0)
    if CHANNELS > 1:
        acc1 += tl.sum(x * _column(d_rows + 1, below, WHOLE), axis=0)
    if CHANNELS > 2:
        acc2 += tl.sum(x * _column(d_rows + 2, below, WHOLE), axis=0)
    return acc0, acc1, acc2


@triton.jit(do_not_specialize=["images", "pixels", "splits", "per_split", "widest"])
def rgb_wgrad_chain_kernel(
    drgb_ptr, x_ptr, table_ptr, part_ptr, images, pixels, splits, per_split, widest,
    CHANNELS: tl.constexpr, ROWS: tl.constexpr, BLOCK_I: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`part` `[K, images, splits, CHANNELS, widest]` float32: sums over a split's pixels, channels as they lie in `x`.

    `table` `[K, 4]` as in `layers.rgb_wgrad_chain`. A program of BLOCK_I / 256 warps has 16 bytes of a row for every thread, so
    that threads have no sums in common; it reads ROWS rows at a time, with STAGES above 1 ahead by way of shared memory.
    """
    pid = tl.program_id(0)
    tiles = tl.cdiv(widest, BLOCK_I)
    split, image, rgb = (pid // tiles) % splits, (pid // (tiles * splits)) % images, pid // (tiles * splits * images)
    offs_i = (pid % tiles) * BLOCK_I + tl.arange(0, BLOCK_I)
    before = tl.load(table_ptr + rgb * 4)
    width = tl.multiple_of(tl.load(table_ptr + rgb * 4 + 1).to(tl.int32), 32)
    if (pid % tiles) * BLOCK_I < width:
        first = split.to(tl.int64) * per_split
        count = tl.minimum(pixels - first, per_split).to(tl.int32)
        # [B, P, width] of the ToRGB's layer, behind all layers before it
        start = before * images * pixels + (image.to(tl.int64) * pixels + first) * width
        x = x_ptr + tl.multiple_of(start, 32) + offs_i[None, :]
        d = drgb_ptr + (image.to(tl.int64) * pixels + first) * CHANNELS
        inside = (offs_i < width)[None, :]
        rows = tl.arange(0, ROWS)
        acc0 = tl.zeros((BLOCK_I,), dtype=tl.float32)
        acc1 = tl.zeros((BLOCK_I,), dtype=tl.float32)
        acc2 = tl.zeros((BLOCK_I,), dtype=tl.float32)
        for _ in tl.range(0, count // ROWS, num_stages=STAGES):
            acc0, acc1, acc2 = _add_rows(
                acc0, acc1, acc2, x, d, rows, width, inside, ROWS, CHANNELS, True
            )
            x += ROWS * width
            d += ROWS * CHANNELS
        if count % ROWS:
            acc0, acc1, acc2 = _add_rows(
                acc0, acc1, acc2, x, d, rows, width, inside, count % ROWS, CHANNELS, False
            )
        out = part_ptr + ((rgb * images + image).to(tl.int64) * splits + split) * CHANNELS * widest + offs_i
        tl.store(out, acc0, mask=offs_i < width)
        if CHANNELS > 1:
            tl.store(out + widest, acc1, mask=offs_i < width)
        if CHANNELS > 2:
            tl.store(out + 2 * widest, acc2, mask=offs_i < width)
