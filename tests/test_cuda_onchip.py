"""The on-chip stack on a GPU, against the float64 oracle: what no machine without one can show."""

from __future__ import annotations

import importlib
import warnings

import pytest
import torch
from torch import Tensor

from cips_kernels import Encoding, cuda_onchip, encoding, functional, reference
from cips_kernels.spec import StackSpec
from cips_kernels.testing import StackCase, assert_close_as_eager, poisoned_empty, random_stack

PAPER = ((1024, *(512,) * 15), tuple(range(2, 15, 2)))
# widths, layers after which a ToRGB reads
STACKS = {
    "paper": PAPER,
    "released, 256": ((1024, *(512,) * 9, 256, 256, 128, 128), (1, 3, 5, 7, 9, 12)),
    "released, 1024": ((512, 512, 512, 256, 128, 64, 32, 32), (0, 2, 4, 6)),
    "one layer": ((64, 128), (0,)),
    "odd": ((100, 80, 48, 300, 16), (0, 3, 3)),
    "widening": ((16, 32, 512, 64, 400), (1, 3)),
    "wide, odd input": ((700, 512, 512), (1,)),
    "layers that nobody reads": ((64, 64, 64, 64), (1,)),
}


# and the residual blocks: first and last layer of each
RESIDUAL = {
    "released": ((1024, *(512,) * 5, 256, 256, 128, 128), (8,), ((1, 2), (3, 4), (5, 6), (7, 8))),
    "odd": ((100, 80, 48, 80, 80, 300, 80, 16), (3, 6), ((1, 2), (3, 3), (4, 6))),
    "one layer each": ((64, 64, 64, 64), (0, 2), ((1, 1), (2, 2))),
    "beyond the last colour": ((64, 64, 64, 64, 64), (1, 2), ((1, 2), (3, 3))),
    "widening": ((16, 32, 512, 400, 64, 64), (2, 4), ((1, 2), (4, 4))),
}


pytestmark = pytest.mark.usefixtures("served")


def groups(case: StackCase) -> tuple:
    layers = (case.weights, case.styles, case.biases, case.noise_strengths)
    return *layers, case.rgb_weights, case.rgb_styles, case.rgb_biases, case.rgb_after


def run(case: StackCase, **options) -> Tensor:
    """The RGB sum by the `cuda` backend; a fall back to Triton is an error."""
    with torch.no_grad(), poisoned_empty(), warnings.catch_warnings():
        warnings.simplefilter("error")
        return case.call(functional.modfc_stack, backend="cuda", want_features=False, **options)[1]


def check(name: str, case: StackCase, **options) -> Tensor:
    """The oracle rule, and the same bits twice."""
    found = run(case, **options)
    with torch.no_grad():
        exact = case.cast(torch.float64).call(reference.modfc_stack, **options)[1]
        eager = case.call(reference.modfc_stack, **options)[1]
    assert_close_as_eager(name, found, eager, exact)
    assert torch.equal(found, run(case, **options)), f"{name}: not the same bits twice"
    return found


def make(stack: str, **options) -> StackCase:
    return random_stack(*STACKS[stack], device="cuda", **{"dtype": torch.bfloat16, "noise": 5, **options})


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("stack", STACKS)
def test_every_width(stack: str, shared: bool, dtype: torch.dtype) -> None:
    check(stack, make(stack, batch=3, pixels=300, shared=shared, dtype=dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("stack", RESIDUAL)
def test_residual_blocks(stack: str, dtype: torch.dtype) -> None:
    widths, rgb_after, blocks = RESIDUAL[stack]
    case = random_stack(widths, rgb_after, blocks=blocks, batch=3, pixels=1300, device="cuda", dtype=dtype, noise=5)
    found = check(stack, case)
    plain = random_stack(widths, rgb_after, batch=3, pixels=1300, device="cuda", dtype=dtype, noise=5)
    assert (found - run(plain)).abs().mean() > 0.02 * found.abs().mean(), "the blocks are not seen"


@pytest.mark.gpu
@pytest.mark.parametrize("pixels", [1, 63, 64, 127, 128, 129, 257, 65536, 1_000_003])
@pytest.mark.parametrize("stack", ["released, 1024", "odd"])
def test_every_number_of_pixels(stack: str, pixels: int) -> None:
    # a few colours alone would not make a mean error
    check(stack, make(stack, batch=16 if pixels < 1000 else 1, pixels=pixels))


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 3, 16])
def test_every_batch(batch: int) -> None:
    check("paper", make("paper", batch=batch, pixels=1000, shared=True))


@pytest.mark.gpu
@pytest.mark.parametrize("noise", [None, 2**62 + 12345, "given", "points", "points an image", "strided"])
def test_every_noise(noise: int | str | None) -> None:
    coords = None
    if noise in ("points", "points an image"):
        shape = (200, 2) if noise == "points" else (3, 200, 2)
        coords = torch.rand(shape, generator=torch.Generator().manual_seed(1)).cuda() * 2 - 1
    kind = noise if noise is None or isinstance(noise, int) else "given" if noise in ("given", "strided") else 77
    case = make("released, 1024", batch=3, pixels=200, noise=kind)
    if noise == "strided":
        case = case.map(lambda name, t: t.mT.contiguous().mT if name == "noise" else t)
        assert case.noise.stride(2) != 1
    found = check(str(noise), case, coords=coords)
    silent = make("released, 1024", batch=3, pixels=200, noise=None)
    if noise is not None:
        assert (found - run(silent)).abs().mean() > 1e-2 * found.abs().mean(), "noise is not seen"


@pytest.mark.gpu
@pytest.mark.parametrize("channels", [1, 2, 3])
def test_channels_and_skip(channels: int) -> None:
    check("odd", make("odd", batch=2, pixels=130, channels=channels, skip=True))


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["bpc", "bcp", "bchw"])
@pytest.mark.parametrize("inputs", [512, 1024, 100])
def test_every_layout(layout: str, inputs: int) -> None:
    case = random_stack((inputs, 64, 64), (1,), batch=2, pixels=12 * 15, dtype=torch.bfloat16, device="cuda", noise=3)
    expected = run(case)

    def arrange(name: str, t: Tensor) -> Tensor:
        if name != "x" or layout == "bpc":
            return t
        t = t.mT.contiguous()
        return t if layout == "bcp" else t.unflatten(2, (12, 15))

    found = run(case.map(arrange), layout=layout)
    found = found if layout == "bpc" else found.mT if layout == "bcp" else found.flatten(2).mT
    assert torch.equal(found, expected)
    if layout == "bchw":
        channels_last = case.map(lambda name, t: arrange(name, t).contiguous(memory_format=torch.channels_last) if name == "x" else t)
        assert torch.equal(run(channels_last, layout=layout).flatten(2).mT, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [dict(negative_slope=0.0), dict(negative_slope=0.5, gain=1.0), dict(demodulate=False), dict(eps=0.1), dict(eps=0.0)])
def test_every_option(options: dict) -> None:
    case = make("released, 1024", batch=2, pixels=100)
    if options.get("demodulate") is False:  # keep activations in float16's range
        case = case.map(lambda name, t: t * 0.8 if name == "styles" else t)
    check(str(options), case, **options)


@pytest.mark.gpu
def test_a_nan_style_spoils_its_own_image() -> None:
    case = make("released, 1024", batch=3, pixels=100, shared=True)
    expected = run(case)
    case.styles[2][1, 3] = torch.nan
    found = run(case)
    assert torch.equal(found[[0, 2]], expected[[0, 2]]) and found[1].isnan().all()


# --- the encoding in front -------------------------------------------------------------------------------------------


def encoded(table_size: tuple[int, int], features: tuple[int, int], dtype: torch.dtype, **places) -> Encoding:
    generator = torch.Generator().manual_seed(2)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).cuda()

    fourier, table = features
    return Encoding(
        draw(fourier, 2, scale=2.0), draw(fourier), draw(*table_size, table) if table else None, dtype=dtype, **places
    )


def colours(case: StackCase, e: Encoding) -> Tensor:
    with torch.no_grad(), poisoned_empty(), warnings.catch_warnings():
        warnings.simplefilter("error")
        return functional.modfc_stack(e, *groups(case), noise=case.noise, want_features=False, backend="cuda")[1]


def cast(e: Encoding, dtype: torch.dtype) -> Encoding:
    """The encoding computed in float64, or in float32 and rounded."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    table = None if e.table is None else e.table.to(wide)
    return e._replace(fourier_weight=e.fourier_weight.to(wide), fourier_bias=e.fourier_bias.to(wide), table=table, dtype=dtype)


def truth(case: StackCase, e: Encoding, dtype: torch.dtype) -> Tensor:
    """By way of the whole tensor, in plain PyTorch."""
    with torch.no_grad():
        x, case = encoding.encode(cast(e, dtype)), case.cast(dtype)
        return reference.modfc_stack(x, *groups(case), noise=case.noise, coords=encoding.points(e), layout="bpc")[1]


def points(*shape: int) -> Tensor:
    return (torch.rand(*shape, 2, generator=torch.Generator().manual_seed(3)) * 2.2 - 1.1).cuda()


PLACES = {
    "own grid": lambda: dict(size=(20, 31)),
    "another grid": lambda: dict(size=(33, 17)),
    "one row": lambda: dict(size=(1, 300)),
    "points": lambda: dict(coords=points(301)),
    "points an image": lambda: dict(coords=points(3, 301)),
    "compat": lambda: dict(size=(20, 31), lookup="compat"),
}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("noise", [None, 9, "given"])
@pytest.mark.parametrize("where", PLACES)
def test_colours_from_coordinates(where: str, noise: int | str | None, dtype: torch.dtype) -> None:
    e = encoded((20, 31), (512, 512), dtype, **PLACES[where]())
    case = random_stack((1024, 512, 512, 256), (0, 2), batch=3, pixels=e.pixels, noise=noise, device="cuda", dtype=dtype)
    found = colours(case, e)
    assert_close_as_eager(where, found, truth(case, e, dtype), truth(case, e, torch.float64))
    assert torch.equal(found, colours(case, e)), "not the same bits twice"


@pytest.mark.gpu
@pytest.mark.parametrize("features", [(512, 0), (1, 1), (100, 37), (64, 64), (500, 512), (512, 8)], ids=str)
def test_every_width_of_an_encoding(features: tuple[int, int]) -> None:
    e = encoded((5, 6), features, torch.bfloat16, size=(16, 20))
    case = random_stack((sum(features), 128, 64), (1,), batch=2, pixels=320, noise=1, device="cuda", dtype=torch.bfloat16)
    found = colours(case, e)
    assert_close_as_eager(str(features), found, truth(case, e, torch.bfloat16), truth(case, e, torch.float64))


@pytest.mark.gpu
@pytest.mark.parametrize("lookup", ["exact", "compat"])
@pytest.mark.parametrize("where", ["grid", "own grid", "points", "points an image", "nan"])
@pytest.mark.parametrize("size", [(20, 31), (1, 1), (2, 1), (256, 256)], ids=str)
@pytest.mark.parametrize("features", [512, 24, 37])
def test_lookup_has_the_bits_of_pytorch(features: int, size: tuple[int, int], where: str, lookup: str) -> None:
    place = {"grid": dict(size=(40, 23)), "own grid": dict(size=size)}.get(where) or dict(coords=points(2, 400) if "image" in where else points(400))
    if where == "nan":
        place["coords"][7, 0] = torch.nan
    e = encoded(size, (1, features), torch.bfloat16, lookup=lookup, **place)
    coords, grid = e.coords, e.size or (0, 0)
    for first, count in ((0, e.pixels), (e.pixels // 2, e.pixels - e.pixels // 2)):
        cut = None if coords is None else coords.narrow(-2, first, count).contiguous()
        for table in (e.table, e.table.bfloat16()):
            found = cuda_onchip.lookup(e._replace(table=table), torch.bfloat16, cuda_onchip.Places(cut, grid, first), count)
            expected = encoding.table_lookup(table, encoding.points(e, first, count), lookup).bfloat16()
            assert torch.equal(found.view(torch.int16), expected.view(found.shape).view(torch.int16))


@pytest.mark.gpu
@pytest.mark.parametrize("table", [(24, 20), (7, 9)])
def test_a_tile_a_patch_and_single_points_have_the_bits_of_the_image(table: tuple[int, int], monkeypatch) -> None:
    case = random_stack((1024, 512, 512, 128), (0, 2), batch=2, pixels=1, noise=4, device="cuda", dtype=torch.bfloat16)
    full = encoded(table, (512, 512), torch.bfloat16, size=(24, 20))
    image = colours(case, full)
    everywhere = encoding.points(full)
    order = torch.randperm(480, generator=torch.Generator().manual_seed(0)).cuda()
    for chosen in (order, order[:1], order[:129], torch.arange(100, 300).cuda()):
        at = encoded(table, (512, 512), torch.bfloat16, coords=everywhere[chosen])
        assert torch.equal(colours(case, at), image[:, chosen])
    each = encoded(table, (512, 512), torch.bfloat16, coords=torch.stack((everywhere[order], everywhere[order.flip(0)])))
    found = colours(case, each)
    assert torch.equal(found[0], image[0, order]) and torch.equal(found[1], image[1, order.flip(0)])
    for table_dtype in (torch.float32, torch.bfloat16):  # looked up by the kernel, or before it
        cut = full._replace(table=full.table.to(table_dtype))
        expected = colours(case, cut)
        with monkeypatch.context() as patch:
            patch.setattr(cuda_onchip, "wave", lambda _: 0)
            patch.setattr(cuda_onchip, "LAUNCH_PIXELS", 256)
            assert torch.equal(colours(case, cut), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("lookup", ["exact", "compat"])
@pytest.mark.parametrize("features", [512, 192, 64])
@pytest.mark.parametrize("where", ["grid", "points", "points an image", "nan", "few"])
@pytest.mark.parametrize("size", [(20, 31), (1, 1), (1, 7), (90, 80)], ids=str)
def test_rows_that_the_kernel_makes_have_the_bits_of_the_lookup(
    size: tuple[int, int], where: str, features: int, lookup: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A multiprocessor's first rows, those of its next units, and of units that are not full."""
    place = dict(size=(350, 301)) if where == "grid" else dict(coords=points(3, 30_001) if "image" in where else points(10 if where == "few" else 40_001))
    if where == "nan":
        place["coords"][7, 0] = torch.nan
    e = encoded(size, (64, features), torch.bfloat16, lookup=lookup, **place)
    case = random_stack((64 + features, 128, 64), (1,), batch=3, pixels=1, noise=2, device="cuda", dtype=torch.bfloat16)
    asked = []
    with monkeypatch.context() as patch:
        launch = cuda_onchip.launch
        patch.setattr(cuda_onchip, "launch", lambda *given, made=None, **more: (asked.append(made), launch(*given, made=made, **more)))
        found = colours(case, e)
    assert all(asked), "rows were not made by the kernel"
    assert torch.equal(found.isnan(), colours(case, e).isnan())
    assert torch.equal(found.nan_to_num(), colours(case, e).nan_to_num()), "not the same bits twice"
    monkeypatch.setattr(cuda_onchip, "_looks_up", lambda _: False)
    assert torch.equal(found.nan_to_num(), colours(case, e).nan_to_num())
    assert found.isnan().any() == (where == "nan")


@pytest.mark.gpu
@pytest.mark.parametrize("made", [True, False])
@pytest.mark.parametrize("features", [512, 64])
def test_an_entry_without_weight_is_not_read(features: int, made: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pixels on every other entry of a table, the ones between which are NaN. In the last row and column the entry itself
    is the second, beside one of weight 0."""
    if not made:
        monkeypatch.setattr(cuda_onchip, "_looks_up", lambda _: False)
    e = encoded((65, 81), (64, features), torch.bfloat16, size=(33, 41))
    case = random_stack((64 + features, 128, 64), (1,), batch=1, pixels=1, noise=2, device="cuda", dtype=torch.bfloat16)
    table = e.table.clone()
    table[1::2] = table[:, 1::2] = torch.nan
    expected, found = (colours(case, given).view(33, 41, -1)[:-1, :-1] for given in (e, e._replace(table=table)))
    assert torch.equal(found, expected)


@pytest.mark.gpu
def test_memory_does_not_grow_with_pixels() -> None:
    case = random_stack(*PAPER, batch=1, pixels=1, noise=4, device="cuda", dtype=torch.bfloat16)
    peaks = []
    for side in (256, 4096):
        e = encoded((256, 256), (512, 512), torch.bfloat16, size=(side, side))
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.no_grad():
            rgb = functional.modfc_stack(e, *groups(case), noise=4, want_features=False, backend="cuda")[1]
        peaks.append(torch.cuda.max_memory_allocated() - before - rgb.numel() * 4)
        del rgb
    assert peaks[1] <= peaks[0] + 64 * 2**20


@pytest.mark.gpu
def test_graph_and_side_stream() -> None:
    """A captured call repeats on new numbers; a stream beside a busy one neither hangs nor changes a bit."""
    case = random_stack((1024, 512, 512, 128), (0, 2), batch=2, pixels=1, noise=4, device="cuda", dtype=torch.bfloat16)
    e = encoded((24, 20), (512, 512), torch.bfloat16, size=(48, 40))
    expected = colours(case, e)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    busy = torch.randn(4096, 4096, device="cuda")
    stream.wait_stream(torch.cuda.current_stream())
    for _ in range(20):
        busy = busy @ busy * 1e-3
    with torch.cuda.stream(stream):
        beside = colours(case, e)
    torch.cuda.synchronize()
    assert torch.equal(beside, expected)
    with torch.no_grad(), torch.cuda.graph(graph):
        captured = functional.modfc_stack(e, *groups(case), noise=4, want_features=False, backend="cuda")[1]
    for style in case.styles:
        style.mul_(1.5)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, colours(case, e)) and not torch.equal(captured, expected)


@pytest.mark.gpu
def test_auto_takes_it_where_colours_alone_are_wanted() -> None:
    case = make("released, 1024", batch=2, pixels=100)
    with torch.no_grad():
        found = case.call(functional.modfc_stack, want_features=False)[1]
    assert torch.equal(found, run(case))
    leaves = case.leaves()
    differentiable = leaves.call(functional.modfc_stack, want_features=False)[1]
    differentiable.sum().backward()
    assert leaves.weights[0].grad is not None


REFUSED = {
    "wide layer": (StackSpec((64, 640, 64), (1,)), torch.bfloat16, "exceed 1024 for the input or 512 for a layer"),
    "wide input": (StackSpec((1040, 64), (0,)), torch.bfloat16, "exceed 1024"),
    "float32": (StackSpec((64, 64), (0,)), torch.float32, "not in torch.float32"),
    "channels": (StackSpec((64, 64), (0,), rgb_channels=4), torch.bfloat16, "4 channels, more than 3"),
    "input to RGB": (StackSpec((64, 64), (-1, 0)), torch.bfloat16, "a ToRGB reads the input"),
    "depth": (StackSpec((16,) * 70, (68,)), torch.bfloat16, "69 layers"),
    "linear": (StackSpec((64, 64), (0,), negative_slope=1.0), torch.bfloat16, "slope 1.0"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_says_why_not(what: str) -> None:
    spec, dtype, words = REFUSED[what]
    assert words in cuda_onchip.why_not(spec, dtype)
    assert cuda_onchip.why_not(StackSpec(*STACKS["paper"]), torch.bfloat16) is None


@pytest.mark.gpu
def test_what_it_cannot_serve_falls_to_triton_with_one_warning() -> None:
    case = random_stack((64, 640, 64), (1,), batch=2, pixels=50, noise=None, dtype=torch.bfloat16, device="cuda")
    importlib.import_module("cips_kernels.backends")._warned.clear()
    with torch.no_grad(), pytest.warns(RuntimeWarning, match="exceed 1024 for the input or 512 for a layer"):
        found = case.call(functional.modfc_stack, want_features=False, backend="cuda")[1]
    exact, eager = (case.cast(d).call(reference.modfc_stack)[1] for d in (torch.float64, torch.bfloat16))
    assert_close_as_eager("rgb", found, eager, exact)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        case.call(functional.modfc_stack, want_features=False, backend="cuda")
