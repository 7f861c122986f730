"""The on-chip stack for a style a pixel on a GPU, against the float64 oracle."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

from cips_kernels import Encoding, cuda_blend, encoding, functional, reference
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


pytestmark = pytest.mark.usefixtures("served")


def groups(case: StackCase) -> tuple:
    layers = (case.weights, case.styles, case.biases, case.noise_strengths)
    return *layers, case.rgb_weights, case.rgb_styles, case.rgb_biases, case.rgb_after


def run(case: StackCase, **options) -> Tensor:
    """The RGB sum by the `cuda` backend; a fall back is an error."""
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
    defaults = {"dtype": torch.bfloat16, "noise": 5, "blended": 2}
    return random_stack(*STACKS[stack], device="cuda", **{**defaults, **options})


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("stack", STACKS)
def test_every_width(stack: str, shared: bool, dtype: torch.dtype) -> None:
    check(stack, make(stack, batch=3, pixels=300, shared=shared, dtype=dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("pixels", [1, 63, 64, 127, 129, 257, 65536, 200_003])
def test_every_number_of_pixels(pixels: int) -> None:
    check(str(pixels), make("released, 1024", batch=16 if pixels < 1000 else 1, pixels=pixels))


@pytest.mark.gpu
@pytest.mark.parametrize("noise", [None, "given", 2**62 + 12345])
def test_every_noise(noise: int | str | None) -> None:
    found = check(str(noise), make("released, 1024", batch=3, pixels=200, noise=noise))
    silent = run(make("released, 1024", batch=3, pixels=200, noise=None))
    assert noise is None or (found - silent).abs().mean() > 1e-2 * found.abs().mean(), "noise is not seen"


@pytest.mark.gpu
@pytest.mark.parametrize("options", [dict(negative_slope=0.0), dict(negative_slope=0.5, gain=1.0), dict(demodulate=False), dict(eps=0.1), dict(eps=0.0)])
def test_every_option(options: dict) -> None:
    case = make("released, 1024", batch=2, pixels=100)
    if options.get("demodulate") is False:
        case = case.map(lambda name, t: t * 0.8 if name == "styles" else t)
    check(str(options), case, **options)


@pytest.mark.gpu
def test_any_weights() -> None:
    """Not only those that add up to one: negative, large, zero; a single style; channels and a skip."""
    case = make("released, 1024", batch=2, pixels=500)
    weights = torch.randn(2, 500, 2, generator=torch.Generator().manual_seed(1)).cuda()
    check("any", case.map(lambda name, t: weights if name == "blend" else t))
    check("one style", make("odd", batch=2, pixels=130, blended=1))
    check("skip", make("odd", batch=2, pixels=130, channels=2, skip=True))


@pytest.mark.gpu
def test_a_whole_weight_is_that_style_alone() -> None:
    """Pixels of weights (1, 0) and (0, 1) against the kernel of one style an image, as close as eager is."""
    case = make("paper", batch=2, pixels=1000)
    mask = (torch.arange(1000) % 2).cuda()
    weights = torch.stack((1 - mask, mask), -1).float().expand(2, -1, -1).contiguous()
    found = run(case.map(lambda name, t: weights if name == "blend" else t))
    for kind in (0, 1):
        plain = case.map(lambda name, t, kind=kind: t[:, kind] if "styles" in name else t)
        plain = StackCase(**{**vars(plain), "blend": None})
        exact, eager = (plain.cast(d).call(reference.modfc_stack)[1] for d in (torch.float64, torch.bfloat16))
        rows = mask == kind
        assert_close_as_eager(f"style {kind}", found[:, rows], eager[:, rows], exact[:, rows])


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
        return functional.modfc_stack(
            e, *groups(case), noise=case.noise, blend=case.blend, want_features=False, backend="cuda"
        )[1]


def truth(case: StackCase, e: Encoding, dtype: torch.dtype) -> Tensor:
    """By way of the whole tensor, in plain PyTorch."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    table = None if e.table is None else e.table.to(wide)
    e = e._replace(fourier_weight=e.fourier_weight.to(wide), fourier_bias=e.fourier_bias.to(wide), table=table, dtype=dtype)
    with torch.no_grad():
        x, case = encoding.encode(e), case.cast(dtype)
        return reference.modfc_stack(
            x, *groups(case), noise=case.noise, coords=encoding.points(e), blend=case.blend, layout="bpc"
        )[1]


def points(*shape: int) -> Tensor:
    return (torch.rand(*shape, 2, generator=torch.Generator().manual_seed(3)) * 2.2 - 1.1).cuda()


PLACES = {
    "own grid": lambda: dict(size=(20, 31)),
    "another grid": lambda: dict(size=(33, 17)),
    "points": lambda: dict(coords=points(301)),
    "points an image": lambda: dict(coords=points(3, 301)),
    "compat": lambda: dict(size=(20, 31), lookup="compat"),
}


@pytest.mark.gpu
@pytest.mark.parametrize("features", [(512, 512), (512, 0), (100, 37)], ids=str)
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("where", PLACES)
def test_colours_from_coordinates(where: str, shared: bool, features: tuple[int, int]) -> None:
    e = encoded((20, 31), features, torch.bfloat16, **PLACES[where]())
    case = random_stack(
        (sum(features), 512, 512, 256), (0, 2), batch=3, pixels=e.pixels, noise=9, device="cuda", dtype=torch.bfloat16,
        blended=2, shared=shared,
    )  # fmt: skip
    found = colours(case, e)
    assert_close_as_eager(where, found, truth(case, e, torch.bfloat16), truth(case, e, torch.float64))
    assert torch.equal(found, colours(case, e)), "not the same bits twice"


@pytest.mark.gpu
def test_points_have_the_bits_of_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    e = encoded((24, 20), (512, 512), torch.bfloat16, size=(24, 20))
    case = random_stack((1024, 512, 512, 128), (0, 2), batch=2, pixels=480, noise=4, device="cuda", dtype=torch.bfloat16, blended=2)
    image, everywhere = colours(case, e), encoding.points(e)
    chosen = torch.randperm(480, generator=torch.Generator().manual_seed(0)).cuda()[:129]
    some = case.map(lambda name, t: t[:, chosen] if name == "blend" else t)
    assert torch.equal(colours(some, encoded((24, 20), (512, 512), torch.bfloat16, coords=everywhere[chosen])), image[:, chosen])
    monkeypatch.setattr(cuda_blend, "_TILE_WAVES", 0)  # tiles of 256
    assert torch.equal(colours(case, e), image)


@pytest.mark.gpu
@pytest.mark.parametrize("side", [5, 200, 301])
@pytest.mark.parametrize("kinds", [1, 2])
def test_rows_as_they_lie_are_those_of_a_tile(side: int, kinds: int) -> None:
    """One launch over a 16-bit table in place, many units a multiprocessor, and tiles whose rows were copied before."""
    e = encoded((side, side), (64, 136), torch.bfloat16, size=(side, side))
    case = random_stack((200, 128, 64), (1,), batch=3, pixels=side * side, noise=4, device="cuda", dtype=torch.bfloat16, blended=kinds)
    assert torch.equal(colours(case, e._replace(table=e.table.bfloat16())), colours(case, e))


@pytest.mark.gpu
def test_entries_of_the_points() -> None:
    e = encoded((300, 1), (64, 136), torch.bfloat16, coords=points(300), lookup="own")
    case = random_stack((200, 128, 64), (1,), batch=3, pixels=300, noise=4, device="cuda", dtype=torch.bfloat16, blended=2)
    assert_close_as_eager("own", colours(case, e), truth(case, e, torch.bfloat16), truth(case, e, torch.float64))


@pytest.mark.gpu
def test_memory_does_not_grow_with_pixels() -> None:
    case = random_stack(*PAPER, batch=1, pixels=1, noise=4, device="cuda", dtype=torch.bfloat16, blended=2)
    peaks = []
    for side in (256, 2048):
        e = encoded((256, 256), (512, 512), torch.bfloat16, size=(side, side))
        blend = torch.rand(side * side, 2, device="cuda")
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.no_grad():
            rgb = functional.modfc_stack(e, *groups(case), noise=4, blend=blend, want_features=False, backend="cuda")[1]
        peaks.append(torch.cuda.max_memory_allocated() - before - rgb.numel() * 4)
        del rgb
    assert peaks[1] <= peaks[0] + 64 * 2**20


def refused(count: int, spec: StackSpec) -> str | None:
    class Call:
        blend = torch.zeros(5, count)

    return cuda_blend.why_not(Call, spec, torch.bfloat16)


@pytest.mark.parametrize("wave", [7, 57, 66])
@pytest.mark.parametrize("batch", [1, 2, 3, 4, 16, 17, 32, 64, 1000])
def test_launches_fill_their_waves(batch: int, wave: int) -> None:
    """No other number of whole units, from half to all of eight waves, leaves less of its last wave empty."""
    pixels = cuda_blend.tile_pixels(batch, wave, 8)
    assert pixels % 256 == 0

    def full(units: int) -> float:
        return units / (-(-units // wave) * wave)

    others = [count * batch for count in range(1, 8 * wave + 1) if 4 * wave <= count * batch <= 8 * wave]
    found = pixels // 256 * batch
    assert found <= max(8 * wave, batch)
    assert not others or full(found) >= max(map(full, others))
    assert cuda_blend.tile_pixels(batch, wave, 0) == 256


def test_says_why_not() -> None:
    assert refused(2, StackSpec(*PAPER)) is None
    assert refused(3, StackSpec(*PAPER)) == "it blends 2 styles, not 3"
    assert refused(2, StackSpec((8, 8, 8), (1,), blocks=((1, 1),))) == "it has residual blocks"
    assert "exceed 1024" in refused(2, StackSpec((1040, 64), (0,)))


@pytest.mark.gpu
def test_more_styles_fall_back_with_one_warning() -> None:
    case = make("odd", batch=2, pixels=50, blended=3)
    with torch.no_grad(), pytest.warns(RuntimeWarning, match="slower: it blends 2 styles, not 3"):
        found = case.call(functional.modfc_stack, want_features=False, backend="cuda")[1]
    exact, eager = (case.cast(d).call(reference.modfc_stack)[1] for d in (torch.float64, torch.bfloat16))
    assert_close_as_eager("rgb", found, eager, exact)
