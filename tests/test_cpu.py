"""The cpu backend's outputs and gradients against the float64 oracle, in small tiles.

What its tiling promises besides is in `test_cpu_tiling.py`.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cips_kernels import cpu, cpu_plan, functional, packing, reference
from cips_kernels.spec import Needs, StackGrads, StackSaved
from cips_kernels.testing import poisoned_empty, random_stack, relative_error
from cpu_stacks import (
    DTYPES,
    STACKS,
    TILE,
    check_backward,
    check_forward,
    random_grads,
    run_backward,
    run_forward,
    saved_output,
    stack_of,
    use_small_tiles,
)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    use_small_tiles(monkeypatch)


# --- forward --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("widths, rgb_after", STACKS)
def test_forward_of_odd_even_and_tapered_widths(widths, rgb_after, dtype):
    check_forward(
        random_stack(widths, rgb_after, pixels=2 * TILE + 3, skip=bool(rgb_after), dtype=dtype), dtype
    )


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("pixels", [1, 5, TILE - 1, TILE, TILE + 1, 4 * TILE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_of_any_number_of_pixels(pixels, batch, dtype):
    check_forward(random_stack((16, 24, 8), (0, 1), batch=batch, pixels=pixels, dtype=dtype), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channel_major", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_forward_of_shared_and_channel_major_input(shared, channel_major, dtype):
    case = random_stack(
        (16, 24, 24), (-1, 1), batch=3, pixels=TILE + 5, shared=shared, skip=True, dtype=dtype
    )
    check_forward(case, dtype, channel_major)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", [None, "given", 3, -(2**62)])
def test_forward_with_every_noise(mode, dtype):
    check_forward(
        random_stack((8, 12, 12), (1,), batch=2, pixels=TILE + 5, noise=mode, dtype=dtype),
        dtype,
        first_layer=2,
    )


@pytest.mark.parametrize("each_image", [False, True])
def test_noise_keyed_by_coordinates(each_image):
    case = random_stack((8, 12, 12), (1,), batch=2, pixels=TILE + 5, noise=11, dtype=torch.float64)
    inputs, spec = stack_of(case)
    shape = (2, TILE + 5, 2) if each_image else (TILE + 5, 2)
    inputs = inputs._replace(coords=torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1)
    exact, value = (module.forward(inputs, spec, True, False)[0] for module in (reference, cpu))
    torch.testing.assert_close(value, exact, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    "options",
    [{"negative_slope": 1.0}, {"negative_slope": 0.0}, {"gain": 0.7}, {"eps": 0.3}, {"demodulate": False}],
)
def test_forward_with_other_constants(options):
    case = random_stack((8, 12, 10), (0,), pixels=TILE + 5, dtype=torch.float64)
    check_forward(case, torch.float64, **options)


def test_features_are_returned_only_when_asked_for():
    inputs, spec = stack_of(random_stack((8, 12, 10), (0, 1), pixels=TILE + 5))
    with_features, rgb, _ = cpu.forward(inputs, spec, True, False)
    without, same_rgb, saved = cpu.forward(inputs, spec, False, False)
    assert with_features.shape == (2, TILE + 5, 10) and without.numel() == 0
    assert torch.equal(rgb, same_rgb)
    assert saved.activations.numel() == saved.mods.numel() == 0


@pytest.mark.parametrize("channel_major", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_saved_outputs_lie_where_packing_says(dtype, channel_major):
    inputs, spec = stack_of(random_stack((8, 12, 10, 6), (0,), pixels=TILE + 5, dtype=dtype), channel_major)
    with poisoned_empty():
        features, _, saved = cpu.forward(inputs, spec, False, True)
    assert saved.activations.shape == (packing.activation_offsets(spec.widths, 2, TILE + 5)[-1],)
    assert saved.activations.isfinite().all() and saved.mods.numel() == 0
    outputs, *_ = reference.stack_layers(inputs, spec, reference.modulate_all(inputs, spec))
    for layer, output in enumerate(outputs):
        kept = saved_output(inputs, spec, StackSaved(features, saved.activations, saved.mods), layer)
        torch.testing.assert_close(
            kept, output, **({} if dtype == torch.float64 else {"rtol": 0.1, "atol": 0.1})
        )


# --- backward -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("widths, rgb_after", STACKS)
def test_gradients_of_odd_even_and_tapered_widths(widths, rgb_after, dtype):
    check_backward(
        random_stack(widths, rgb_after, pixels=2 * TILE + 3, skip=bool(rgb_after), dtype=dtype), dtype
    )


@pytest.mark.parametrize("widths, rgb_after", STACKS)
def test_each_gradient_in_float64(widths, rgb_after):
    case = random_stack(widths, rgb_after, batch=3, pixels=TILE + 3, dtype=torch.float64)
    _, value, exact = run_backward(cpu, case, torch.float64)
    for name in StackGrads._fields:
        torch.testing.assert_close(
            getattr(value, name), getattr(exact, name), rtol=1e-10, atol=1e-10, msg=name
        )


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("pixels", [1, 5, TILE - 1, TILE, TILE + 1, 4 * TILE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_any_number_of_pixels(pixels, batch, dtype):
    check_backward(random_stack((16, 24, 8), (0, 1), batch=batch, pixels=pixels, dtype=dtype), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channel_major", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_gradients_of_shared_and_channel_major_input(shared, channel_major, dtype):
    case = random_stack((16, 24, 24), (-1, 1), batch=3, pixels=TILE + 5, shared=shared, dtype=dtype)
    check_backward(case, dtype, channel_major)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", [None, "given", 3])
def test_gradients_with_every_noise(mode, dtype):
    check_backward(
        random_stack((8, 12, 12), (1,), batch=2, pixels=TILE + 5, noise=mode, dtype=dtype),
        dtype,
        first_layer=2,
    )


@pytest.mark.parametrize(
    "options",
    [{"negative_slope": 1.0}, {"negative_slope": 0.0}, {"gain": 0.7}, {"eps": 0.3}, {"demodulate": False}],
)
def test_gradients_with_other_constants(options):
    case = random_stack((8, 12, 10), (0,), pixels=TILE + 5, dtype=torch.float64)
    check_backward(case, torch.float64, **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("which", ["features", "rgb"])
def test_gradients_from_one_output_alone(which, dtype):
    case = random_stack((8, 12, 12, 10), (-1, 1), pixels=TILE + 5, dtype=dtype)
    features, rgb = random_grads(case, dtype)
    check_backward(case, dtype, grads=(features, None) if which == "features" else (None, rgb))


@pytest.mark.parametrize("asked", Needs._fields)
def test_one_gradient_asked_for_alone(asked):
    case = random_stack((8, 12, 10), (-1, 1), pixels=TILE + 5, dtype=torch.float64)
    needs = Needs(*(name == asked for name in Needs._fields))
    _, value, exact = run_backward(cpu, case, torch.float64, needs=needs)
    fields = {
        "x": ["x"],
        "weights": ["weights", "styles"],
        "biases": ["biases"],
        "noise": ["noise_strengths", "noise"],
    }
    for name in fields[asked]:
        torch.testing.assert_close(
            getattr(value, name), getattr(exact, name), rtol=1e-10, atol=1e-10, msg=name
        )


def test_through_the_operator():
    """Autograd of the public function, features and RGB both used, in float64 against autograd of the reference."""
    case = random_stack((8, 12, 10), (0, 1), batch=2, pixels=TILE + 5, skip=True, dtype=torch.float64)

    def gradients(function, **options) -> tuple[Tensor, ...]:
        leaves = case.leaves()
        features, rgb = leaves.call(function, **options)
        tensors = list(leaves.tensors().values())
        return torch.autograd.grad((features * features.detach().cos()).sum() + rgb.square().sum(), tensors)

    expected = gradients(reference.modfc_stack)
    for got, want, name in zip(gradients(functional.modfc_stack, backend="cpu"), expected, case.tensors()):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10, msg=name)


# --- half precision -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("blocks", [(), ((1, 2),)], ids=["plain", "block"])
def test_both_ways_to_compute_half_precision(monkeypatch, blocks, dtype, native):
    monkeypatch.setattr(cpu_plan, "compute_dtype", lambda dtype: dtype if native else torch.float32)
    options = dict(batch=2, pixels=2 * TILE + 3, skip=True, blocks=blocks, dtype=dtype)
    case = random_stack((16, 24, 24, 12), (0, 2), **options)
    check_forward(case, dtype)
    check_backward(case, dtype)
    if not native:  # one rounding, that of the features, and none within the tile
        rgb = run_forward(cpu, case)[1][1]
        assert relative_error(rgb, run_forward(reference, case.cast(torch.float64))[1][1]) < 1e-5
