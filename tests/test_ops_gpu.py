"""The operators on a GPU, for each backend that serves there: registration, compilation, CUDA graphs, streams, devices,
autocast, second derivatives. The same on a CPU is in test_ops.py."""

from __future__ import annotations

import importlib
from collections.abc import Callable

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

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda", 0)
# matrices and activations fill their places, so that no gap is left uninitialised in what opcheck compares
WIDTHS, BATCH, PIXELS = (64, 128, 64), 2, 64
TENSORS = len(StackInputs._fields)


@pytest.fixture(params=["triton", "cuda"])
def backend(request) -> str:
    reason = importlib.import_module("cips_kernels.backends").why_not(request.param, DEVICE, torch.float32)
    if reason is not None:
        pytest.skip(reason)
    return request.param


@pytest.fixture(autouse=True)
def exact_float32():
    """Products of float32 in float32, whatever was set before."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def make(dtype: torch.dtype = torch.float32, **options) -> StackCase:
    options = {"batch": BATCH, "pixels": PIXELS, "skip": True, "seed": 1, **options}
    return random_stack(WIDTHS, (0, 1), dtype=dtype, device=DEVICE, **options)


def stack_arguments(case: StackCase, backend: str, save: str = "all") -> tuple:
    """The arguments of the operator `modfc_stack`, as leaves."""
    inputs, spec = case.call(lambda x, *a, layout, **k: stack_call(x, *a, **k))
    leaves = [t if t is None else t.detach().requires_grad_(save != "none" and t.is_floating_point()) for t in inputs]
    return *leaves, *ops._spec_values(spec), True, save, backend


def run(case: StackCase, function: Callable, **options) -> dict[str, Tensor]:
    """Outputs and every gradient of a fixed loss, by name."""
    leaves = case.leaves()
    features, rgb = leaves.call(function, **options)
    generator = torch.Generator(DEVICE).manual_seed(5)
    sent = [
        torch.randn(out.shape, generator=generator, device=DEVICE).to(out.dtype) for out in (features, rgb)
    ]
    tensors = leaves.tensors()
    grads = torch.autograd.grad((features, rgb), list(tensors.values()), sent)
    return {"features": features.detach(), "rgb": rgb.detach(), **dict(zip(tensors, grads))}


def check(values: dict[str, Tensor], case: StackCase) -> None:
    """The error rule for every output and gradient."""
    eager = run(case, reference.modfc_stack)
    exact = run(case.cast(torch.float64), reference.modfc_stack)
    for name, value in values.items():
        # one number has no average error: the eager one may be right by chance
        assert_close_as_eager(name, value, eager[name], exact[name], 2.0 if value.numel() > 8 else 8.0)


# --- registration ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"noise": 7}, {"shared": True}, {"noise": None, "skip": False}, {"blocks": ((0, 0), (1, 1))}],
    ids=str,
)
def test_opcheck_stack(backend, options):
    opcheck(torch.ops.cips_kernels.modfc_stack.default, stack_arguments(make(**options), backend))


def test_opcheck_stack_on_planes(backend):
    case = make().map(lambda name, t: t.transpose(1, 2).contiguous().transpose(1, 2) if name == "x" else t)
    opcheck(torch.ops.cips_kernels.modfc_stack.default, stack_arguments(case, backend))


def test_opcheck_stack_backward(backend):
    args = stack_arguments(make(), backend)
    features, rgb, activations, mods = (t.detach() for t in torch.ops.cips_kernels.modfc_stack(*args))
    sent = [torch.randn_like(out).requires_grad_() for out in (features, rgb)]
    arguments = (*sent, *args[:TENSORS], features, activations, mods, *args[TENSORS:-3], "all", [True] * 4, backend)
    opcheck(torch.ops.cips_kernels.modfc_stack_backward.default, arguments)


def test_opcheck_modulate(backend):
    weight, style = torch.randn(64, 48, device=DEVICE), torch.randn(2, 48, device=DEVICE)
    grad = torch.randn(2, 64, 48, device=DEVICE)
    leaves = [t.requires_grad_() for t in (grad, weight, style)]
    opcheck(torch.ops.cips_kernels.modulate.default, (*leaves[1:], True, 1e-8, torch.float32, backend))
    opcheck(torch.ops.cips_kernels.modulate_backward.default, (*leaves, True, 1e-8, backend))


# --- numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_that_of_eager_and_everything_is_written(backend, dtype):
    case = make(dtype, pixels=1000)
    with poisoned_empty():
        values = run(case, functional.modfc_stack, backend=backend)
    check(values, case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_every_run(backend, dtype):
    case = make(dtype, pixels=5000, noise=3)
    first = run(case, functional.modfc_stack, backend=backend)
    for _ in range(3):
        for name, value in run(case, functional.modfc_stack, backend=backend).items():
            assert torch.equal(value, first[name]), name


def test_second_derivatives(backend):
    """A gradient penalty, and the same differentiated once more."""
    case = make(batch=2, pixels=40)

    def penalties(function: Callable, **options) -> dict[str, Tensor]:
        leaves = case.leaves() if not options.pop("exact", False) else case.cast(torch.float64).leaves()
        tensors = leaves.tensors()
        features, rgb = leaves.call(function, **options)
        loss, found = features.square().mean() + rgb.square().mean(), {}
        for order in range(3):
            grads = torch.autograd.grad(loss, list(tensors.values()), create_graph=order < 2)
            found |= {f"order {order + 1}, {name}": grad for name, grad in zip(tensors, grads)}
            loss = sum(grad.square().sum() for grad in grads)
        return found

    exact = penalties(reference.modfc_stack, exact=True)
    for name, value in penalties(functional.modfc_stack, backend=backend).items():
        assert relative_error(value, exact[name]) < 1e-3, name


def test_double_backward_in_bfloat16(backend):
    case = make(torch.bfloat16, pixels=100)

    def penalty(function: Callable, case: StackCase, **options) -> list[Tensor]:
        leaves = case.leaves()
        rgb = leaves.call(function, **options)[1]
        grads = torch.autograd.grad(rgb.square().mean(), leaves.styles, create_graph=True)
        return list(
            torch.autograd.grad(sum(g.square().sum() for g in grads), [*leaves.weights, *leaves.rgb_weights])
        )

    exact = penalty(reference.modfc_stack, case.cast(torch.float64))
    eager = relative_error(penalty(reference.modfc_stack, case), exact)
    # both square gradients of few numbers, whose errors differ by chance
    assert relative_error(penalty(functional.modfc_stack, case, backend=backend), exact) <= 3 * eager


# --- autocast -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_a_cast_of_the_input(backend, dtype):
    case = make(pixels=300)

    def with_autocast(*args, **kwargs):
        with torch.autocast("cuda", dtype):
            return functional.modfc_stack(*args, **kwargs)

    def with_cast(x, *args, **kwargs):
        return functional.modfc_stack(x.to(dtype), *args, **kwargs)

    got, want = run(case, with_autocast, backend=backend), run(case, with_cast, backend=backend)
    assert got["features"].dtype == dtype and got["rgb"].dtype == torch.float32
    for name, value in got.items():
        assert value.dtype == want[name].dtype and torch.equal(value, want[name]), name


# --- compilation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("order", ["pixel-major", "planes", "channels-last"])
def test_compile_gives_the_same(backend, compiler, order):
    torch._dynamo.reset()
    torch.manual_seed(0)
    stack = FusedModFCStack(WIDTHS, 32, backend=backend).to(DEVICE)
    for parameter in stack.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(BATCH, WIDTHS[0], 8, 12, device=DEVICE)
    x = x.flatten(2).transpose(1, 2).contiguous() if order == "pixel-major" else x
    x = x.contiguous(memory_format=torch.channels_last) if order == "channels-last" else x
    style = torch.randn(BATCH, 32, device=DEVICE)

    def function(x: Tensor, style: Tensor) -> tuple[Tensor, Tensor]:
        return stack(x * 2, style + 1, noise=7, return_features=True)

    def outcome(function: Callable) -> list[Tensor]:
        leaves = [x.clone().requires_grad_(), style.clone().requires_grad_(), *stack.parameters()]
        features, rgb = function(*leaves[:2])
        return [features, rgb, *torch.autograd.grad(features.square().mean() + rgb.mean(), leaves)]

    fast = torch.compile(function, fullgraph=True, backend=compiler)
    for value, want in zip(outcome(fast), outcome(function)):
        assert value.stride() == want.stride() and relative_error(value, want) < 1e-4


@pytest.mark.parametrize("mode", ["reduce-overhead"])
def test_compile_with_its_own_cuda_graphs(backend, mode):
    torch._dynamo.reset()
    torch.manual_seed(0)
    stack = FusedModFCStack(WIDTHS, 32, backend=backend).to(DEVICE)
    x, style = torch.randn(1, 100, WIDTHS[0], device=DEVICE), torch.randn(BATCH, 32, device=DEVICE)
    fast = torch.compile(lambda style: stack(x, style, noise=3), fullgraph=True, mode=mode)
    want = stack(x, style, noise=3)
    for _ in range(4):  # warm-up, recording, replays
        torch.compiler.cudagraph_mark_step_begin()
        got = fast(style)
        assert relative_error(got, want) < 1e-4
        grads = torch.autograd.grad(got.square().mean(), list(stack.parameters()), allow_unused=True)
    for value, expected in zip(grads, torch.autograd.grad(want.square().mean(), list(stack.parameters()))):
        assert relative_error(value, expected) < 1e-4


def test_compile_of_what_no_fused_kernel_serves():
    torch._dynamo.reset()
    layer = FusedModFC(48, 64, 32).to(DEVICE)
    x, style = torch.randn(BATCH, 90, 48, device=DEVICE), torch.randn(BATCH, 90, 32, device=DEVICE)
    fast = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.autocast("cuda", torch.bfloat16):
        assert relative_error(fast(x, style, 3), layer(x, style, 3)) < 1e-2
    assert relative_error(fast(x, style, 3), layer(x, style, 3)) < 1e-5


# --- CUDA graphs ----------------------------------------------------------------------------------------------------


def captured(step: Callable[[], object]) -> tuple[torch.cuda.CUDAGraph, object]:
    """`step` warmed up on a stream of its own and captured: the graph, and what the captured call returned."""
    stream = torch.cuda.Stream(DEVICE)
    stream.wait_stream(torch.cuda.current_stream(DEVICE))
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream(DEVICE).wait_stream(stream)
    torch.cuda.synchronize(DEVICE)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    return graph, result


def test_graph_of_forward_and_backward_follows_its_inputs(backend):
    case = make(pixels=500).leaves()
    seed = torch.tensor(1, device=DEVICE)
    sent = torch.randn(BATCH, 500, 3, device=DEVICE)
    tensors = case.tensors()
    leaves = [tensors[name] for name in tensors if name != "noise"]

    def step() -> list[Tensor]:
        rgb = case.call(functional.modfc_stack, noise=seed, backend=backend)[1]
        return [rgb, *torch.autograd.grad(rgb, leaves, sent)]

    graph, static = captured(step)
    for value in (5, 6):
        seed.fill_(value)
        with torch.no_grad():
            for tensor in (case.x, *case.weights, *case.styles):
                tensor.add_(0.1 * torch.randn_like(tensor))
        graph.replay()
        torch.cuda.synchronize(DEVICE)
        for k, (got, want) in enumerate(zip(static, step())):
            assert torch.equal(got, want), k


def test_graph_draws_fresh_noise_in_every_replay_and_again_in_its_backward(backend):
    layer = FusedModFC(64, 64, 16, activation="linear", gain=1.0, backend=backend).to(DEVICE)
    torch.nn.init.ones_(layer.noise_strength)
    # x = 0, unit strength: the output is the noise itself, and dnu = sum of gradient times noise
    x, style = torch.zeros(BATCH, 500, 64, device=DEVICE), torch.randn(BATCH, 16, device=DEVICE)
    sent = torch.randn(BATCH, 500, 64, device=DEVICE)

    def step() -> tuple[Tensor, Tensor]:
        y = layer(x, style)
        return y, torch.autograd.grad(y, layer.noise_strength, sent)[0]

    graph, (y, grad) = captured(step)
    seen = []
    for _ in range(3):
        graph.replay()
        torch.cuda.synchronize(DEVICE)
        seen.append(y.detach().clone())
        assert abs(y.std().item() - 1) < 0.1
        assert grad.item() == pytest.approx((y.double() * sent.double()).sum().item(), rel=1e-3, abs=0.1)
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])


# --- streams, devices, waiting --------------------------------------------------------------------------------------


def test_runs_on_the_current_stream(backend):
    case = make(pixels=2000, noise=3)
    want = run(case, functional.modfc_stack, backend=backend)
    torch.cuda.synchronize(DEVICE)
    late = case.map(lambda _, t: torch.zeros_like(t))
    stream = torch.cuda.Stream(DEVICE)
    torch.cuda.synchronize(DEVICE)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # what ran on another stream would read zeros
        for name, tensor in late.tensors().items():
            tensor.copy_(case.tensors()[name])
        got = run(late, functional.modfc_stack, backend=backend)
    stream.synchronize()
    for name, value in got.items():
        assert torch.equal(value, want[name]), name


def test_runs_on_the_device_of_its_input(backend):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    case = make(noise=3)
    want = case.call(functional.modfc_stack, backend=backend)
    assert torch.cuda.current_device() == 0
    other = case.to("cuda:1").leaves()
    got = other.call(functional.modfc_stack, backend=backend)
    got[1].sum().backward()
    for value, expected in zip(got, want):
        assert value.device == other.x.grad.device == torch.device("cuda", 1)
        assert torch.equal(value.to(DEVICE), expected)


def test_does_not_wait_for_the_gpu(backend):
    stack = FusedModFCStack(WIDTHS, 32, backend=backend).to(DEVICE)
    x = torch.randn(1, 100, WIDTHS[0], device=DEVICE)
    style = torch.randn(BATCH, 32, device=DEVICE)

    def step() -> None:
        stack(x, style).square().mean().backward()

    step()
    torch.cuda.synchronize(DEVICE)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_inference_keeps_nothing(backend):
    stack = FusedModFCStack([128] * 9, 32, backend=backend).to(DEVICE).bfloat16()
    x = torch.randn(1, 65536, 128, device=DEVICE, dtype=torch.bfloat16)
    style = torch.randn(1, 32, device=DEVICE, dtype=torch.bfloat16)

    def peak(**options) -> int:
        torch.cuda.reset_peak_memory_stats(DEVICE)
        before = torch.cuda.memory_allocated(DEVICE)
        stack(x, style, **options)
        return torch.cuda.max_memory_allocated(DEVICE) - before

    training = peak()
    with torch.no_grad():
        inference = peak()
    one = 65536 * 128 * 2  # bytes of one activation; eight layers are kept for a backward
    assert training > 6 * one and inference < 4.5 * one
