"""What a backward finds kept changes memory, not gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cips_kernels import Encoding, FusedModFCStack, functional, recompute
from cips_kernels.noise import normal
from cips_kernels.spec import StackInputs, StackSpec
from cips_kernels.testing import StackCase, assert_close_as_eager, random_stack, relative_error

WIDTHS, RGB_AFTER = (6, 5, 5, 4, 4, 3), (-1, 1, 2, 4)
BLOCKS = ((1, 2), (3, 4))
CASES = {
    "given noise": {},
    "counter": dict(noise=7),
    "no noise": dict(noise=None),
    "shared": dict(noise=3, shared=True),
    "blocks": dict(noise=5, blocks=BLOCKS),
    "skip": dict(noise=5, skip=True),
}


def gradients(case: StackCase, backend: str, save: str, features: bool = True, **options) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs, and gradients of everything that is a float."""
    leaves = case.leaves()
    out = [t for t in leaves.call(functional.modfc_stack, backend=backend, save=save, want_features=features, **options) if t is not None]
    generator = torch.Generator().manual_seed(4)
    weights = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t) for t in out]
    sources = [t for t in leaves.tensors().values() if t.requires_grad]
    found = torch.autograd.grad(sum((t * w).sum() for t, w in zip(out, weights)), sources, allow_unused=True)
    return out, [torch.zeros_like(s) if g is None else g for s, g in zip(sources, found)]


@pytest.fixture(params=[None, 8, 3], ids=["whole", "images", "pixels"])
def rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int | None:
    """Parts of everything, of an image, of a few pixels of one."""
    if request.param is not None:
        monkeypatch.setattr(recompute, "_ROWS", request.param)
    return request.param


# of Triton, whose interpreter is slow, the cases whose parts its own code makes
SERVED = [(name, backend) for backend in ("reference", "cpu") for name in CASES]
SERVED += [("counter", "triton"), ("blocks", "triton")]


@pytest.mark.parametrize("save", ["some", "none"])
@pytest.mark.parametrize(("name", "backend"), SERVED)
def test_gradients_are_the_same(name: str, save: str, backend: str, rows: int | None) -> None:
    dtype = torch.float32 if backend == "triton" else torch.float64
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"  # else it is interpreted
    case = random_stack(WIDTHS, RGB_AFTER, batch=3, pixels=7, dtype=dtype, device=device, **CASES[name])
    (out, found), (whole, wanted) = (gradients(case, backend, mode) for mode in (save, "all"))
    # counter noise is float32, whose last bit depends on a processor's vectors
    tight = 1e-5 if dtype == torch.float32 else 1e-6 if isinstance(case.noise, int) else 1e-12
    for a, b in zip([*out, *found], [*whole, *wanted], strict=True):
        assert relative_error(a, b) < tight or (b.abs().max() == 0 and a.abs().max() == 0)


@pytest.mark.parametrize("coords", ["points", "points an image"])
def test_noise_keyed_by_points(coords: str, rows: int | None) -> None:
    case = random_stack(WIDTHS, RGB_AFTER, batch=3, pixels=7, dtype=torch.float64, noise=9)
    where = torch.rand((7, 2) if coords == "points" else (3, 7, 2)) * 2 - 1
    (_, found), (_, wanted) = (gradients(case, "cpu", mode, coords=where) for mode in ("none", "all"))
    for a, b in zip(found, wanted, strict=True):
        assert relative_error(a, b) < 1e-6


@pytest.mark.parametrize("coords", [None, torch.rand(2, 5, 2)])
def test_noise_of_a_part_is_the_images(coords: Tensor | None) -> None:
    spec, seed = StackSpec((4, 4, 4), (1,), first_layer=3), torch.tensor(2**40 + 5)
    x = torch.zeros(1, 5, 4)
    inputs = StackInputs(x, x, torch.zeros(2, 8), x, x, None, seed, None, coords)
    part = inputs.cut(2, 3)._replace(styles=torch.zeros(1, 8), coords=None if coords is None else coords[1:, 2:])
    found = recompute.noise_values(part, spec, 2, 1)
    for layer in range(2):
        torch.testing.assert_close(found[layer], normal(seed, 3 + layer, 2, 5, coords)[1:, 2:], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("save", ["some", "none"])
def test_derivatives_to_second_order(save: str) -> None:
    case = random_stack((3, 4, 4, 3), (0, 2), batch=2, pixels=3, dtype=torch.float64, blocks=((1, 1),))
    leaves = case.leaves()
    sources = list(leaves.tensors().values())

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        by_place = dict(zip(map(id, sources), tensors))
        case = leaves.map(lambda _, t: by_place[id(t)])
        return case.call(functional.modfc_stack, backend="reference", save=save)

    assert torch.autograd.gradcheck(call, sources)
    assert torch.autograd.gradgradcheck(call, sources)


class Kept:
    """Elements that autograd keeps."""

    def __init__(self) -> None:
        self.seen: dict[int, int] = {}

    def __enter__(self) -> Kept:
        def pack(t: Tensor) -> Tensor:
            self.seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        self.hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.hooks.__exit__(*error)

    @property
    def bytes(self) -> int:
        return sum(self.seen.values())


def test_what_is_kept() -> None:
    pixels, depth = 4096, 9
    case = random_stack((8,) * (depth + 1), (depth - 1,), batch=1, pixels=pixels, noise=1).leaves()
    kept = {}
    for save in ("all", "some", "none"):
        with Kept() as seen:
            case.call(functional.modfc_stack, backend="cpu", save=save, want_features=False)
        kept[save] = seen.bytes / (4 * 8 * pixels)
    assert depth < kept["all"] < depth + 1.5  # layers' outputs, the last included
    assert 1 + depth / 2 < kept["some"] < 1 + depth / 2 + 1  # the input, and of half of the pixels every output
    assert 1 <= kept["none"] < 1.5  # the input


@pytest.mark.parametrize(
    ("shape", "save", "expected"),
    [
        ((3, 40), "all", (3, 40)), ((3, 40), "none", (0, 0)), ((3, 40), "some", (2, 40)), ((4, 1), "some", (2, 1)),
        ((1, 40), "some", (1, 40)), ((1, 600), "some", (1, 512)), ((1, 65536), "some", (1, 32768)),
        ((0, 40), "some", (0, 40)), ((1, 0), "some", (1, 0)),
    ],
)  # fmt: skip
def test_what_some_means(shape: tuple[int, int], save: str, expected: tuple[int, int]) -> None:
    assert recompute.kept(*shape, save) == expected


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("planes", [False, True])
def test_half_of_an_image(backend: str, planes: bool, rows: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recompute, "_UNIT", 4)
    case = random_stack(WIDTHS, RGB_AFTER, batch=1, pixels=15, dtype=torch.float64, noise=5, skip=True, blocks=BLOCKS)
    if planes:
        case = case.map(lambda name, t: t.transpose(1, 2).contiguous().transpose(1, 2) if name == "x" else t)
    (out, found), (whole, wanted) = (gradients(case, backend, mode) for mode in ("some", "all"))
    for a, b in zip([*out, *found], [*whole, *wanted], strict=True):
        assert a.stride() == b.stride()
        assert relative_error(a, b) < 1e-6


@pytest.mark.parametrize("save", ["some", "none"])
def test_a_module_over_an_encoding(save: str) -> None:
    torch.manual_seed(0)
    stack = FusedModFCStack([9, 8, 8, 6], 5, save=save).double()
    weight, bias, table = (t.double().requires_grad_() for t in (torch.randn(4, 2), torch.randn(4), torch.randn(3, 4, 5)))
    w = torch.randn(2, 5).double().requires_grad_()
    sources, weights = [weight, bias, table, w, *stack.parameters()], torch.randn(2, 12, 3).double()

    def run() -> list[Tensor]:
        rgb = stack(Encoding(weight, bias, table, size=(3, 4)), w, 3)
        return [rgb, *torch.autograd.grad((rgb * weights).sum(), sources)]

    assert f"save={save!r}" in repr(stack)
    found, stack.save = run(), "all"
    assert "save" not in repr(stack)
    for a, b in zip(found, run(), strict=True):
        assert relative_error(a, b) < 1e-6


@pytest.mark.parametrize("save", ["some", "none"])
def test_compiled_for_any_number_of_images(save: str) -> None:
    """What is kept depends on the shapes, which a compiler may leave open."""
    torch.manual_seed(0)
    stack = FusedModFCStack([9, 8, 6], 5, save=save)
    compiled = torch.compile(stack, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, pixels in ((3, 20), (4, 30), (1, 600)):
        x, w = torch.randn(batch, pixels, 9, requires_grad=True), torch.randn(batch, 5, requires_grad=True)
        sources = [x, w, *stack.parameters()]
        found, wanted = (
            torch.autograd.grad(call(x, w, 3).square().sum(), sources, allow_unused=True) for call in (compiled, stack)
        )
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_only_what_is_asked_for() -> None:
    case = random_stack(WIDTHS, RGB_AFTER, batch=2, pixels=5, dtype=torch.float64, noise=2)
    x = case.x.clone().requires_grad_()
    with torch.no_grad():
        plain = case.call(functional.modfc_stack, save="none")[1]
    rgb = case.map(lambda name, t: x if name == "x" else t).call(functional.modfc_stack, save="none")[1]
    assert torch.equal(rgb, plain)
    rgb.sum().backward()
    assert x.grad.abs().max() > 0


def test_bad_input() -> None:
    case = random_stack((4, 4), (0,))
    with pytest.raises(ValueError, match="save: expected 'all', 'some' or 'none', got 'half'"):
        case.call(functional.modfc_stack, save="half")
    with pytest.raises(ValueError, match="save: expected 'all', 'some' or 'none', got 3"):
        FusedModFCStack([4, 4], 3, save=3)
    with pytest.raises(ValueError, match="save: expected 'all' with a blend"):
        random_stack((4, 4), (0,), blended=2).call(functional.modfc_stack, save="none")


def vectors(tensors: list[Tensor]) -> list[Tensor]:
    """With biases and noise strengths as one: both are sums over all pixels, and one number alone may cancel to nothing."""
    return [*(t for t in tensors if t.dim() > 1), torch.cat([t.reshape(-1) for t in tensors if t.dim() < 2])]


@pytest.mark.gpu
@pytest.mark.parametrize("pixels", [3000, 50_003], ids=["small", "an image in two halves"])
@pytest.mark.parametrize("save", ["some", "none"])
def test_on_a_gpu(save: str, pixels: int) -> None:
    """The oracle rule, and memory: 15 layers' outputs are not held."""
    case = random_stack((64, *(128,) * 9), (2, 5, 8), batch=4, pixels=40_000, noise=5, dtype=torch.bfloat16, device="cuda")
    small = random_stack((64, *(128,) * 4), (1, 3), batch=2, pixels=pixels, noise=5, dtype=torch.bfloat16, device="cuda")
    found = gradients(small, "auto", save, features=False)
    eager = gradients(small, "reference", "all", features=False)
    exact = gradients(small.cast(torch.float64), "reference", "all", features=False)
    for mine, theirs, truth in zip(*(vectors([*out, *grads]) for out, grads in (found, eager, exact)), strict=True):
        assert_close_as_eager("gradient", mine, theirs, truth)
    peaks = {}
    for mode in ("all", save):
        leaves = case.leaves()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        leaves.call(functional.modfc_stack, save=mode, want_features=False)[1].sum().backward()
        peaks[mode] = torch.cuda.max_memory_allocated() - before
        del leaves
    assert peaks[save] < (0.8 if save == "some" else 0.5) * peaks["all"]
