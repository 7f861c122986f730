"""What the tests of the cpu backend share: stacks to run, and the comparison of outputs and gradients with the float64 oracle.

Gradients are compared at the layers' own outputs. A leaky ReLU has a kink: where rounding turns the sign of a number near
zero, gradients differ by whole numbers in any dtype, and that says nothing about the backward.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cips_kernels import cpu, cpu_plan, packing, reference
from cips_kernels.arguments import stack_call
from cips_kernels.spec import Needs, StackGrads, StackInputs, StackSaved, StackSpec, is_channel_major
from cips_kernels.testing import StackCase, poisoned_empty, relative_error

TILE = 16
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
STACKS = [  # widths, rgb_after
    ((6, 6), ()),
    ((7, 5, 9, 4), (0, 2)),
    ((16, 33, 16, 8, 8), (-1, 1, 3, 3)),
    ((64, 48, 48), (1,)),
    ((40,), (-1,)),
]
BLOCKS = [  # widths, rgb_after, blocks
    ((12, 12, 12), (1,), ((0, 1),)),
    ((16, 33, 24, 33, 8, 8, 8), (1, 2, 5), ((1, 2), (3, 4), (5, 5))),
    ((20, 17, 9, 9, 9), (0, 2), ((0, 1), (2, 3))),
]
EVERYTHING = Needs(x=True, weights=True, biases=True, noise=True)


def use_small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of TILE pixels, the last one smaller, and noise drawn for a few of them at once."""
    monkeypatch.setattr(cpu_plan, "tile_pixels", lambda spec, dtype, pixels: min(TILE, pixels))
    monkeypatch.setattr(cpu_plan, "_GRAIN", 64)


def stack_of(case: StackCase, channel_major: bool = False, **spec_options) -> tuple[StackInputs, StackSpec]:
    """The call that a backend serves; `channel_major` lays `x` out as `[B, C, P]` in memory."""
    if channel_major:
        case = replace(case, x=case.x.transpose(1, 2).contiguous().transpose(1, 2))
    inputs, spec = case.call(lambda x, *groups, layout, **options: stack_call(x, *groups, **options))
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


# --- backward -------------------------------------------------------------------------------------------------------


def saved_output(inputs: StackInputs, spec: StackSpec, saved: StackSaved, layer: int) -> Tensor:
    """A layer's output `[B, P, O]` that the cpu backend saved."""
    if layer == spec.depth - 1:
        return saved.features
    kept = packing.activation(saved.activations, spec.widths, inputs.batch, inputs.pixels, layer)
    if is_channel_major(inputs.x):
        return kept.reshape(kept.shape[0], kept.shape[2], kept.shape[1]).transpose(1, 2)
    return kept


def saved_summand(module, inputs: StackInputs, spec: StackSpec, saved: StackSaved, block: int) -> Tensor:
    """What a block's last layer gave before the addition: of the cpu backend only the sign is promised."""
    sizes = (spec.widths, inputs.batch, inputs.pixels, spec.blocks)
    kept = packing.summand(saved.activations, *sizes, block)
    if module is cpu and is_channel_major(inputs.x):
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
    summands = [saved_summand(module, inputs, spec, saved, block).double() for block in range(len(spec.blocks))]
    wide, _ = stack_of(case.cast(torch.float64), channel_major, **options)
    exact = reference.stack_gradients(
        *(None if g is None else g.double() for g in grads),
        wide,
        spec,
        [output.double() for output in outputs[: spec.depth]],
        reference.modulate_all(wide, spec),
        summands,
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
