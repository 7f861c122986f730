"""The cpu backend against the float64 oracle, and what its tiling promises: no dependence on the tile, the same bits every
run, memory that does not grow with pixels, images that do not touch each other.

Gradients are compared at the layers' own outputs. A leaky ReLU has a kink: where rounding turns the sign of a number near
zero, gradients differ by whole numbers in any dtype, and that says nothing about the backward.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cips_kernels import cpu, cpu_plan, functional, packing, reference
from cips_kernels.arguments import stack_call
from cips_kernels.spec import Needs, StackGrads, StackInputs, StackSaved, StackSpec, is_channel_major
from cips_kernels.testing import StackCase, poisoned_empty, random_stack, relative_error

TILE = 16
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
STACKS = [  # widths, rgb_after
    ((6, 6), ()),
    ((7, 5, 9, 4), (0, 2)),
    ((16, 33, 16, 8, 8), (-1, 1, 3, 3)),
    ((64, 48, 48), (1,)),
    ((40,), (-1,)),
]
EVERYTHING = Needs(x=True, weights=True, biases=True, noise=True)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles of TILE pixels, the last one smaller, and noise drawn for a few of them at once."""
    monkeypatch.setattr(cpu_plan, "tile_pixels", lambda spec, dtype, pixels: min(TILE, pixels))
    monkeypatch.setattr(cpu_plan, "_GRAIN", 64)


def stack_of(case: StackCase, channel_major: bool = False, **spec_options) -> tuple[StackInputs, StackSpec]:
    """The call that a backend serves; `channel_major` lays `x` out as `[B, C, P]` in memory."""
    if channel_major:
        case = replace(case, x=case.x.transpose(1, 2).contiguous().transpose(1, 2))
    groups = (case.weights, case.styles, case.biases, case.noise_strengths)
    rgbs = (case.rgb_weights, case.rgb_styles, case.rgb_biases, case.rgb_after)
    inputs, spec = stack_call(case.x, *groups, *rgbs, case.skip, noise=case.noise)
    return inputs, replace(spec, **spec_options)


def floor(dtype: torch.dtype) -> float:
    """Error below which eager PyTorch's is luck. In float64 the oracle is eager PyTorch, so there this is the tolerance."""
    return {torch.float64: 1e-13, torch.float32: 1e-6}.get(dtype, torch.finfo(dtype).eps)


def assert_as_eager(
    name: str, value: Tensor | list, eager: Tensor | list, exact: Tensor | list, dtype: torch.dtype
):
    """At most twice eager's error (DESIGN section 8), each measured against its own exact value."""
    error = relative_error(value, exact)
    allowed = 2 * max(relative_error(*eager), floor(dtype))
    assert error <= allowed, f"{name}: relative error {error:.3e}, allowed {allowed:.3e}"


def check_forward(case: StackCase, dtype: torch.dtype, channel_major: bool = False, **options) -> None:
    """Features and RGB of `case` in `dtype` against the oracle."""
    _, (exact, exact_rgb) = run_forward(reference, case.cast(torch.float64), channel_major, **options)
    _, (eager, eager_rgb) = run_forward(reference, case.cast(dtype), channel_major, **options)
    inputs, (value, value_rgb) = run_forward(cpu, case.cast(dtype), channel_major, **options)
    if case.weights:
        assert value.dtype == dtype and is_channel_major(value) == is_channel_major(inputs.x)
        assert_as_eager("features", value, (eager, exact), exact, dtype)
    if case.rgb_after:
        assert value_rgb.dtype == eager_rgb.dtype
        assert_as_eager("rgb", value_rgb, (eager_rgb, exact_rgb), exact_rgb, dtype)


def run_forward(module, case: StackCase, channel_major: bool = False, **options):
    inputs, spec = stack_of(case, channel_major, **options)
    with poisoned_empty():
        features, rgb, _ = module.forward(inputs, spec, True, False)
    return inputs, (features, rgb)


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
    assert saved.mods.shape == (spec.packing(2).mod_numel,)
    assert saved.activations.isfinite().all() and saved.mods.isfinite().all()
    outputs, _ = reference.stack_layers(inputs, spec, reference.modulate_all(inputs, spec))
    for layer, output in enumerate(outputs):
        kept = saved_output(inputs, spec, StackSaved(features, saved.activations, saved.mods), layer)
        torch.testing.assert_close(
            kept, output, **({} if dtype == torch.float64 else {"rtol": 0.1, "atol": 0.1})
        )


# --- backward -------------------------------------------------------------------------------------------------------


def saved_output(inputs: StackInputs, spec: StackSpec, saved: StackSaved, layer: int) -> Tensor:
    """A layer's output `[B, P, O]` that the cpu backend saved."""
    if layer == spec.depth - 1:
        return saved.features
    kept = packing.activation(saved.activations, spec.widths, inputs.batch, inputs.pixels, layer)
    if is_channel_major(inputs.x):
        return kept.reshape(kept.shape[0], kept.shape[2], kept.shape[1]).transpose(1, 2)
    return kept


def random_grads(case: StackCase, dtype: torch.dtype, seed: int = 5) -> tuple[Tensor | None, Tensor | None]:
    """dL/dfeatures in `dtype` and dL/drgb in float32 (float64)."""
    generator = torch.Generator().manual_seed(seed)
    batch, pixels = (case.styles or case.rgb_styles)[0].shape[0], case.x.shape[1]
    features = rgb = None
    if case.weights:
        features = torch.randn(batch, pixels, case.weights[-1].shape[0], generator=generator).to(dtype)
    if case.rgb_after:
        rgb = torch.randn(batch, pixels, case.rgb_weights[0].shape[0], generator=generator)
        rgb = rgb.double() if dtype == torch.float64 else rgb
    return features, rgb


def run_backward(
    module, case: StackCase, dtype, channel_major=False, grads=None, needs=EVERYTHING, **options
):
    """Gradients of one backend, and those of the oracle at the same layers' outputs."""
    inputs, spec = stack_of(case.cast(dtype), channel_major, **options)
    grads = random_grads(case, dtype) if grads is None else grads
    with poisoned_empty():
        saved = module.forward(inputs, spec, True, True)[2]
        got = module.backward(*grads, inputs, spec, saved, needs)
    if module is cpu:
        outputs = [saved_output(inputs, spec, saved, layer) for layer in range(spec.depth)]
    else:
        flat, sizes = saved.activations, (spec.widths, inputs.batch, inputs.pixels)
        outputs = [packing.activation(flat, *sizes, layer) for layer in range(spec.depth - 1)] + [
            saved.features
        ]
    wide, _ = stack_of(case.cast(torch.float64), channel_major, **options)
    exact = reference.stack_gradients(
        *(None if g is None else g.double() for g in grads),
        wide,
        spec,
        [output.double() for output in outputs[: spec.depth]],
        reference.modulate_all(wide, spec),
    )
    return inputs, got, exact


def groups_of(grads: StackGrads) -> dict[str, list[Tensor]]:
    """Gradients to measure together: one number, such as that of a noise strength, can be right by luck."""
    groups = {"x": [grads.x], "weights": [grads.weights], "styles": [grads.styles]}
    groups["biases and noise strengths"] = [grads.biases, grads.noise_strengths]
    if grads.noise is not None:
        groups["noise"] = [grads.noise]
    return groups


def check_backward(case: StackCase, dtype: torch.dtype, channel_major: bool = False, **options) -> None:
    """Every gradient in `dtype` against the oracle."""
    inputs, value, exact = run_backward(cpu, case, dtype, channel_major, **options)
    _, eager, eager_exact = run_backward(reference, case, dtype, channel_major, **options)
    assert value.x.dtype == dtype and is_channel_major(value.x) == is_channel_major(inputs.x)
    for field in ("weights", "styles", "biases", "noise_strengths"):
        assert getattr(value, field).shape == getattr(inputs, field).shape
        assert getattr(value, field).dtype == getattr(inputs, field).dtype
    assert (value.noise is None) == (inputs.noise is None)
    eager_groups, eager_exacts, exacts = groups_of(eager), groups_of(eager_exact), groups_of(exact)
    for name, tensors in groups_of(value).items():
        assert_as_eager(name, tensors, (eager_groups[name], eager_exacts[name]), exacts[name], dtype)


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


# --- what the tiling promises ---------------------------------------------------------------------------------------


def everything(case: StackCase, dtype: torch.dtype, channel_major: bool = False) -> list[Tensor]:
    """Outputs and gradients of the cpu backend."""
    inputs, spec = stack_of(case.cast(dtype), channel_major)
    with poisoned_empty():
        features, rgb, saved = cpu.forward(inputs, spec, True, True)
        grads = cpu.backward(*random_grads(case, dtype), inputs, spec, saved, EVERYTHING)
    return [features, rgb, *(g for g in grads if g is not None)]


@pytest.mark.parametrize("channel_major", [False, True])
def test_the_tile_does_not_matter(monkeypatch, channel_major):
    case = random_stack((16, 24, 12), (0, 1), pixels=53, noise=9, dtype=torch.float64)
    whole = None
    for tile in (53, 1, 7, 32, 52):
        monkeypatch.setattr(cpu_plan, "tile_pixels", lambda spec, dtype, pixels, tile=tile: tile)
        results = everything(case, torch.float64, channel_major)
        whole = whole or results
        for got, want in zip(results, whole):
            torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_every_run(dtype):
    case = random_stack((16, 24, 12), (0, 1), batch=3, pixels=5 * TILE + 3, shared=True, noise=9, dtype=dtype)
    for first, second in zip(everything(case, dtype), everything(case, dtype)):
        assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("widths", [(16, 32, 12, 60), (16, 60, 12, 32)])
def test_an_image_of_nan_leaves_the_others_alone(monkeypatch, widths, dtype):
    # products of fewer rows do not use the kernel that reads past the end of a row
    monkeypatch.setattr(cpu_plan, "tile_pixels", lambda spec, dtype, pixels: 40)
    case = random_stack(widths, (0, 1), batch=2, pixels=85, noise=9, dtype=dtype)
    grads = random_grads(case, dtype)
    poisoned, poisoned_grads = case.x.clone(), [g.clone() for g in grads]
    for tensor in (poisoned, *poisoned_grads):
        tensor[0] = torch.nan
    (features, rgb), (features_nan, rgb_nan) = (
        run_forward(cpu, replace(case, x=x))[1] for x in (case.x, poisoned)
    )
    assert features_nan[0].isnan().all() and rgb_nan[0].isnan().all()
    assert torch.equal(features[1], features_nan[1]) and torch.equal(rgb[1], rgb_nan[1])
    clean, nan = (run_backward(cpu, case, dtype, grads=g)[1] for g in (grads, poisoned_grads))
    assert nan.x[0].isnan().all() and nan.styles[0].isnan().all()
    assert torch.equal(clean.x[1], nan.x[1]) and torch.equal(clean.styles[1], nan.styles[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_are_summed_over_tiles_in_float32(monkeypatch, dtype):
    """Sums of one sign over 256 tiles: in half precision the last tiles would not count."""
    monkeypatch.setattr(cpu_plan, "compute_dtype", lambda dtype: dtype)
    case = random_stack((8, 8, 8), (), batch=1, pixels=256 * TILE, noise="given", dtype=dtype)
    case = case.map(lambda name, t: t.abs())
    grads = torch.rand(1, 256 * TILE, 8, generator=torch.Generator().manual_seed(0)).to(dtype), None
    _, value, exact = run_backward(cpu, case, dtype, grads=grads)
    for name in ("weights", "styles", "biases", "noise_strengths"):
        assert relative_error(getattr(value, name), getattr(exact, name)) < torch.finfo(dtype).eps, name


class LiveBytes(TorchDispatchMode):
    """The peak of bytes that tensors made within, and not views of `given`, hold at one time."""

    def __init__(self, given: Iterable[Tensor | None]) -> None:
        super().__init__()
        self._given = {t.untyped_storage().data_ptr() for t in given if t is not None}
        self._made: list[weakref.ref] = []
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        outs = out if isinstance(out, tuple | list) else [out]
        self._made = [ref for ref in self._made if ref() is not None]
        self._made += [weakref.ref(t) for t in outs if isinstance(t, Tensor)]
        storages = [t.untyped_storage() for ref in self._made if (t := ref()) is not None]
        sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
        self.peak = max(self.peak, sum(size for address, size in sizes.items() if address not in self._given))
        return out


@pytest.mark.parametrize("channel_major", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_memory_of_inference_does_not_grow_with_pixels(monkeypatch, shared, channel_major):
    monkeypatch.setattr(cpu_plan, "_GRAIN", 1)

    def workspace(module, pixels: int) -> int:
        case = random_stack((24, 16, 16, 16), (0, 2), batch=2, pixels=pixels, shared=shared, noise=3)
        inputs, spec = stack_of(case, channel_major)
        with LiveBytes(inputs) as live:
            _, rgb, _ = module.forward(inputs, spec, False, False)
        return live.peak - rgb.untyped_storage().nbytes()

    assert workspace(cpu, 32 * TILE) <= workspace(cpu, 2 * TILE)
    assert workspace(reference, 32 * TILE) > 4 * workspace(reference, 2 * TILE)


# --- what fits the processor ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_both_ways_to_compute_half_precision(monkeypatch, dtype, native):
    monkeypatch.setattr(cpu_plan, "compute_dtype", lambda dtype: dtype if native else torch.float32)
    case = random_stack((16, 24, 24, 12), (0, 2), batch=2, pixels=2 * TILE + 3, skip=True, dtype=dtype)
    check_forward(case, dtype)
    check_backward(case, dtype)
    if not native:  # one rounding, that of the features, and none within the tile
        rgb = run_forward(cpu, case)[1][1]
        assert relative_error(rgb, run_forward(reference, case.cast(torch.float64))[1][1]) < 1e-5
