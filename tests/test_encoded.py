"""`save="none"` over an Encoding: the gradients of what makes the encoding as a whole, without ever doing so."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cips_kernels import Encoding, cuda, encoded, encoding, functional, recompute
from cips_kernels.testing import StackCase, assert_close_as_eager, random_stack, relative_error

WIDTHS, RGB_AFTER = (7 + 6, 10, 8, 8), (0, 2)


def make(dtype: torch.dtype = torch.float64, sizes: tuple[int, int] = (7, 6), device: str = "cpu", **places) -> Encoding:
    generator = torch.Generator().manual_seed(5)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, wide).requires_grad_()

    if "coords" in places:
        places["coords"] = places["coords"].to(device, wide).requires_grad_()
    return Encoding(draw(sizes[0], 2), draw(sizes[0]), draw(4, 5, sizes[1]), dtype=dtype, **places)


def random_points(*shape: int) -> Tensor:
    return torch.rand(*shape, 2, generator=torch.Generator().manual_seed(6)) * 2.2 - 1.1


PLACES = {
    "own grid": {"size": (4, 5)},
    "another grid": {"size": (6, 3)},
    "points": {"coords": random_points(17)},
    "points an image": {"coords": random_points(3, 17)},
    "compat": {"coords": random_points(17), "lookup": "compat"},
    "own entries": {"coords": random_points(20), "lookup": "own"},
}


def call(case: StackCase, e: Encoding, save: str, backend: str) -> Tensor:
    groups = (case.weights, case.styles, case.biases, case.noise_strengths)
    rgbs = (case.rgb_weights, case.rgb_styles, case.rgb_biases, case.rgb_after)
    return functional.modfc_stack(e, *groups, *rgbs, noise=case.noise, want_features=False, save=save, backend=backend)[1]


def sources(case: StackCase, e: Encoding) -> dict[str, Tensor]:
    named = {**case.tensors(), **{name: t for name, t in e._asdict().items() if isinstance(t, Tensor)}}
    return {name: t for name, t in named.items() if t.requires_grad and name != "x"}


def gradients(case: StackCase, e: Encoding, save: str, backend: str = "reference") -> dict[str, Tensor]:
    """The colours, and the gradients of a fixed loss of them."""
    rgb = call(case, e, save, backend)
    sent = torch.randn(rgb.shape, generator=torch.Generator().manual_seed(3)).to(rgb)
    tensors = sources(case, e)
    found = torch.autograd.grad(rgb, list(tensors.values()), sent)
    return {"rgb": rgb.detach(), **dict(zip(tensors, found))}


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoded, "_ROWS", 5)
    monkeypatch.setattr(recompute, "_ROWS", 10)
    monkeypatch.setitem(encoding._TILE, "cpu", 4)


@pytest.mark.parametrize("noise", ["given", 11])
@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_gradients_are_those_of_the_whole(small_tiles, backend: str, where: str, noise: str | int) -> None:
    e = make(**PLACES[where])
    case = random_stack(WIDTHS, RGB_AFTER, batch=3, pixels=e.pixels, noise=noise, dtype=torch.float64).leaves()
    whole, tiled = (gradients(case, e, save, backend) for save in ("all", "none"))
    assert whole.keys() == tiled.keys() and {"table", "fourier_weight", "styles[0]"} < whole.keys()
    # counter noise is float32, whose last bit depends on a processor's vectors
    for name, value in tiled.items():
        assert relative_error(value, whole[name]) < (1e-6 if noise == 11 else 1e-12), name


@pytest.mark.parametrize("alone", ["table", "fourier_bias", "coords", "weights[1]", "biases[0]", "noise_strengths[1]", "noise"])
def test_what_is_not_wanted_is_not_made(small_tiles, alone: str) -> None:
    e = make(**PLACES["points"])
    case = random_stack(WIDTHS, RGB_AFTER, batch=3, pixels=17, noise="given", dtype=torch.float64).leaves()
    whole = gradients(case, e, "all")
    for name, t in sources(case, e).items():
        t.requires_grad_(name == alone)
    found = gradients(case, e, "none")
    assert found.keys() == {"rgb", alone}
    assert relative_error(found[alone], whole[alone]) < 1e-12


@pytest.mark.parametrize("part", ["table", "features"])
def test_one_part_may_be_missing(small_tiles, part: str) -> None:
    e = make(**PLACES["another grid"])
    width = 7 if part == "table" else 6
    e = e._replace(table=None) if part == "table" else e._replace(fourier_weight=e.fourier_weight[:0], fourier_bias=e.fourier_bias[:0])
    case = random_stack((width, *WIDTHS[1:]), RGB_AFTER, batch=2, pixels=18, noise=None, dtype=torch.float64).leaves()
    tensors = [t for t in sources(case, e).values() if t.numel()]
    found = []
    for save in ("all", "none"):
        found.append(torch.autograd.grad(call(case, e, save, "reference").square().sum(), tensors, allow_unused=True))
    for a, b in zip(*found):
        # without noise its strengths have no gradient, or zeros
        assert (a is None and (b is None or not b.any())) or relative_error(b, a) < 1e-12 or not (a.any() or b.any())


def test_second_order(small_tiles) -> None:
    """A penalty on the gradient by styles and table, differentiated by everything."""
    e = make(**PLACES["points an image"])
    case = random_stack(WIDTHS, RGB_AFTER, batch=3, pixels=17, noise="given", dtype=torch.float64).leaves()
    tensors = sources(case, e)
    found = []
    for save in ("all", "none"):
        rgb = call(case, e, save, "reference")
        first = torch.autograd.grad(rgb.square().sum(), [case.styles[1], e.table], create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), list(tensors.values()), allow_unused=True))
    for name, a, b in zip(tensors, *found):
        assert (a is None and b is None) or relative_error(b, a) < 1e-10, name


@pytest.mark.parametrize(
    ("rows", "height", "width"), [(256, 1024, 3), (5, 4, 3), (7, 7, 2), (2, 100, 1), (9, 1, 5), (1, 4, 4), (64, 63, 2), (33, 129, 1)]
)
def test_rows_of_the_table_that_a_tile_reads(rows: int, height: int, width: int) -> None:
    table = torch.randn(rows, 3, 2, generator=torch.Generator().manual_seed(2))
    e = Encoding(torch.zeros(1, 2), torch.zeros(1), table, None, (height, width))
    for first, count in encoding.tiles(e.pixels, 2 * width + 1):
        begin, number = encoding.table_rows(e, first, count)
        places = encoding.points(e, first, count)
        part = encoding.table_lookup(table[begin : begin + number], places, "exact", (begin, rows))
        assert torch.equal(part, encoding.table_lookup(table, places))
        assert number <= 2 * rows / max(1, height - 1) + 5, "two lines apart, its neighbours, and what a rounding may add"


@pytest.mark.gpu
@pytest.mark.parametrize("where", ["own grid", "another grid", "points"])
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_on_a_gpu(monkeypatch: pytest.MonkeyPatch, backend: str, where: str) -> None:
    """The error rule, tiles of 256 pixels."""
    if not cuda.available()[0]:
        pytest.skip(cuda.available()[1])
    monkeypatch.setattr(encoded, "_ROWS", 256)
    places = {"size": (40, 50)} if where == "another grid" else {"coords": random_points(2000)} if where == "points" else {"size": (4, 5)}

    def run(dtype: torch.dtype, save: str, backend: str) -> dict[str, Tensor]:
        e = make(dtype, (64, 64), "cuda", **places)
        case = random_stack((128, 96, 64, 64), (0, 2), batch=2, pixels=e.pixels, noise="given", device="cuda", dtype=dtype)
        return gradients(case.leaves(), e, save, backend)

    found, again = (run(torch.bfloat16, "none", backend) for _ in range(2))
    eager, exact = run(torch.bfloat16, "all", "reference"), run(torch.float64, "all", "reference")
    for name, value in found.items():
        assert torch.equal(value, again[name]) or name == "table", name  # PyTorch's own scatter is in no fixed order
        if not name.startswith("noise_strengths"):
            assert_close_as_eager(name, value, eager[name], exact[name])


@pytest.mark.gpu
def test_memory_does_not_grow_with_the_pixels() -> None:
    """Four times the points: as much more memory as their colours and their gradient need."""
    if not cuda.available()[0]:
        pytest.skip(cuda.available()[1])
    peaks = []
    for side in (512, 1024):  # which go by tiles of one size
        e = make(torch.bfloat16, (512, 512), "cuda", size=(side, side))
        case = random_stack((1024, *(512,) * 5), (2, 4), batch=1, pixels=4, noise=5, device="cuda", dtype=torch.bfloat16).leaves()
        for _ in range(2):
            torch.cuda.reset_peak_memory_stats()
            begun = torch.cuda.memory_allocated()
            call(case, e, "none", "auto").square().sum().backward()
            peaks.append(torch.cuda.max_memory_allocated() - begun)
    colours = (1024**2 - 512**2) * 3 * 4
    assert peaks[3] < peaks[1] + 8 * colours + 2**24
