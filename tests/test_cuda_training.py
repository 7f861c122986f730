"""Training on chip on a GPU: every gradient against the float64 oracle, the same bits twice."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

from cips_kernels import (
    cuda_onchip,
    cuda_saved,
    cuda_stack,
    cuda_training,
    functional,
    ops,
    recompute,
    reference,
)
from cips_kernels.arguments import stack_call
from cips_kernels.spec import Needs, StackSpec
from cips_kernels.testing import StackCase, assert_close_as_eager, poisoned_empty, random_stack

PAPER = ((1024, *(512,) * 15), tuple(range(2, 15, 2)))
STACKS = {
    "paper": PAPER,
    "released, 1024": ((512, 512, 512, 256, 128, 64, 32, 32), (0, 2, 4, 6)),
    "one layer": ((64, 128), (0,)),
    "several that read one": ((96, 160, 96, 416, 32), (0, 3, 3)),
    "widening": ((16, 32, 512, 64, 384), (1, 3)),
    "wide, odd input": ((700, 512, 512), (1,)),
}


pytestmark = pytest.mark.usefixtures("served")


def make(stack: str, **options) -> StackCase:
    return random_stack(*STACKS[stack], device="cuda", **{"dtype": torch.bfloat16, "noise": 5, **options})


def gradients(case: StackCase, function=functional.modfc_stack, **options) -> dict[str, Tensor]:
    """The RGB sum, and the gradients of a fixed loss of it, by name."""
    leaves = case.leaves()
    with poisoned_empty(), warnings.catch_warnings():
        warnings.simplefilter("error")
        rgb = leaves.call(function, **options)[1]
        tensors = {name: t for name, t in leaves.tensors().items() if t.requires_grad}
        sent = loss_gradient(rgb, options.get("layout", "bpc"))
        found = torch.autograd.grad(rgb, list(tensors.values()), sent, allow_unused=True)
    return {"rgb": rgb.detach(), **{name: g for name, g in zip(tensors, found) if g is not None}}


def loss_gradient(rgb: Tensor, layout: str = "bpc") -> Tensor:
    """The same numbers for the same pixels and colours."""
    batch, *rest = rgb.shape
    shape = (batch, *rest) if layout == "bpc" else (batch, *rest[1:], rest[0])
    sent = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(rgb)
    return sent if layout == "bpc" else sent.movedim(-1, 1)


def on_chip(case: StackCase, **options) -> dict[str, Tensor]:
    return gradients(case, backend="cuda", want_features=False, **options)


def check(*cases: StackCase, **options) -> dict[str, Tensor]:
    """The oracle rule for every gradient over all of the cases, and the same bits twice. The first case's.

    By several cases, since a gradient that is wrong where few signs are wrong has no average error in one: that of a
    layer of 32 channels from 400 points comes out at a sixth to four times eager's, from 64 points at up to two and a half.
    """
    found, eager, exact = [], [], []
    for case in cases:
        ours, again = on_chip(case, **options), on_chip(case, **options)
        truth = gradients(case.cast(torch.float64), reference.modfc_stack, **options)
        for name, value in ours.items():
            assert torch.equal(value, again[name]), f"{name}: not the same bits twice"
        for name in ours.keys() - truth.keys():  # no noise: strengths that the oracle does not use
            assert not ours.pop(name).any(), name
        assert ours.keys() == truth.keys()
        found.append(ours)
        exact.append(truth)
        eager.append(gradients(case, reference.modfc_stack, **options))
    joined, plain, true = (join(values) for values in (found, eager, exact))
    for name, value in joined.items():
        if not true[name].any():
            assert not value.any(), name
            continue
        # a few numbers, each a sum that cancels, have no average error either
        factor = 2.0 if value.numel() > 16 * len(cases) else 8.0
        assert_close_as_eager(name, value, plain[name], true[name], factor)
    return found[0]


def join(values: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """All cases' numbers by name, the noise strengths, one a layer, as one vector."""
    stacked = {name: torch.stack([v[name] for v in values]) for name in values[0]}
    strengths = [name for name in stacked if name.startswith("noise_strengths[")]
    rest = {name: t for name, t in stacked.items() if name not in strengths}
    return {**rest, "noise_strengths": torch.stack([stacked[name] for name in strengths])} if strengths else rest


def draws(stack: str, count: int = 4, **options) -> list[StackCase]:
    """The same stack with other numbers, `count` times."""
    return [make(stack, seed=seed, **options) for seed in range(count)]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """The parts of every chain that runs."""
    seen: list[tuple] = []
    plain = cuda_training._Chain._launch
    monkeypatch.setattr(
        cuda_training._Chain, "_launch", lambda self, *part: (seen.append(part), plain(self, *part))[1]
    )
    return seen


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("stack", STACKS)
def test_every_width(stack: str, shared: bool, dtype: torch.dtype, launches: list) -> None:
    check(*draws(stack, batch=3, pixels=300, shared=shared, dtype=dtype))
    assert launches, "the chain did not run on chip"


@pytest.mark.gpu
@pytest.mark.parametrize("pixels", [1, 127, 128, 129, 257, 65536])
def test_every_number_of_pixels(pixels: int) -> None:
    if pixels > 1000:
        check(make("released, 1024", batch=1, pixels=pixels))
    else:
        check(*draws("released, 1024", 16 if pixels == 1 else 4, batch=16, pixels=pixels))


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 3, 16])
def test_every_batch(batch: int) -> None:
    check(make("paper", batch=batch, pixels=1000, shared=True))


@pytest.mark.gpu
@pytest.mark.parametrize("noise", [None, 2**62 + 12345, "given", "points", "points an image"])
def test_every_noise(noise: int | str | None) -> None:
    coords = None
    if noise in ("points", "points an image"):
        shape = (200, 2) if noise == "points" else (3, 200, 2)
        coords = torch.rand(shape, generator=torch.Generator().manual_seed(1)).cuda() * 2 - 1
    kind = noise if noise is None or isinstance(noise, int) else "given" if noise == "given" else 77
    check(*draws("released, 1024", batch=3, pixels=200, noise=kind), coords=coords)


@pytest.mark.gpu
@pytest.mark.parametrize("channels", [1, 2, 3])
def test_channels_and_skip(channels: int) -> None:
    check(*draws("several that read one", batch=2, pixels=130, channels=channels, skip=True))


@pytest.mark.gpu
@pytest.mark.parametrize("demodulate", [True, False])
@pytest.mark.parametrize(("negative_slope", "gain"), [(0.0, 2.0), (0.2, 1.0), (0.5, 3.0)])
def test_constants(demodulate: bool, negative_slope: float, gain: float) -> None:
    cases = draws("released, 1024", batch=2, pixels=1000)
    check(*cases, demodulate=demodulate, negative_slope=negative_slope, gain=gain)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [256, 768, 1024])
def test_parts_of_images_and_pixels(rows: int, monkeypatch: pytest.MonkeyPatch, launches: list) -> None:
    """Images a few at a time, and an image by its pixels."""
    whole = check(make("released, 1024", batch=3, pixels=1000, noise="given"))
    launches.clear()
    monkeypatch.setattr(cuda_training._Chain, "_parts", lambda self: recompute.parts(3, 1000, rows))
    found = check(make("released, 1024", batch=3, pixels=1000, noise="given"))
    assert len(set(launches)) > 1
    for name in ("rgb", "x", "noise"):
        assert torch.equal(found[name], whole[name])


@pytest.mark.gpu
def test_layouts_of_the_input() -> None:
    case = random_stack(
        (512, 64, 64), (1,), batch=2, pixels=180, dtype=torch.bfloat16, device="cuda", noise=3
    )
    expected = check(case)

    def planes(name: str, t: Tensor) -> Tensor:
        return t.mT.contiguous() if name == "x" else t

    found = check(case.map(planes), layout="bcp")
    for name in ("rgb", "x"):
        assert torch.equal(found[name].mT, expected[name]), name


@pytest.mark.gpu
@pytest.mark.parametrize("alone", ["x", "weights", "biases", "noise_strengths", "styles"])
def test_some_gradients_alone(alone: str) -> None:
    """What needs no gradient is not computed, and what does is the same."""
    case = make("released, 1024", batch=2, pixels=200)
    whole = on_chip(case)
    leaves = case.map(lambda name, t: t.detach().requires_grad_(name == alone))
    rgb = leaves.call(functional.modfc_stack, backend="cuda", want_features=False)[1]
    sent = loss_gradient(rgb)
    tensors = {name: t for name, t in leaves.tensors().items() if t.requires_grad}
    assert tensors
    for (name, _), grad in zip(tensors.items(), torch.autograd.grad(rgb, list(tensors.values()), sent)):
        assert torch.equal(grad, whole[name]), name


@pytest.mark.gpu
def test_opcheck_and_compile() -> None:
    """The operator that keeps signs is registered right, and a compiler gives the same bits."""
    case = make("released, 1024", batch=2, pixels=256)
    inputs, spec = case.call(lambda x, *a, layout, **k: stack_call(x, *a, **k))
    leaves = [t if t is None else t.detach().requires_grad_(t.is_floating_point()) for t in inputs]
    opcheck(torch.ops.cips_kernels.modfc_stack.default, (*leaves, *ops._spec_values(spec), False, "all", "cuda"))
    plain = on_chip(case)
    compiled = torch.compile(functional.modfc_stack, fullgraph=True, backend="aot_eager")
    found = gradients(case, compiled, backend="cuda", want_features=False)
    for name, value in plain.items():
        assert torch.equal(found[name], value), name


def slopes(case: StackCase, directions: list[StackCase]) -> Tensor:
    """The loss's derivative along each direction by central differences of the float64 oracle's forward."""
    step = 1e-6

    def loss(sign: float, direction: StackCase) -> Tensor:
        moves = direction.tensors()
        count = {name: iter([moves[n] for n in moves if n.split("[")[0] == name]) for name in {n.split("[")[0] for n in moves}}
        moved = case.map(lambda name, t: t + sign * step * next(count[name]) if t.is_floating_point() else t)
        rgb = moved.call(reference.modfc_stack)[1]
        return (rgb * loss_gradient(rgb)).sum()

    return torch.stack([(loss(1, d) - loss(-1, d)) / (2 * step) for d in directions])


def along(gradient: dict[str, Tensor], direction: StackCase) -> Tensor:
    moves = direction.tensors()
    return sum((g.double() * moves[name]).sum() for name, g in gradient.items() if name in moves)


@pytest.mark.gpu
def test_slopes_along_random_directions() -> None:
    """Of everything at once, by differences: a truth that knows no backward."""
    case = make("released, 1024", batch=2, pixels=500, noise="given")
    exact = case.cast(torch.float64)
    generator = torch.Generator().manual_seed(7)

    def draw(_: str, t: Tensor) -> Tensor:
        return torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.device)

    directions = [exact.map(draw) for _ in range(40)]
    truth = slopes(exact, directions)
    found, eager = on_chip(case), gradients(case, reference.modfc_stack)
    ours, theirs = (torch.stack([along(g, d) for d in directions]) for g in (found, eager))
    assert_close_as_eager("slopes", ours, theirs, truth)


@pytest.mark.gpu
@pytest.mark.parametrize("stack", ["paper", "several that read one"])
def test_what_rounding_leaves_of_the_colours_gradient(stack: str) -> None:
    """No bfloat16 number is 1 + 2^-9, so dRGB enters products as two. Every gradient is linear in it: that of
    dRGB = 1 + 2^-9 is, but for roundings, that many times that of dRGB = 1, and rounded to one number both are the same."""
    step = 2.0**-9
    assert torch.tensor(1 + step, dtype=torch.bfloat16).item() == 1
    case = make(stack, batch=2, pixels=1000).leaves()
    tensors = {name: t for name, t in case.tensors().items() if name.split("[")[0] in ("x", "weights", "rgb_weights")}
    rgb = case.call(functional.modfc_stack, backend="cuda", want_features=False)[1]
    sent = torch.ones_like(rgb)
    one = torch.autograd.grad(rgb, list(tensors.values()), sent, retain_graph=True)
    more = torch.autograd.grad(rgb, list(tensors.values()), (1 + step) * sent)
    for name, a, b in zip(tensors, one, more):
        a, b = a.double().flatten(), b.double().flatten()
        found = (a @ b / (a @ a) - 1).item() / step  # of the step; roundings of thousands of numbers are not alike
        assert abs(found - 1) < 0.25, f"{name}: {found:.2f} of the step"


@pytest.mark.gpu
def test_twice_and_after_a_graph() -> None:
    """A kept graph gives the same again; so does a captured one."""
    case = make("released, 1024", batch=2, pixels=600).leaves()
    tensors = [t for t in case.tensors().values() if t.requires_grad]
    rgb = case.call(functional.modfc_stack, backend="cuda", want_features=False)[1]
    sent = torch.ones_like(rgb)
    first = torch.autograd.grad(rgb, tensors, sent, retain_graph=True, allow_unused=True)
    second = torch.autograd.grad(rgb, tensors, sent, allow_unused=True)
    del rgb  # its graph would tie the capture to this stream
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())

    def step() -> tuple:
        out = case.call(functional.modfc_stack, backend="cuda", want_features=False)[1]
        return torch.autograd.grad(out, tensors, sent, allow_unused=True)

    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        third = step()
    graph.replay()
    for a, b, c in zip(first, second, third, strict=True):
        assert (a is None and c is None) or (torch.equal(a, b) and torch.equal(a, c))


def test_what_is_not_served_is_named() -> None:
    def reason(
        widths: tuple[int, ...], rgb_after: tuple[int, ...], dtype=torch.bfloat16, **options
    ) -> str | None:
        return cuda_saved.why_not(StackSpec(widths, rgb_after, **options), dtype)

    assert reason(*PAPER) is None
    assert "float32" in reason(*PAPER, dtype=torch.float32)
    assert "blocks" in reason((64, 64, 64, 64), (2,), blocks=((1, 2),))
    assert "last layer" in reason((64, 64, 64), (0,))
    assert "multiples of 32" in reason((64, 48, 64), (1,))


@pytest.mark.parametrize(("pixels", "batch"), [(1, 1), (256, 2), (257, 3)])
def test_what_is_kept(pixels: int, batch: int) -> None:
    """Every output once, and a bit for each, padded to whole chunks and units of pixels."""
    spec = StackSpec((64, 160, 96, 32), (0, 2))
    x = torch.empty((batch, pixels, 64), dtype=torch.bfloat16)
    saved = cuda_saved.empty_saved(x, spec, batch)
    features, activations, signs = saved
    assert features.dtype == x.dtype and features.shape == (batch * pixels * (160 + 96 + 32),)
    assert activations.numel() == 0
    views = cuda_saved.activations(saved, spec, batch, pixels)
    assert [tuple(view.shape) for view in views] == [(batch, pixels, width) for width in (160, 96, 32)]
    assert views[0].data_ptr() == features.data_ptr() and all(view.is_contiguous() for view in views)
    assert [view.storage_offset() for view in views] == [0, batch * pixels * 160, batch * pixels * 256]
    units = -(-pixels // 256)
    assert signs.dtype == torch.int32 and signs.numel() * 32 == batch * units * 256 * (256 + 128 + 128)


@pytest.mark.parametrize("widths", [(64, 160, 96, 32), (64, 32)])
def test_the_kernel_is_told_where_the_last_output_lies(
    widths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: dict = {}
    extension = SimpleNamespace(stack_forward=lambda plan, **arguments: told.update(arguments))
    monkeypatch.setattr(cuda_onchip, "_load", lambda: extension)
    monkeypatch.setattr(cuda_onchip, "_stream", lambda device: 0)
    case = random_stack(widths, (len(widths) - 2,), batch=3, pixels=7, dtype=torch.bfloat16, noise=None)
    inputs, spec = case.call(lambda x, *a, layout, **k: stack_call(x, *a, **k))
    empty = torch.empty(0)
    prepared = cuda_onchip.Prepared(None, empty, empty, None, empty, None)
    places, rgb = cuda_onchip.Places(None, (0, 0), 0), torch.empty(3, 7, 3)
    call = (prepared, inputs, spec, inputs.x.dtype, inputs.x, None, places, rgb, None)
    saved = cuda_saved.empty_saved(inputs.x, spec, 3)
    cuda_onchip.launch(*call, saved)
    views = cuda_saved.activations(saved, spec, 3, 7)
    assert (told["activations"], told["features"]) == (views[0].data_ptr(), views[-1].data_ptr())
    cuda_onchip.launch(*call, None)
    assert (told["activations"], told["features"]) == (0, 0)


def test_features_that_were_not_asked_for_have_no_gradient() -> None:
    spec = StackSpec((64, 96, 32), (1,))
    case = random_stack((64, 96, 32), (1,), batch=2, pixels=5)
    inputs = case.call(lambda x, *a, layout, **k: stack_call(x, *a, **k))[0]
    saved = cuda_saved.empty_saved(inputs.x, spec, 2)
    with pytest.raises(RuntimeError, match=r"grad_features: got a tensor \[320\].*want_features=False"):
        cuda_stack.backward(torch.zeros(320), None, inputs, spec, saved, Needs(True, True, True, True))


def test_the_operator_hides_what_is_kept() -> None:
    """To autograd and to a compiler, which see shapes alone: colours have a gradient, what is kept has none."""
    with FakeTensorMode():
        case = random_stack((64, 96, 32), (1,), batch=2, pixels=5, dtype=torch.bfloat16).leaves()
        inputs, spec = case.call(lambda x, *a, layout, **k: stack_call(x, *a, **k))
        arguments = (*inputs, *ops._spec_values(spec))
        features, rgb, activations, signs = torch.ops.cips_kernels.modfc_stack(
            *arguments, False, "all", "cuda"
        )
        assert features.shape == (2 * 5 * (96 + 32),) and features.dtype == torch.bfloat16
        assert activations.numel() == 0 and signs.dtype == torch.int32
        assert rgb.requires_grad and not (features.requires_grad or signs.requires_grad)
        whole = torch.ops.cips_kernels.modfc_stack(*arguments, True, "all", "cuda")[0]
        assert whole.shape == (2, 5, 32) and whole.requires_grad


@pytest.mark.parametrize(
    ("widths", "runs"),
    [
        ((64, 32), [(0, 0)]),
        ((32, 32, 32), [(0, 0), (1, 1)]),
        ((1024, 512, 512, 512, 256, 256), [(0, 0), (1, 2), (3, 3), (4, 4)]),
    ],
)
def test_runs(widths: tuple[int, ...], runs: list) -> None:
    assert cuda_training._runs(widths) == runs
