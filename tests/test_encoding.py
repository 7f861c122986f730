"""An encoding in place of the input: the same colours as its tensor, a tile at a time, on every backend."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import Tensor

from cips_kernels import Encoding, FusedModFCStack, cuda_onchip, encoding, functional, reference
from cips_kernels.testing import StackCase, assert_close_as_eager, random_stack

WIDTHS, RGB_AFTER = (7 + 6, 10, 8, 8), (0, 2)


def make(dtype: torch.dtype = torch.float32, **places) -> Encoding:
    generator = torch.Generator().manual_seed(5)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(wide)

    return Encoding(draw(7, 2), draw(7), draw(4, 5, 6), dtype=dtype, **places)


def random_points(*shape: int) -> Tensor:
    return torch.rand(*shape, 2, generator=torch.Generator().manual_seed(6)) * 2.2 - 1.1


def places(batch: int) -> dict[str, dict]:
    return {
        "own grid": {"size": (4, 5)},
        "another grid": {"size": (6, 3)},
        "points": {"coords": random_points(17)},
        "points an image": {"coords": random_points(batch, 17)},
        "compat": {"coords": random_points(17), "lookup": "compat"},
        "own entries": {"coords": random_points(20), "lookup": "own"},
        "own entries of a grid": {"size": (2, 10), "lookup": "own"},
    }


def without(e: Encoding, part: str) -> Encoding:
    """Without Fourier features, or without a table."""
    if part == "table":
        return e._replace(table=None)
    return e._replace(fourier_weight=e.fourier_weight[:0], fourier_bias=e.fourier_bias[:0])


def brute_force(e: Encoding, image: int, pixel: int) -> list[float]:
    """The encoding of one point, in Python's floats."""
    if e.coords is None:
        row, column = divmod(pixel, e.size[1])
        x, y = (2 * k / (n - 1) - 1 for k, n in ((column, e.size[1]), (row, e.size[0])))
    else:
        x, y = (e.coords if e.coords.dim() == 2 else e.coords[image])[pixel].tolist()
    features = [math.sin(bx * x + by * y + b) for (bx, by), b in zip(e.fourier_weight.tolist(), e.fourier_bias.tolist())]
    rows, columns, channels = e.table.shape
    if e.lookup == "own":
        return features + e.table.flatten(0, 1)[pixel].tolist()
    weights = []
    for t, n in ((x, columns), (y, rows)):
        position = (t + 1) * (n - 1) / 2 if e.lookup == "exact" else ((t + 1) * n - 1) / 2
        position = min(max(position, 0.0), n - 1.0)
        weights.append([max(0.0, 1 - abs(position - k)) for k in range(n)])
    table = e.table.tolist()
    embedding = [
        sum(weights[1][r] * weights[0][c] * table[r][c][k] for r in range(rows) for c in range(columns))
        for k in range(channels)
    ]
    return features + embedding


@pytest.mark.parametrize("where", places(2))
def test_encode_is_the_formula(where):
    e = make(**places(2)[where])
    found = encoding.encode(e)
    assert found.shape == (e.images, e.pixels, 13)
    for image in range(e.images):
        for pixel in range(e.pixels):
            torch.testing.assert_close(
                found[image, pixel].double(),
                torch.tensor(brute_force(e, image, pixel), dtype=torch.float64),
                rtol=0,
                atol=4e-6,
            )


@pytest.mark.parametrize("where", places(2))
def test_a_tile_of_an_encoding_is_a_part_of_it(where):
    e = make(**places(2)[where])
    whole, coords = encoding.encode(e), encoding.points(e)
    assert torch.equal(encoding.encode(e, 3, 9), whole[:, 3:12])
    assert torch.equal(encoding.points(e, 3, 9), coords[..., 3:12, :])


def colours(case: StackCase, e: Encoding, **options) -> Tensor:
    with torch.no_grad():
        case = case.cast(e.dtype)
        groups = (case.weights, case.styles, case.biases, case.noise_strengths)
        rgbs = (case.rgb_weights, case.rgb_styles, case.rgb_biases, case.rgb_after)
        return functional.modfc_stack(
            e, *groups, *rgbs, noise=case.noise, want_features=False, **options
        )[1]


def from_tensor(case: StackCase, e: Encoding, dtype: torch.dtype) -> Tensor:
    """The same by way of the whole tensor, and of the reference."""
    with torch.no_grad():
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        points = None if e.coords is None else e.coords
        table = None if e.table is None else e.table.to(wide)
        e = Encoding(e.fourier_weight.to(wide), e.fourier_bias.to(wide), table, points, e.size, e.lookup, dtype)
        x = encoding.encode(e)
        case = case.cast(dtype)
        groups = (case.weights, case.styles, case.biases, case.noise_strengths)
        rgbs = (case.rgb_weights, case.rgb_styles, case.rgb_biases, case.rgb_after)
        return reference.modfc_stack(x, *groups, *rgbs, noise=case.noise, coords=encoding.points(e), layout="bpc")[1]


@pytest.mark.parametrize("tile", [4, 1000])
@pytest.mark.parametrize("noise", [None, 11, "given"])
@pytest.mark.parametrize("where", places(3))
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_colours_are_those_of_the_tensor(monkeypatch, backend, where, noise, tile):
    monkeypatch.setitem(encoding._TILE, "cpu", tile)
    e = make(**places(3)[where])
    case = random_stack(WIDTHS, RGB_AFTER, batch=3, pixels=e.pixels, noise=noise)
    found = colours(case, e, backend=backend)
    assert_close_as_eager(
        "rgb", found, from_tensor(case, e, torch.float32), from_tensor(case, e, torch.float64)
    )


@pytest.mark.parametrize("part", ["fourier", "table"])
@pytest.mark.parametrize("where", places(3))
@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
def test_one_part_may_be_missing(monkeypatch, backend, where, part):
    if backend == "triton":
        pytest.importorskip("triton", reason="this machine has no triton")
    monkeypatch.setitem(encoding._TILE, "cpu", 7)
    whole = make(**places(3)[where])
    e = without(whole, part)
    kept = slice(7, 13) if part == "fourier" else slice(0, 7)
    assert torch.equal(encoding.encode(e), encoding.encode(whole)[..., kept]) and e.features == kept.stop - kept.start
    case = random_stack((e.features, *WIDTHS[1:]), RGB_AFTER, batch=3, pixels=e.pixels)  # noise given, see test_triton_sines
    found = colours(case, e, backend=backend)
    assert_close_as_eager(
        "rgb", found, from_tensor(case, e, torch.float32), from_tensor(case, e, torch.float64)
    )


def test_the_on_chip_kernel_says_why_it_does_not_serve_a_table_alone():
    e = make(size=(4, 5))
    assert cuda_onchip.why_not_encoding(e) is None and cuda_onchip.why_not_encoding(without(e, "table")) is None
    assert cuda_onchip.why_not_encoding(without(e, "fourier")) == "0 Fourier features are not 1 to 512"


@pytest.mark.parametrize("part", ["fourier", "table"])
def test_gradients_where_one_part_is_missing(part):
    torch.manual_seed(0)
    e = without(make(torch.float64, size=(4, 5)), part)
    stack = FusedModFCStack([e.features, *WIDTHS[1:]], 5, rgb_after=list(RGB_AFTER)).double()
    style = torch.randn(2, 5, dtype=torch.float64)
    leaves = tuple(t.detach().requires_grad_() for t in (e[2:3] if part == "fourier" else e[:2]))

    def call(*parts: Tensor) -> Tensor:
        given = (*e[:2], *parts) if part == "fourier" else (*parts, None)
        return stack(e._replace(**dict(zip(Encoding._fields, given))), style, noise="off")

    assert torch.autograd.gradcheck(call, leaves)


def test_tiles_are_never_larger_than_asked(monkeypatch):
    """Memory does not grow with the number of pixels: no backend sees more than a tile, shared by all images or not."""
    monkeypatch.setitem(encoding._TILE, "cpu", 8)
    seen = []
    forward = reference.forward
    monkeypatch.setattr(reference, "forward", lambda inputs, *a: seen.append(inputs.x.shape) or forward(inputs, *a))
    case = random_stack(WIDTHS, RGB_AFTER, batch=2, pixels=30, noise=3)
    colours(case, make(size=(5, 6)), backend="reference")
    assert seen == [(1, 8, 13), (1, 8, 13), (1, 8, 13), (1, 6, 13)]
    seen.clear()
    colours(case, make(coords=random_points(2, 30)), backend="reference")
    assert seen == [(2, 4, 13)] * 7 + [(2, 2, 13)]


def test_gradients_go_through_an_encoding():
    """Where a gradient is wanted the encoding is made as a tensor, with the graph behind it."""
    torch.manual_seed(0)
    stack = FusedModFCStack(list(WIDTHS), 5, rgb_after=list(RGB_AFTER)).double()
    e = make(torch.float64, size=(4, 5))
    style = torch.randn(2, 5, dtype=torch.float64)

    def call(weight: Tensor, bias: Tensor, table: Tensor) -> Tensor:
        return stack(Encoding(weight, bias, table, size=(4, 5)), style, noise="off")

    leaves = tuple(t.detach().requires_grad_() for t in e[:3])
    assert torch.autograd.gradcheck(call, leaves)
    with torch.no_grad():
        tiled = call(*leaves)
    torch.testing.assert_close(tiled, call(*leaves), rtol=1e-12, atol=1e-12)


def test_features_and_skip_come_with_an_encoding_too():
    e = make(size=(4, 5))
    case = random_stack(WIDTHS, RGB_AFTER, batch=2, pixels=20, noise=None, skip=True)
    x = encoding.encode(e)
    groups = (case.weights, case.styles, case.biases, case.noise_strengths)
    rgbs = (case.rgb_weights, case.rgb_styles, case.rgb_biases, case.rgb_after)
    found = functional.modfc_stack(e, *groups, *rgbs, case.skip)
    expected = functional.modfc_stack(x, *groups, *rgbs, case.skip)
    for value, truth in zip(found, expected):
        assert torch.equal(value, truth)


def test_bfloat16_and_autocast():
    case = random_stack(WIDTHS, RGB_AFTER, batch=2, pixels=20, noise=7)
    e = make(torch.bfloat16, size=(4, 5))
    found = colours(case, e)
    eager, exact = (from_tensor(case, e, dtype) for dtype in (torch.bfloat16, torch.float64))
    assert_close_as_eager("rgb", found, eager, exact)
    stack = FusedModFCStack(list(WIDTHS), 5, rgb_after=list(RGB_AFTER))
    style = torch.randn(2, 5)
    with torch.no_grad():
        narrow = stack(e, style, noise="off")
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(stack(e._replace(dtype=None), style, noise="off"), narrow)


def test_compiles_to_the_same(monkeypatch):
    stack = FusedModFCStack(list(WIDTHS), 5, rgb_after=list(RGB_AFTER))
    e, style = make(coords=random_points(9)), torch.randn(2, 5)
    with torch.no_grad():
        expected = stack(e, style, 3)

        def call(coords: Tensor) -> Tensor:
            return stack(e._replace(coords=coords), style, 3)

        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")(e.coords)
    torch.testing.assert_close(compiled, expected)


def test_opcheck():
    case = random_stack(WIDTHS, RGB_AFTER, batch=2, pixels=6, noise=None)
    e = make(size=(2, 3))
    from cips_kernels import ops
    from cips_kernels.arguments import stack_call

    groups = (case.weights, case.styles, case.biases, case.noise_strengths)
    rgbs = (case.rgb_weights, case.rgb_styles, case.rgb_biases, case.rgb_after)
    inputs, spec = stack_call(torch.zeros(1, 6, 13), *groups, *rgbs, noise=5)
    inputs = inputs._replace(x=torch.zeros(1, 0, 13))
    arguments = (*e[:3], None, [2, 3], "exact", *inputs, *ops._spec_values(spec), "cpu")
    torch.library.opcheck(torch.ops.cips_kernels.synthesis.default, arguments)


def test_a_nan_coordinate_spoils_its_own_pixel():
    coords = random_points(6)
    coords[2, 1] = math.nan
    case = random_stack(WIDTHS, RGB_AFTER, batch=2, pixels=6, noise=None)
    found = colours(case, make(coords=coords))
    assert found[:, 2].isnan().all() and found[:, [0, 1, 3, 4, 5]].isfinite().all()


def test_outside_the_square_the_border_goes_on():
    e = make(coords=torch.tensor([[1.0, -1.0], [3.0, -1.0], [1.0, -40.0]]))
    found = encoding.embeddings(e)
    assert torch.equal(found[1], found[0]) and torch.equal(found[2], found[0])
    assert torch.equal(found[0], e.table[0, -1])


ERRORS = {
    "lookup": (dict(lookup="nearest"), ValueError, "lookup: expected one of exact, compat, own, got 'nearest'"),
    "own entries": (dict(lookup="own", size=(3, 5)), ValueError, "table: expected an entry for each of 1 x 15 points"),
    "own entries an image": (
        dict(lookup="own", size=None, coords=torch.zeros(2, 10, 2)), ValueError, "table: expected an entry for each of 2 x 10 points",
    ),
    "weight's shape": (dict(fourier_weight=torch.zeros(7, 3)), ValueError, r"fourier_weight: expected \[F, 2\]"),
    "weight's dtype": (dict(fourier_weight=torch.zeros(7, 2).half()), TypeError, "fourier_weight: expected float32"),
    "bias": (dict(fourier_bias=torch.zeros(6)), ValueError, r"fourier_bias: expected \[F\] = \[7\]"),
    "table's shape": (dict(table=torch.zeros(20, 6)), ValueError, r"table: expected \[S_h, S_w, T\]"),
    "table's dtype": (dict(table=torch.zeros(4, 5, 6).half()), TypeError, "table: expected torch.float32"),
    "empty table": (dict(table=torch.zeros(0, 5, 6)), ValueError, "table: expected at least one entry"),
    "neither part": (
        dict(table=None, fourier_weight=torch.zeros(0, 2), fourier_bias=torch.zeros(0)),
        ValueError,
        "fourier_weight: expected at least one feature where there is no table",
    ),
    "neither": (dict(size=None), ValueError, "size: expected either coords or a size"),
    "both": (dict(coords=torch.zeros(3, 2)), ValueError, "size: expected either coords or a size"),
    "size": (dict(size=(4, 0)), ValueError, r"size: expected \(height, width\)"),
    "coords' shape": (dict(size=None, coords=torch.zeros(3, 3)), ValueError, r"coords: expected \[P, 2\]"),
    "coords' dtype": (dict(size=None, coords=torch.zeros(3, 2).long()), TypeError, "coords: expected a floating"),
    "coords' device": (dict(size=None, coords=torch.zeros(3, 2, device="meta")), ValueError, "coords: is on meta"),
    "dtype": (dict(dtype=torch.float64), TypeError, "dtype: expected float16, bfloat16 or float32"),
    "images": (dict(size=None, coords=torch.zeros(3, 4, 2)), ValueError, "expected the batch size of x, 3"),
    "width": (dict(table=torch.zeros(4, 5, 5)), ValueError, r"weights\[0\]: expected \[O, I\] = \[any, 12\]"),
}


@pytest.mark.parametrize("change", ERRORS)
def test_errors_name_the_argument(change):
    changes, error, words = ERRORS[change]
    case = random_stack(WIDTHS, RGB_AFTER, batch=2, pixels=20, noise=None)
    e = make(size=(4, 5))._replace(**changes)
    with pytest.raises(error, match=words):
        colours(case, e) if e.dtype != torch.float64 else functional._encoded_stack(e, ([], []), None, {}, False, "all", "auto")


def test_a_layout_or_coordinates_beside_an_encoding_are_refused():
    case = random_stack(WIDTHS, RGB_AFTER, batch=2, pixels=20, noise=None)
    for options in ({"layout": "bcp"}, {"coords": torch.zeros(20, 2)}):
        with pytest.raises(ValueError, match="coords, layout: expected None and 'bpc'"):
            colours(case, make(size=(4, 5)), **options)


def test_no_warning_where_nothing_is_slower():
    case = random_stack(WIDTHS, RGB_AFTER, batch=2, pixels=20, noise=None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        colours(case, make(size=(4, 5)))


def test_an_image_too_large_for_memory_says_so():
    e = Encoding(torch.randn(2, 2), torch.randn(2), size=(1_000_000, 1_000_000))
    stack = FusedModFCStack([2, 4], 3)
    with torch.no_grad(), pytest.raises(torch.OutOfMemoryError, match="size: the colours of 1 x 1000000000000 pixels need 12000000000000 bytes on cpu"):
        stack(e, torch.randn(1, 3))
