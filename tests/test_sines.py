"""Layers with a sine against the official class's formula on planes, on every backend: values, gradients, second order,
what is kept, what is said."""

from __future__ import annotations

import importlib
import math
import warnings
import weakref

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import grouped
from cips_kernels import (
    Encoding,
    FusedModFC,
    FusedModFCStack,
    PreparedStack,
    blended,
    cuda_onchip,
    functional,
    reference,
)
from cips_kernels.activations import ACTIVATIONS, activate, activate_backward
from cips_kernels.spec import StackSpec
from cips_kernels.testing import (
    StackCase,
    assert_close_as_eager,
    poisoned_empty,
    random_stack,
    relative_error,
)
from official_formulas import Styled, sine

KINDS = ["sin", "sinrelu"]
BACKENDS = ["reference", "cpu", "triton"]
CASES = {
    "layers": dict(widths=(6, 5, 7), rgb_after=(0, 1), skip=True),
    "blocks": dict(widths=(6, 5, 4, 4, 3), rgb_after=(-1, 1, 3), blocks=((0, 1), (2, 2), (3, 3))),
    "shared": dict(widths=(4, 6, 3), rgb_after=(1,), shared=True),
    "no rgb": dict(widths=(4, 3, 5)),
}


@pytest.fixture(autouse=True)
def silent():
    """What is said once is said in another test."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield


def make(name: str, **options) -> StackCase:
    return random_stack(**{"batch": 2, "pixels": 11, "dtype": torch.float64, **CASES[name], **options})


def gradients(case: StackCase, outputs: tuple[Tensor | None, ...], **options) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)
    outputs = [out for out in outputs if out is not None]
    sent = [torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out) for out in outputs]
    leaves = case.tensors()
    found = torch.autograd.grad(outputs, list(leaves.values()), sent, allow_unused=True, **options)
    return {name: torch.zeros_like(t) if g is None else g for (name, t), g in zip(leaves.items(), found)}


def published(case: StackCase, kind: str) -> tuple[Tensor | None, Tensor | None]:
    return case.call(grouped.stack, tail=lambda y: sine(y, kind))


# --- the formulas ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 2, 5, 6])
@pytest.mark.parametrize("kind", KINDS)
def test_the_activation_and_its_written_out_derivative(kind, channels):
    y = torch.randn(2, 3, channels, dtype=torch.float64, requires_grad=True)
    gain = 1.0 if kind == "sin" else math.sqrt(2)
    want = sine(y.mT[..., None], kind)[..., 0].mT
    torch.testing.assert_close(activate(y, kind, 0.2, gain), want)
    grad = torch.randn(2, 3, channels, dtype=torch.float64, requires_grad=True)
    (by_autograd,) = torch.autograd.grad(want, y, grad)
    torch.testing.assert_close(activate_backward(grad, y, kind, 0.2, gain), by_autograd)
    assert gradcheck(lambda g, t: activate_backward(g, t, kind, 0.2, gain), (grad, y))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("outputs", [7, 6])
@pytest.mark.parametrize("kind", KINDS)
def test_a_module_is_the_official_layer(kind, outputs, backend):
    torch.manual_seed(0)
    official = Styled(6, outputs, 8, kind)
    with torch.no_grad():
        for p in official.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    layer = FusedModFC(6, outputs, 8, activation=kind, backend=backend)
    layer.load_state_dict(
        {
            "weight": official.conv.weight[0, :, :, 0, 0],
            "affine.weight": official.conv.modulation.weight,
            "affine.bias": official.conv.modulation.bias,
            "bias": official.bias.flatten(),
            "noise_strength": official.noise.weight.reshape(()),
        }
    )
    x, w, noise = torch.randn(2, 6, 3, 4), torch.randn(2, 8), torch.randn(2, 1, 3, 4)
    torch.testing.assert_close(layer(x, w, noise), official(x, w, noise), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer(x, w, "off"), official(x, w, None), rtol=1e-5, atol=1e-5)
    layer.backend = "auto"
    a_pixel = layer(x, w[:, None].expand(-1, 12, -1), noise)
    torch.testing.assert_close(a_pixel, official(x, w, noise), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("save", ["all", "some", "none"])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CASES)
def test_a_stack_and_its_gradients(name, kind, backend, save):
    ours, theirs = make(name).leaves(), make(name).leaves()
    with poisoned_empty():
        outputs = ours.call(functional.modfc_stack, activation=kind, backend=backend, save=save)
        got = gradients(ours, outputs)
    want_outputs = published(theirs, kind)
    for value, want in zip(outputs, want_outputs):
        assert (value is None) == (want is None) and (value is None or relative_error(value, want) < 1e-13)
    for key, want in gradients(theirs, want_outputs).items():
        assert relative_error(got[key], want) < 1e-12, key
    with torch.no_grad():
        for value, want in zip(make(name).call(functional.modfc_stack, activation=kind, backend=backend), outputs):
            assert value is None or relative_error(value, want) < 1e-13


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_of_one_output_alone(kind):
    ours, theirs = make("blocks").leaves(), make("blocks").leaves()
    rgb = ours.call(functional.modfc_stack, activation=kind, want_features=False)[1]
    got = gradients(ours, (rgb,))
    for key, want in gradients(theirs, published(theirs, kind)[1:]).items():
        assert relative_error(got[key], want) < 1e-12, key


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CASES)
def test_gradcheck_and_gradgradcheck(name, kind):
    widths = (3, 2, 3, 2, 2)[: len(CASES[name]["widths"])]
    case = make(name, widths=widths, pixels=2).leaves()

    def stack(*leaves: Tensor):
        rest = iter(leaves)
        outputs = case.map(lambda _name, _tensor: next(rest)).call(functional.modfc_stack, activation=kind, eps=0.01)
        return tuple(out for out in outputs if out is not None)

    leaves = tuple(case.tensors().values())
    assert gradcheck(stack, leaves) and gradgradcheck(stack, leaves, fast_mode=name != "no rgb")


@pytest.mark.parametrize("kind", KINDS)
def test_the_oracle_and_a_blend(kind):
    case = make("blocks", blended=3).leaves()
    got = case.call(functional.modfc_stack, activation=kind)
    alone = case.map(lambda name, t: t[:, 1] if "styles" in name else t)
    plain = StackCase(**{**vars(alone), "blend": None})
    one = torch.zeros(11, 3, dtype=torch.float64)
    one[:, 1] = 1
    for blend in (one, one.expand(2, -1, -1)):
        for value, want in zip(case.call(functional.modfc_stack, activation=kind, blend=blend), published(plain, kind)):
            assert relative_error(value, want) < 1e-12
    for value, want in zip(got, case.call(reference.modfc_stack, activation=kind)):
        assert relative_error(value, want) < 1e-13


def test_gain_and_slope_are_the_official_ones_unless_given():
    gains = {kind: FusedModFC(3, 4, 5, activation=kind).gain for kind in ACTIVATIONS}
    assert gains == {"lrelu": math.sqrt(2), "linear": math.sqrt(2), "sin": 1.0, "sinrelu": math.sqrt(2)}
    x, weight, style = torch.randn(1, 9, 3), torch.randn(4, 3), torch.randn(1, 3)
    plain, twice = (functional.modfc(x, weight, style, activation="sin", gain=g) for g in (None, 2.0))
    torch.testing.assert_close(twice, 2 * plain)
    steep = functional.modfc(x, weight, style, activation="sinrelu", negative_slope=0.7)
    flat = functional.modfc(x, weight, style, activation="sinrelu")
    y = functional.modfc(x, weight, style, activation="linear", gain=1.0)
    assert torch.equal(steep[..., 2:], flat[..., 2:])
    torch.testing.assert_close(steep[..., :2], torch.where(y > 0, y, 0.7 * y)[..., ::2] * math.sqrt(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_error_is_that_of_eager(kind, dtype):
    case = random_stack((40, 48, 32), (0, 1), pixels=67, dtype=dtype)
    exact, eager = published(case.cast(torch.float64), kind), case.call(reference.modfc_stack, activation=kind)
    for backend in ("cpu", "triton"):
        found = case.call(functional.modfc_stack, activation=kind, backend=backend)
        for name, value, rough, fine in zip(("features", "rgb"), found, eager, exact):
            assert_close_as_eager(f"{backend} {name}", value, rough, fine)


def test_a_backward_makes_outputs_anew_and_holds_few(monkeypatch):
    case = random_stack((4,) * 9, (7,)).leaves()
    rgb = case.call(functional.modfc_stack, activation="sin", want_features=False)[1]
    made, most, inner = [], [], reference.activate

    def watched(*arguments) -> Tensor:
        out = inner(*arguments)
        made.append(weakref.ref(out))
        most.append(sum(each() is not None for each in made))
        return out

    monkeypatch.setattr(reference, "activate", watched)
    rgb.sum().backward()
    assert len(made) >= 8 and max(most) <= 3


# --- as operators ---------------------------------------------------------------------------------------------------


def test_a_compiler_sees_one_operator():
    stack = FusedModFCStack([6, 5, 4], 7, activation="sin")
    x, style = torch.randn(2, 11, 6, requires_grad=True), torch.randn(2, 7)
    fast, plain = (f(x, style, 3).square().sum() for f in (torch.compile(stack, fullgraph=True, backend="aot_eager"), stack))
    torch.testing.assert_close(fast, plain)
    for got, want in zip(torch.autograd.grad(fast, [x]), torch.autograd.grad(plain, [x])):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("noise", [5, "given"])
def test_chunks_are_the_whole(noise, monkeypatch):
    case = make("layers", noise=noise)
    with torch.no_grad():
        whole = case.call(functional.modfc_stack, activation="sin")
        monkeypatch.setattr(blended, "_CHUNK_ROWS", 6)
        parts = case.call(functional.modfc_stack, activation="sin")
    for a, b in zip(whole, parts):
        assert relative_error(b, a) < 1e-6 if noise == 5 else relative_error(b, a) < 1e-13


@pytest.mark.parametrize("kind", KINDS)
def test_colours_of_an_encoding_and_a_prepared_stack(kind):
    stack = FusedModFCStack([8, 6, 5, 4], 7, activation=kind, noise=True)
    with torch.no_grad():
        for layer in stack.layers:
            layer.noise_strength.fill_(0.5)
            layer.bias.normal_()
    encoding = Encoding(torch.randn(3, 2), torch.randn(3), torch.randn(4, 6, 5), None, (4, 6))
    style = torch.randn(2, 7)
    kept = stack(encoding, style, 3, return_features=True)[1].detach()
    with torch.no_grad():
        torch.testing.assert_close(stack(encoding, style, 3), kept, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(PreparedStack(stack)(encoding, style, 3), kept, rtol=1e-5, atol=1e-5)
    assert f"activation={kind!r}" in repr(stack) and "activation" not in FusedModFCStack([8, 6], 7).extra_repr()


def test_no_pixels_and_no_images():
    stack = FusedModFCStack([6, 5, 4], 7, activation="sin")
    assert stack(torch.zeros(2, 0, 6), torch.zeros(2, 7), layout="bpc").shape == (2, 0, 3)
    assert stack(torch.zeros(0, 4, 6), torch.zeros(0, 7)).shape == (0, 4, 3)


# --- what is said ---------------------------------------------------------------------------------------------------


def test_a_backend_of_fused_kernels_says_once_that_it_does_not_serve():
    case = make("blocks", dtype=torch.float32)
    importlib.import_module("cips_kernels.backends")._warned.clear()
    said = "reference formulation, which is slower: its activation is 'sin', which the kernels of 'triton' do not have in residual"
    with pytest.warns(RuntimeWarning, match=said):
        case.call(functional.modfc_stack, activation="sin", backend="triton")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        case.call(functional.modfc_stack, activation="sin", backend="triton")
        case.call(functional.modfc_stack, activation="sinrelu", backend="cpu")
        make("layers", dtype=torch.float32).call(functional.modfc_stack, activation="sin", backend="triton")


def test_the_on_chip_kernel_refuses():
    spec = StackSpec((64, 64), (0,), activation="sin")
    assert cuda_onchip.why_not(spec, torch.bfloat16) == "the activation is 'sin', not a leaky ReLU"
    assert cuda_onchip.why_not(StackSpec((64, 64), (0,)), torch.bfloat16) is None


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["auto", "triton", "cuda"])
@pytest.mark.parametrize("kind", KINDS)
def test_on_a_gpu(kind, backend):
    case = random_stack((64, 48, 64), (0, 1), batch=2, pixels=300, dtype=torch.bfloat16, device="cuda").leaves()
    found = case.call(functional.modfc_stack, activation=kind, want_features=False, backend=backend)[1]
    exact, eager = (case.cast(d).call(reference.modfc_stack, activation=kind)[1] for d in (torch.float64, torch.bfloat16))
    assert_close_as_eager("rgb", found, eager, exact)
    for key, grad in gradients(case, (found,)).items():
        assert grad.isfinite().all(), key
    with torch.no_grad():
        again = case.call(functional.modfc_stack, activation=kind, want_features=False, backend=backend)[1]
    assert_close_as_eager("without gradients", again, eager, exact)


@pytest.mark.gpu
@torch.no_grad()
def test_a_graph_of_a_prepared_stack_on_a_gpu():
    stack = FusedModFCStack([8, 6, 5, 4], 7, activation="sinrelu").cuda()
    encoding = Encoding(*(torch.randn(n, device="cuda") for n in ((3, 2), (3,), (4, 6, 5))), None, (4, 6))
    style, prepared = torch.randn(2, 7, device="cuda"), PreparedStack(stack)
    want = stack(encoding, style, 3)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = prepared(encoding, style, 3)
    graph.replay()
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)
