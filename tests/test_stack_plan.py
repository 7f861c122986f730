"""The on-chip stack as the extension lays it out, and what its launches refuse; needs no GPU."""

from __future__ import annotations

import pytest

module = pytest.importorskip("cips_kernels._cuda", reason="the extension is not built")


def stack_plan(
    widths: tuple, rgb_after: tuple, held: int, batch: int = 1, channels: int = 3, blocks: tuple = (),
    styles: int = 0,
):
    """A StackPlan of a packing without gaps."""
    layers, rgbs, weight, style, bias = [], [], 0, 0, 0
    shapes = [(o, i, layers) for i, o in zip(widths[:-1], widths[1:])]
    shapes += [(channels, widths[after + 1], rgbs) for after in rgb_after]
    for out, width, rows in shapes:
        rows.append((out, width, weight, style, bias))
        weight, style, bias = weight + out * width, style + width, bias + out
    return module.StackPlan(layers, rgbs, list(rgb_after), list(blocks), held, batch, styles)


@pytest.mark.parametrize(
    ("widths", "held"), [((1024, *(512,) * 15), 512), ((100, 80, 48, 300, 16), 100), ((700, 512), 500), ((64, 128), 64)]
)
def test_stack_plan_counts_slabs_and_records(widths: tuple, held: int) -> None:
    """A slab for every 128 outputs by 64 inputs, held and streamed inputs apart; a record for every 128 outputs."""
    plan = stack_plan(widths, (len(widths) - 2,), held)
    slabs = records = 0
    for layer, (inputs, outputs) in enumerate(zip(widths[:-1], widths[1:])):
        parts = (held, inputs - held) if layer == 0 else (inputs,)
        slabs += -(-outputs // 128) * sum(-(-part // 64) for part in parts)
        records += -(-outputs // 128)
    assert plan.slab_bytes == slabs * 128 * 64 * 2
    assert plan.record_bytes == records * (128 * 4 + 16 + 8 * 12 * 8)


def test_stack_plan_counts_skips_of_residual_blocks() -> None:
    """A skip's product has the slabs of its block's output by its input, and a record for each of their chunks."""
    widths = (64, 512, 512, 512, 300, 300)
    plain = stack_plan(widths, (4,), 64)
    blocks = stack_plan(widths, (4,), 64, blocks=((1, 2, -1), (3, 4, 0)))
    assert blocks.slab_bytes - plain.slab_bytes == 3 * 8 * 128 * 64 * 2
    assert blocks.record_bytes - plain.record_bytes == 3 * plain.record_bytes // (3 * 4 + 2 * 3)


def test_stack_plan_counts_what_a_blend_keeps() -> None:
    """Beside bias and strength: a float for each pair of styles, a 16-bit value a style, and colours of eight columns."""
    plain, blend = (stack_plan((64, 512, 300), (1,), 64, styles=styles) for styles in (0, 2))
    assert blend.slab_bytes == plain.slab_bytes
    assert blend.record_bytes == 14 * (64 * 16 * 2 + 64 * 4 + 16 + 2 * 64 * 2 + 64 * 8 * 2)
    assert (plain.fourier_floats, blend.fourier_floats) == (64 * 3, 64 * 5)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (((64, 64, 64), (1,), 64, 1, 3, ((0, 1, -1),)), "blocks: first layer: 0 came, expected 1 to"),
        (((64, 64, 64), (1,), 64, 1, 3, ((1, 2, -1),)), "blocks: first layer: 1 came, expected 1 to the block's last, which"),
        (((64, 64, 80), (1,), 64, 1, 3, ((1, 1, -1),)), "blocks: out_features of the last layer: 80 came"),
        (((64,), (), 64), "layers: 0 came, expected 1 to 64"),
        (((16,) * 66, (64,), 16), "layers: 65 came, expected 1 to 64"),
        (((64, 520), (0,), 64), "layer 0: out_features: 520 came, expected 1 to 512"),
        (((1030, 64), (0,), 512), "in_features of layer 0: 1030 came"),
        (((64, 64), (0,), 0), "register_inputs: 0 came, expected 1 to 512"),
        (((64, 64), (0,), 65), "in_features of layer 0: 64 came, expected at least register_inputs"),
        (((64, 64), (0,), 64, 0), "batch: 0 came, expected 1 to 65535"),
        (((64, 64), (0,), 64, 1, 4), "ToRGB: channels: 4 came, expected 1 to 3"),
        (((64, 64), (), 64), "ToRGBs: 0 came, expected 1 to 24"),
        (((64, 64), (0,), 64, 1, 3, (), 3), "styles: 3 came, expected 0 or 2"),
        (((64, 64, 64), (1,), 64, 1, 3, ((1, 1, -1),), 2), "blocks: 1 came, expected none with blended styles"),
        (((64, 64, 64), (0,), 64), "depth: 2 came, expected no layers after the last that a ToRGB reads"),
    ],
)
def test_stack_plan_refuses(arguments: tuple, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        stack_plan(*arguments)


STACK_PACK = dict(
    weights=1024, styles=1024, style_stride=64, biases=1024, strengths=1024, fourier_weight=0, fourier_bias=0, slabs=1024,
    records=1024, fourier=0, rgb_bias=1024, dtype="bfloat16", eps=1e-8, gain=1.0, negative_slope=0.2, demodulate=True,
    device=0, stream=0,
)  # fmt: skip
STACK_FORWARD = dict(
    slabs=1024, records=1024, fourier=0, rgb_bias=1024, x=1024, x_strides=(0, 128), streamed=0, streamed_strides=(0, 0),
    coords=0, coords_batch_stride=0, grid=(0, 0), first_pixel=0, noise_mode="off", seed=0, noise=0, noise_strides=(0, 0),
    first_image=0, first_layer=0, kept=0, rgb=1024, rgb_strides=(3, 3, 1), pixels=64, dtype="bfloat16", negative_slope=0.2, device=0,
    stream=0,
)  # fmt: skip
TABLE_LOOKUP = dict(
    table=1024, table_dtype="float32", rows=4, columns=4, features=8, coords=1024, coords_batch_stride=0, grid=(0, 0),
    first_pixel=0, exact=True, out=1024, out_dtype="bfloat16", row_stride=8, images=1, pixels=64, device=0, stream=0,
)  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"slabs": 1040}, "slabs: address is not a multiple of 128"),
        ({"records": 0}, "records: a null address"),
        ({"dtype": "float32"}, "dtype: expected bfloat16 or float16"),
        ({"weights": 0}, "weights: a null address"),
        ({"styles": 1025}, "styles: address is not a multiple of 4"),
        ({"fourier_weight": 1024, "fourier_bias": 1024}, "fourier: a null address"),
        ({"row_styles": 1024}, "row_styles: expected if and only if a blend streams an input"),
    ],
)
def test_stack_pack_refuses(changes: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        module.stack_pack(stack_plan((64, 64), (0,), 64), **(STACK_PACK | changes))


@pytest.mark.parametrize(
    ("widths", "row_styles", "words"),
    [
        ((64 + 24, 64), 0, "row_styles: expected if and only if a blend streams an input"),
        ((64, 64), 1024, "row_styles: expected if and only if a blend streams an input"),
        ((64 + 24, 64), 1032, "row_styles: address is not a multiple of 16"),
    ],
)
def test_packing_of_blends_refuses(widths: tuple, row_styles: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        module.stack_pack(stack_plan(widths, (0,), 64, styles=2), **STACK_PACK, row_styles=row_styles)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"blend": 1024}, "blend: expected weights if and only if the plan has styles"),
        ({"x": 1032}, "x: address is not a multiple of 16"),
        ({"x_strides": (0, 120)}, "x: expected strides of 16 bytes"),
        ({"x_strides": (0, 112)}, "x: expected rows padded to 64 channels"),
        ({"x": 0}, "x: expected either x or fourier"),
        ({"fourier": 1024}, "x: expected either x or fourier"),
        ({"x": 0, "fourier": 1024}, "coords: expected coords or a grid"),
        ({"pixels": 0}, "pixels: expected 1 to 2.31 - 1"),
        ({"noise_mode": "index"}, "seed: a null address"),
        ({"noise_mode": "coords", "seed": 1024}, "coords: expected coords or a grid"),
        ({"noise_mode": "given"}, "noise: a null address"),
        ({"noise_mode": "loud"}, "noise_mode: 'loud' came"),
        ({"rgb": 0}, "rgb: a null address"),
        ({"dtype": "float32"}, "dtype: expected bfloat16 or float16"),
    ],
)
def test_stack_forward_refuses(changes: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        module.stack_forward(stack_plan((64, 64), (0,), 64), **(STACK_FORWARD | changes))


TABLE = (1024, 1024, 0, 256, 0, 4, 4, True)  # memory, source, bytes of an image and of a row, styles, rows, columns, exact


@pytest.mark.parametrize(
    ("made", "changes", "words"),
    [
        ((1032, *TABLE[1:]), {}, "made: address is not a multiple of 16"),
        ((1024, 1032, *TABLE[2:]), {}, "made: source: address is not a multiple of 16"),
        ((*TABLE[:3], 252, *TABLE[4:]), {}, "source_row_stride: expected a multiple of 8 bytes that holds a row"),
        ((*TABLE[:3], 264, *TABLE[4:]), {}, "source_row_stride: expected a table without gaps"),
        ((*TABLE[:5], 0, 4, True), {}, "a table with sides of 1 to 2.23"),
        ((*TABLE[:5], 2**15, 2**15, True), {}, "fewer than 2.30 entries"),
        (TABLE, {"grid": (0, 0)}, "coords: expected coords or a grid"),
        (TABLE, {"grid": (2**24, 1)}, "grid: expected sides of at most 2.23"),
        (TABLE, {"first_pixel": 2**31}, "grid: expected sides of at most 2.23 and fewer than 2.31 pixels"),
        (TABLE, {"pixels": 2**30 + 1}, "pixels: expected at most 2.30"),
        (TABLE, {"signs": 1024, "features": 1024, "activations": 1024}, "made: a forward for training makes no rows"),
    ],
)
def test_stack_forward_refuses_to_make_rows(made: tuple, changes: dict, words: str) -> None:
    plan = stack_plan((128, 64), (0,), 64)
    with pytest.raises(ValueError, match=words):
        module.stack_forward(plan, **(STACK_FORWARD | {"made": made, "grid": (8, 8)} | changes))


def test_stack_forward_makes_rows_of_whole_slabs() -> None:
    made = (*TABLE[:3], 96, *TABLE[4:])
    with pytest.raises(ValueError, match="a table of a multiple of 64 channels"):
        module.stack_forward(stack_plan((64 + 24, 64), (0,), 64), **(STACK_FORWARD | {"made": made, "grid": (8, 8)}))


@pytest.mark.parametrize(
    ("made", "words"),
    [
        ((0,) * 7 + (False,), "made: expected memory for the streamed input"),
        ((1024, 1024, 0, 48, 0, 0, 0, False), "made: styles: a null address"),
        ((1024, 1024, 0, 40, 1024, 0, 0, False), "source_row_stride: expected a multiple of 16 bytes that holds a row"),
        ((1024, 1024, 8, 48, 1024, 0, 0, False), "source_batch_stride: expected a multiple of 16"),
    ],
)
def test_stack_forward_of_blends_refuses_to_make_rows(made: tuple, words: str) -> None:
    plan = stack_plan((64 + 24, 64), (0,), 64, styles=2)
    with pytest.raises(ValueError, match=words):
        module.stack_forward(plan, **(STACK_FORWARD | {"made": made, "blend": 1024}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"table": 0}, "table: a null address"),
        ({"rows": 0}, "table: expected at least one entry"),
        ({"columns": 2**24}, "table: expected sides below 2.24"),
        ({"out": 1032}, "out: address is not a multiple of 16"),
        ({"row_stride": 12}, "row_stride: expected a multiple of 8"),
        ({"features": 9}, "row_stride: expected a multiple of 8 that holds a row"),
        ({"coords": 0}, "coords: expected coords or a grid"),
        ({"out_dtype": "float32"}, "dtype: expected a table of float32 or"),
        ({"table_dtype": "float16"}, "dtype: expected a table of float32 or"),
        ({"images": 70000}, "images: expected 1 to 65535"),
    ],
)
def test_table_lookup_refuses(changes: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        module.table_lookup(**(TABLE_LOOKUP | changes))


RUN = (1024, 2, 64, 1024, 2, 8192, 128, 64, 64, True, 1.0)
WGRAD = dict(
    runs=[RUN], items=1024, first_items=1024, clusters=1, sums=1024, sum_count=1, n=1024, pieces=0, colour_parts=0,
    colours=0, padded_pixels=256, channels=3, colour_scale=1.0, pixels=64, dtype="bfloat16", device=0, stream=0,
)  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(dtype="float32"), "dtype: expected bfloat16 or float16"),
        (dict(runs=[]), "runs: expected 1 to 8, 0 came"),
        (dict(runs=[RUN] * 9), "runs: expected 1 to 8, 9 came"),
        (dict(items=1025), "items: address is not a multiple of 16"),
        (dict(n=0), "n: a null address came"),
        (dict(colours=8), "colours: address is not a multiple of 16"),
        (dict(pixels=0), "pixels: expected 1 to"),
        (dict(padded_pixels=100), "padded_pixels: expected"),
        (dict(channels=4), "channels: expected 1 to 3"),
        (dict(runs=[(8, *RUN[1:])]), "u: address is not a multiple of 16"),
        (dict(runs=[(*RUN[:2], 48, *RUN[3:])]), "out_features: expected a multiple of 32"),
        (dict(runs=[(*RUN[:7], 48, *RUN[8:])]), "in_features: expected a multiple of 32"),
        (dict(runs=[(*RUN[:8], 66, *RUN[9:])]), "row_stride: expected a multiple of 4"),
    ],
)
def test_weight_gradients_refuse(changes: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        module.stack_wgrad(**{**WGRAD, **changes})
