"""The operators on a CPU: schema and fakes, compilation, derivatives to the third order, autocast, and what is not done
when nobody asks for it. The same on a GPU is in test_ops_gpu.py."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from cips_kernels import FusedModFC, FusedModFCStack, functional, ops, reference
from cips_kernels.arguments import stack_call
from cips_kernels.spec import StackInputs
from cips_kernels.testing import (
    StackCase,
    assert_close_as_eager,
    poisoned_empty,
    random_stack,
    relative_error,
)

BACKENDS = ["reference", "cpu"]
TENSORS = len(StackInputs._fields)
CASES = {
    "three-layers": dict(widths=(6, 5, 7, 4), rgb_after=(0, 2), skip=True),
    "seed": dict(widths=(4, 5, 4), rgb_after=(1,), noise=123),
    "no-noise": dict(widths=(4, 5), rgb_after=(0,), noise=None),
    "shared-input": dict(widths=(4, 6, 3), rgb_after=(1,), shared=True, batch=3),
    "one-rgb": dict(widths=(4,), rgb_after=(-1,), skip=True, noise=None),
    "one-layer": dict(widths=(4, 3)),
    "blocks": dict(widths=(5, 6, 4, 6, 4), rgb_after=(0, 2, 3), blocks=((0, 1), (2, 3)), skip=True),
}


def stack_arguments(case: StackCase, backend: str, save: str = "all", activation: str = "lrelu") -> tuple:
    """The arguments of the operator `modfc_stack`, as leaves."""
    inputs, spec = case.call(lambda x, *a, layout, **k: stack_call(x, *a, **k), activation=activation)
    leaves = [t if t is None else t.detach().requires_grad_(save != "none" and t.is_floating_point()) for t in inputs]
    return *leaves, *ops._spec_values(spec), True, save, backend


def channel_major(case: StackCase) -> StackCase:
    """The case with `x` lying in memory as planes."""
    return case.map(lambda name, t: t.transpose(1, 2).contiguous().transpose(1, 2) if name == "x" else t)


# --- registration ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("order", ["pixel-major", "channel-major"])
@pytest.mark.parametrize("name", CASES)
def test_opcheck_stack(name, order, backend):
    case = random_stack(**CASES[name])
    case = channel_major(case) if order == "channel-major" else case
    opcheck(torch.ops.cips_kernels.modfc_stack.default, stack_arguments(case, backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("save", ["all", "some", "none"])
def test_opcheck_stack_of_sines(save, backend):
    arguments = stack_arguments(random_stack(**CASES["blocks"]), backend, save, "sinrelu")
    opcheck(torch.ops.cips_kernels.modfc_stack.default, arguments)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("save, batch, pixels", [("none", 2, 4), ("some", 1, 300), ("some", 3, 5)])
def test_opcheck_stack_that_keeps_less(save, batch, pixels, backend):
    case = random_stack((6, 5, 4), (0, 1), batch=batch, pixels=pixels, noise=3)
    opcheck(torch.ops.cips_kernels.modfc_stack.default, stack_arguments(channel_major(case), backend, save))


@pytest.mark.parametrize(
    "needs, backend, activation",
    [
        ((True,) * 4, "reference", "lrelu"),
        ((True,) * 4, "cpu", "lrelu"),
        ((True, False, False, True), "reference", "lrelu"),
        ((False, True, False, False), "cpu", "lrelu"),
        ((True,) * 4, "cpu", "sin"),
        ((False, True, False, True), "reference", "sinrelu"),
    ],
)
def test_opcheck_stack_backward(needs, backend, activation):
    args = stack_arguments(channel_major(random_stack((6, 5, 4), (0, 1))), backend, activation=activation)
    features, rgb, activations, mods = torch.ops.cips_kernels.modfc_stack(*args)
    sent = [torch.randn_like(out).requires_grad_() for out in (features, rgb)]
    saved = [t.detach() for t in (features, activations, mods)]
    arguments = (*sent, *args[:TENSORS], *saved, *args[TENSORS:-3], "all", list(needs), backend)
    opcheck(torch.ops.cips_kernels.modfc_stack_backward.default, arguments)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("demodulate", [True, False])
def test_opcheck_modulate(demodulate, backend):
    weight, style = torch.randn(5, 6, requires_grad=True), torch.randn(2, 6, requires_grad=True)
    grad = torch.randn(2, 5, 6, requires_grad=True)
    opcheck(
        torch.ops.cips_kernels.modulate.default, (weight, style, demodulate, 1e-8, torch.float32, backend)
    )
    opcheck(
        torch.ops.cips_kernels.modulate_backward.default, (grad, weight, style, demodulate, 1e-8, backend)
    )


# --- derivatives ----------------------------------------------------------------------------------------------------


def orders(case: StackCase, function, use: str, **options) -> list[dict[str, Tensor]]:
    """Gradients of a nonlinear loss with respect to every tensor, of their norm, and of the norm of those."""
    leaves = case.tensors()
    features, rgb = case.call(function, **options)
    used = [out for out, kind in ((features, "features"), (rgb, "rgb")) if out is not None and kind in use]
    loss = sum((out**3 + out.square()).sum() for out in used)
    found = []
    for order in range(3):
        grads = torch.autograd.grad(loss, list(leaves.values()), create_graph=order < 2, allow_unused=True)
        grads = [torch.zeros_like(t) if g is None else g for t, g in zip(leaves.values(), grads)]
        found.append(dict(zip(leaves, grads)))
        loss = sum(g.square().sum() for g in grads)
        if not loss.requires_grad:
            break
    return found


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("use", ["features and rgb", "features", "rgb"])
@pytest.mark.parametrize("name", CASES)
def test_three_orders_equal_autograd_of_the_formulas(name, use, backend):
    case = random_stack(**CASES[name], dtype=torch.float64)
    if (use == "rgb" and not case.rgb_after) or (use == "features" and not case.weights):
        pytest.skip("this case has no such output")
    want = orders(case.leaves(), reference.modfc_stack, use)
    got = orders(case.leaves(), functional.modfc_stack, use, backend=backend)
    assert len(got) == len(want) == 3
    for order, (expected, values) in enumerate(zip(want, got), start=1):
        for key, value in values.items():
            assert value.shape == expected[key].shape
            assert relative_error(value, expected[key]) < 1e-9, f"order {order}, {key}"


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_tensor_gets_a_gradient(backend):
    case = random_stack((6, 5, 4), (0, 1), skip=True).leaves()
    features, rgb = case.call(functional.modfc_stack, backend=backend)
    (features.sum() + rgb.square().sum()).backward()
    for name, tensor in case.tensors().items():
        assert tensor.grad is not None and tensor.grad.abs().max() > 0, name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("demodulate", [True, False])
def test_three_orders_of_modulate(demodulate, backend):
    def run(function, **options):
        torch.manual_seed(0)
        weight = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
        style = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
        loss, found = (function(weight, style, demodulate=demodulate, **options) ** 3).sum(), []
        for order in range(3):
            grads = torch.autograd.grad(loss, (weight, style), create_graph=order < 2)
            found += grads
            loss = sum(g.square().sum() for g in grads)
        return found

    for value, want in zip(run(functional.modulate, backend=backend), run(reference.modulate)):
        assert relative_error(value, want) < 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
def test_double_backward_frees_its_graph(backend):
    # a gradient penalty as it is used: the second derivative without a third
    case = random_stack((6, 5, 4), (1,), dtype=torch.float64)
    found = []
    for function, options in ((functional.modfc_stack, {"backend": backend}), (reference.modfc_stack, {})):
        leaves = case.leaves()
        rgb = leaves.call(function, **options)[1]
        grads = torch.autograd.grad(rgb.square().sum(), leaves.styles, create_graph=True)
        (sum(g.square().sum() for g in grads) + rgb.sum()).backward()
        found.append([t.grad for t in leaves.tensors().values() if t.grad is not None])
    assert relative_error(*found) < 1e-10


# --- work that nobody asked for -------------------------------------------------------------------------------------


class Spy:
    """Records what a backend's `forward` and `backward` are asked, and what the forward keeps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.saves, self.features, self.kept, self.needs = [], [], [], []
        self.original = ops.backend_module
        monkeypatch.setattr(ops, "backend_module", self.module)

    def module(self, name: str):
        self.backend = self.original(name)
        return self

    def forward(self, inputs, spec, want_features, save):
        out = self.backend.forward(inputs, spec, want_features, save)
        self.saves.append(save)
        self.features.append(out[0].numel())
        self.kept.append(out[2].activations.numel() + out[2].mods.numel())
        return out

    def backward(self, *args):
        self.needs.append(tuple(args[-1]))
        return self.backend.backward(*args)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_is_kept_without_gradients(monkeypatch, backend):
    spy = Spy(monkeypatch)
    case = random_stack((6, 5, 4), (0, 1))
    with torch.no_grad():
        features, rgb = case.leaves().call(functional.modfc_stack, backend=backend)
    case.call(functional.modfc_stack, backend=backend)
    assert not features.requires_grad and not rgb.requires_grad
    case.leaves().call(functional.modfc_stack, backend=backend)
    assert spy.saves == [False, False, True]
    assert spy.kept[:2] == [0, 0] and spy.kept[2] > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_unwanted_features_are_not_made(monkeypatch, backend):
    spy = Spy(monkeypatch)
    with torch.no_grad():
        features, rgb = random_stack((6, 5, 4), (1,)).call(
            functional.modfc_stack, want_features=False, backend=backend
        )
    assert features is None and spy.features == [0] and rgb.shape == (2, 5, 3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "wanted, needs",
    [
        ("x", (True, False, False, False)),
        ("weights", (False, True, False, False)),
        ("rgb_styles", (False, True, False, False)),
        ("biases", (False, False, True, False)),
        ("noise", (False, False, False, True)),
        ("noise_strengths", (False, False, False, True)),
    ],
)
def test_only_wanted_gradients_are_computed(monkeypatch, wanted, needs, backend):
    spy = Spy(monkeypatch)
    everything = random_stack((6, 5, 4), (0, 1)).leaves()
    case = everything.map(lambda name, t: t if name == wanted else t.detach())
    expected = torch.autograd.grad(
        everything.call(reference.modfc_stack)[1].square().sum(), everything.tensors().values()
    )
    expected = dict(zip(everything.tensors(), expected))
    case.call(functional.modfc_stack, backend=backend)[1].square().sum().backward()
    assert spy.needs == [needs]
    for name, tensor in case.tensors().items():
        assert (tensor.grad is not None) == (name.split("[")[0] == wanted), name
        if tensor.grad is not None:
            assert relative_error(tensor.grad, expected[name]) < 1e-5, name


@pytest.mark.parametrize("backend", BACKENDS)
def test_skip_alone_needs_no_backward(monkeypatch, backend):
    spy = Spy(monkeypatch)
    case = random_stack((6, 5), (0,), skip=True)
    skip = case.skip.clone().requires_grad_()
    rgb = case.call(functional.modfc_stack, skip=skip, backend=backend)[1]
    sent = torch.randn_like(rgb)
    rgb.backward(sent)
    assert torch.equal(skip.grad, sent) and spy.needs == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_operator_returns_empty_tensors_for_unwanted_gradients(backend):
    args = stack_arguments(random_stack((6, 5, 4), (0, 1)), backend)
    with torch.no_grad():
        features, rgb, activations, mods = torch.ops.cips_kernels.modfc_stack(*args)
        saved = (features, activations, mods)
        for k in range(4):
            needs = [index == k for index in range(4)]
            out = torch.ops.cips_kernels.modfc_stack_backward(
                torch.ones_like(features),
                torch.ones_like(rgb),
                *args[:TENSORS],
                *saved,
                *args[TENSORS:-3],
                "all",
                needs,
                backend,
            )
            sizes = [t.numel() for t in out]
            wanted = {0: [0], 1: [1, 2], 2: [3], 3: [4, 5]}[k]
            assert [index for index, size in enumerate(sizes) if size] == wanted
            assert [out[i].shape for i in wanted] == [args[(0, 1, 2, 3, 4, 7)[i]].shape for i in wanted]


# --- errors and memory ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_that_of_eager_and_everything_is_written(dtype, backend):
    case = random_stack((40, 24, 33, 16), (0, 2), batch=3, pixels=67, skip=True, dtype=dtype)
    wide = torch.float64
    sent = [torch.randn(3, 67, 16).to(dtype), torch.randn(3, 67, 3)]

    def run(case: StackCase, function, **options) -> dict[str, Tensor]:
        leaves = case.leaves()
        outputs = leaves.call(function, **options)
        tensors = leaves.tensors()
        grads = torch.autograd.grad(
            outputs, list(tensors.values()), [s.to(o.dtype) for s, o in zip(sent, outputs)]
        )
        return {"features": outputs[0], "rgb": outputs[1], **dict(zip(tensors, grads))}

    eager, exact = run(case, reference.modfc_stack), run(case.cast(wide), reference.modfc_stack)
    with poisoned_empty():
        values = run(case, functional.modfc_stack, backend=backend)
    for name, value in values.items():
        # one number has no average error: the eager one may be right by chance
        factor = 2.0 if value.numel() > 8 else 8.0
        assert_close_as_eager(name, value, eager[name], exact[name], factor)


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_every_run(backend):
    case = random_stack((20, 24, 16), (0, 1), batch=2, pixels=300, noise=5)

    def run() -> list[Tensor]:
        leaves = case.leaves()
        out = leaves.call(functional.modfc_stack, backend=backend)
        tensors = [t for name, t in leaves.tensors().items()]
        return [*out, *torch.autograd.grad(out, tensors, [torch.ones_like(o) for o in out])]

    for first, second in zip(run(), run()):
        assert torch.equal(first, second)


# --- autocast -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_is_a_cast_of_the_input(backend):
    case = random_stack((16, 24, 16), (0, 1), pixels=33, skip=True)
    cast, plain = case.leaves(), case.leaves()
    with torch.autocast("cpu", torch.bfloat16):
        features, rgb = cast.call(functional.modfc_stack, backend=backend)
    assert features.dtype == torch.bfloat16 and rgb.dtype == torch.float32
    half = plain.x.to(torch.bfloat16)
    want = plain.map(lambda name, t: half if name == "x" else t).call(functional.modfc_stack, backend=backend)
    assert torch.equal(features, want[0]) and torch.equal(rgb, want[1])
    (features.float().sum() + rgb.square().sum()).backward()
    (want[0].float().sum() + want[1].square().sum()).backward()
    for (name, tensor), other in zip(cast.tensors().items(), plain.tensors().values()):
        assert tensor.grad.dtype == tensor.dtype == torch.float32
        assert torch.equal(tensor.grad, other.grad), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_operator_itself_ignores_autocast(backend):
    # what it computes in is the dtype of its input; sums inside must not be cast once more
    args = stack_arguments(random_stack((16, 24), (0,), noise=None), backend)
    want = torch.ops.cips_kernels.modfc_stack(*args)
    with torch.autocast("cpu", torch.bfloat16):
        got = torch.ops.cips_kernels.modfc_stack(*args)
        grads = torch.autograd.grad(got[1].square().sum(), args[:3], create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in grads), args[:3])
    expected = torch.autograd.grad(want[1].square().sum(), args[:3], create_graph=True)
    expected_second = torch.autograd.grad(sum(g.square().sum() for g in expected), args[:3])
    for value, other in zip((*got, *grads, *second), (*want, *expected, *expected_second)):
        assert value.dtype == other.dtype and torch.equal(value, other)


@pytest.mark.parametrize("per_pixel", [False, True])
def test_module_under_autocast_keeps_its_styles_in_float32(per_pixel):
    torch.manual_seed(0)
    layer = FusedModFC(16, 24, 8)
    x, style = torch.randn(2, 9, 16), torch.randn(2, 9, 8) if per_pixel else torch.randn(2, 8)
    with torch.autocast("cpu", torch.bfloat16):
        got = layer(x, style, 3)
    assert got.dtype == torch.bfloat16 and torch.equal(got, layer(x.bfloat16(), style, 3))
    stack = FusedModFCStack([16, 24, 16], 8)
    with torch.autocast("cpu", torch.bfloat16):
        got = stack(x, torch.randn(2, 8).bfloat16(), 3)  # a style from a mapping network under autocast
    assert got.dtype == torch.float32


# --- compilation ----------------------------------------------------------------------------------------------------


def layouts() -> dict[str, Tensor]:
    planes = torch.randn(2, 6, 3, 4)
    return {
        "pixel-major": torch.randn(2, 12, 6),
        "planes": planes,
        "channels-last": planes.contiguous(memory_format=torch.channels_last),
    }


def compiled_and_not(backend: str, compiler: str, x: Tensor, dynamic: bool | None = None) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    stack = FusedModFCStack([6, 8, 7], 5, backend=backend)
    for parameter in stack.parameters():
        torch.nn.init.normal_(parameter)

    def function(x: Tensor, style: Tensor) -> tuple[Tensor, Tensor]:
        return stack(x * 2, style + 1, noise=7, return_features=True)

    def run(function, x: Tensor, style: Tensor) -> list[Tensor]:
        leaves = [x.detach().clone().requires_grad_(), style.clone().requires_grad_(), *stack.parameters()]
        features, rgb = function(*leaves[:2])
        loss = features.square().sum() + rgb.sum()
        return [features, rgb, *torch.autograd.grad(loss, leaves)]

    fast = torch.compile(function, fullgraph=True, backend=compiler, dynamic=dynamic)
    for version in (x, torch.cat([x, x], -2) if dynamic else x):
        style = torch.randn(2, 5)
        for value, want in zip(run(fast, version, style), run(function, version, style)):
            assert value.stride() == want.stride()
            assert relative_error(value, want) < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["pixel-major", "planes", "channels-last"])
def test_compile_gives_the_same(layout, backend):
    compiled_and_not(backend, "aot_eager", layouts()[layout])


def test_compile_with_dynamic_shapes():
    compiled_and_not("auto", "aot_eager", layouts()["pixel-major"], dynamic=True)


@pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="the compiler needs a C++ compiler"
)
def test_compile_with_inductor():
    compiled_and_not("auto", "inductor", layouts()["planes"])


def test_compile_of_fresh_noise_and_of_a_style_a_pixel():
    torch._dynamo.reset()
    layer = FusedModFC(6, 5, 4)
    torch.nn.init.ones_(layer.noise_strength)
    fast = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x, style = torch.randn(2, 7, 6), torch.randn(2, 7, 4)
    assert torch.equal(fast(x, style, 3), layer(x, style, 3))
    assert not torch.equal(fast(x, style[:, 0]), fast(x, style[:, 0]))
