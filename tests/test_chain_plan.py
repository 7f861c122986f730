"""The chain of gradients as the extension lays it out, and what its launches refuse; needs no GPU."""

from __future__ import annotations

import pytest

from test_stack_plan import STACK_FORWARD, stack_plan

module = pytest.importorskip("cips_kernels._cuda", reason="the extension is not built")

CHAIN = dict(
    slabs=1024, records=1024, drgb=1024, signs=1024, first=1024, u=1024, colours=1024, bias_parts=1024, noise_rows=0, noise_stride=0,
    images=1, pixels=64, dtype="bfloat16", gain=1.0, negative_slope=0.2, device=0, stream=0,
)  # fmt: skip
PACK = dict(
    weights=1024, styles=1024, style_stride=1024, slabs=1024, records=1024, dtype="bfloat16", eps=1e-8, gain=1.0,
    demodulate=True, device=0, stream=0,
)  # fmt: skip


@pytest.mark.parametrize(
    ("widths", "rgb_after"),
    [((1024, *(512,) * 15), tuple(range(2, 15, 2))), ((64, 160, 96, 416, 32), (0, 3)), ((64, 128), (0,))],
)
def test_plan_counts_slabs_records_and_chunks(widths: tuple, rgb_after: tuple) -> None:
    """For each layer but the first a slab for every 128 inputs by 64 outputs; 2 KB for every 128 channels a ToRGB reads."""
    plan = module.ChainPlan(stack_plan(widths, rgb_after, min(widths[0], 512), batch=2))
    slabs = sum(-(-inputs // 128) * -(-outputs // 64) for inputs, outputs in zip(widths[1:-1], widths[2:]))
    assert plan.slab_bytes == slabs * 128 * 64 * 2
    assert plan.record_bytes == sum(-(-widths[after + 1] // 128) for after in rgb_after) * 128 * 16
    assert plan.image_chunks == sum(-(-width // 128) for width in widths[1:])


@pytest.mark.parametrize(("pixels", "units"), [(1, 1), (256, 1), (257, 2), (65536, 256)])
def test_signs_are_a_bit_a_number_of_whole_units(pixels: int, units: int) -> None:
    plan = stack_plan((64, 160, 96), (1,), 64, batch=3)
    assert plan.sign_bytes(pixels) * 8 == 3 * units * 256 * (256 + 128)


def test_no_chain_of_residual_blocks() -> None:
    with pytest.raises(ValueError, match="blocks: 1 came, expected neither residual blocks nor blends"):
        module.ChainPlan(stack_plan((64, 64, 64, 64), (2,), 64, blocks=((1, 2, -1),)))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"slabs": 1040}, "slabs: address is not a multiple of 128"),
        ({"records": 0}, "records: a null address"),
        ({"drgb": 1026}, "drgb: address is not a multiple of 4"),
        ({"signs": 0}, "signs: a null address"),
        ({"first": 1032}, "first: address is not a multiple of 16"),
        ({"u": 0}, "u: a null address"),
        ({"bias_parts": 1028}, "bias_parts: address is not a multiple of 16"),
        ({"images": 2}, "images: expected 1 to the plan's batch"),
        ({"pixels": 0}, "pixels: expected 1 to 2.31 - 1"),
        ({"dtype": "float32"}, "dtype: expected bfloat16 or float16"),
    ],
)
def test_chain_refuses(changes: dict, words: str) -> None:
    plan = module.ChainPlan(stack_plan((64, 64, 64), (1,), 64))
    with pytest.raises(ValueError, match=words):
        module.chain_backward(plan, **(CHAIN | changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"slabs": 1040}, "slabs: address is not a multiple of 128"),
        ({"records": 1032}, "records: address is not a multiple of 16"),
        ({"weights": 0}, "weights: a null address"),
        ({"dtype": "float32"}, "dtype: expected bfloat16 or float16"),
    ],
)
def test_pack_refuses(changes: dict, words: str) -> None:
    plan = module.ChainPlan(stack_plan((64, 64, 64), (1,), 64))
    with pytest.raises(ValueError, match=words):
        module.chain_pack(plan, **(PACK | changes))


@pytest.mark.parametrize(
    ("widths", "changes", "words"),
    [
        ((64, 64), {"signs": 1028, "features": 1024}, "signs: address is not a multiple of 8"),
        ((64, 64), {"signs": 1024}, "features: a null address"),
        ((64, 64, 64), {"signs": 1024, "features": 1024}, "activations: a null address"),
        ((64, 48), {"signs": 1024, "features": 1024}, "out_features: a forward for training takes multiples of 32"),
    ],
)
def test_forward_for_training_refuses(widths: tuple, changes: dict, words: str) -> None:
    plan = stack_plan(widths, (len(widths) - 2,), 64)
    with pytest.raises(ValueError, match=words):
        module.stack_forward(plan, **(STACK_FORWARD | changes))
