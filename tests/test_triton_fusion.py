"""What inference joins beyond a layer: parts of a call change no bit, pairs of layers keep the oracle's rule."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="this machine has no triton")

from cips_kernels import functional, reference
from cips_kernels.spec import StackSpec, parts
from cips_kernels.testing import EAGER_FACTOR, StackCase, poisoned_empty, random_stack, relative_error
from cips_kernels.triton import config, descriptors, fusion, pairs

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
HOPPER = not CUDA or torch.cuda.get_device_capability()[0] == 9
needs_pairs = pytest.mark.skipif(not HOPPER, reason="pairs are for compute capability 9.0")


# --- parts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 3, 7, 20, 21, 1000])
@pytest.mark.parametrize(("batch", "pixels"), [(1, 1), (3, 7), (2, 20), (5, 1)])
def test_parts_hold_every_row_once(batch: int, pixels: int, rows: int) -> None:
    seen = torch.zeros(batch, pixels, dtype=torch.int64)
    for image, images, pixel, count in parts(batch, pixels, rows):
        assert 1 <= images * count <= rows
        assert images == 1 or count == pixels
        seen[image : image + images, pixel : pixel + count] += 1
    assert (seen == 1).all()
    assert list(parts(batch, 0, rows)) == []


@pytest.mark.parametrize("rows", [16, 40, 90])
@pytest.mark.parametrize("keys", ["index", "coords", "coords of each image", "given"])
def test_parts_change_no_bit(rows: int, keys: str) -> None:
    batch, pixels = 3, 40
    noise = "given" if keys == "given" else 5
    case = random_stack((16, 24, 16, 16), (0, 2), batch=batch, pixels=pixels, skip=True, noise=noise, device=DEVICE)
    shape = {"coords": (pixels, 2), "coords of each image": (batch, pixels, 2)}.get(keys)
    coords = torch.rand(shape, device=DEVICE) * 2 - 1 if shape else None
    whole = case.call(functional.modfc_stack, coords=coords, backend="triton")
    with fusion.using(fusion.Fusion(chunks=rows)), poisoned_empty():
        found = case.call(functional.modfc_stack, coords=coords, backend="triton")
    for a, b in zip(found, whole):
        if CUDA:
            assert torch.equal(a, b)
        else:  # the interpreter's products are NumPy's, whose last bits depend on a row's place
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("tile", "across", "processors", "megabytes", "rows"),
    [
        (config.Tile(128, 256, 64, 8, 3), 2, 132, 50, 2 * 66 * 128),  # H100: two waves of 66 tiles of pixels
        (config.Tile(128, 128, 64, 8, 3), 4, 108, 40, 4 * 27 * 128),  # A100
        (config.Tile(128, 128, 32, 8, 3), 4, 80, 6, None),  # a wave of an A10 needs 5.2 MB, more than its share
        (config.Tile(128, 128, 32, 8, 3), 4, 80, 0, None),
    ],
)
def test_chunks_are_full_waves_that_fit(
    tile: config.Tile, across: int, processors: int, megabytes: int, rows: int | None
) -> None:
    bytes_a_row = 2 * 512 * 2
    found = fusion.rows_in_l2(bytes_a_row, tile, across, processors, megabytes * 2**20)
    assert found == rows
    if rows is not None:
        assert (rows // tile.rows * across) % (processors // across * across) == 0
        assert rows * bytes_a_row <= 0.7 * megabytes * 2**20


def test_nothing_is_cut_small_outside_a_graph() -> None:
    spec = StackSpec((1024, 512, 512), (1,))
    device = torch.device(DEVICE)
    for chunks in (False, True):
        with fusion.using(fusion.Fusion(chunks=chunks)):
            assert fusion.part_rows(spec, 2, 10**6, torch.float16, device) == 1 << 20
    with fusion.using(fusion.Fusion(chunks=77)):
        assert fusion.part_rows(spec, 2, 10**6, torch.float16, device) == 77
    assert fusion.current() == fusion.DEFAULT


@pytest.mark.gpu
def test_a_captured_graph_in_chunks_gives_the_same_bits() -> None:
    case = random_stack(
        (1024, 512, 512, 512), (2,), batch=2, pixels=20000, noise=3, shared=True, dtype=torch.bfloat16, device=DEVICE
    )
    spec = StackSpec((1024, 512, 512, 512), (2,))
    options = dict(want_features=False, backend="triton")
    with torch.no_grad():
        whole = case.call(functional.modfc_stack, **options)[1]
        sizes = []
        with fusion.using(fusion.Fusion(chunks=True)):
            case.call(functional.modfc_stack, **options)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                sizes.append(fusion.part_rows(spec, 2, 20000, torch.bfloat16, case.x.device))
                found = case.call(functional.modfc_stack, **options)[1]
        found.fill_(float("nan"))
        graph.replay()
    if config.l2_bytes(case.x.device) >= 40e6:
        assert sizes[0] < 20000
    assert torch.equal(found, whole)


# --- pairs ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Widths of the pairs that were launched. Interpreted kernels take the copy engine's path for once."""
    if not CUDA:
        limits = (227 * 1024, (9, 0), 4)
        monkeypatch.setattr(config, "device_limits", lambda device: limits)
        monkeypatch.setattr(descriptors, "device_limits", lambda device: limits)
    widths: list[tuple[int, ...]] = []
    plain = pairs.pair_forward

    def pair_forward(x: torch.Tensor, matrices: tuple, *rest) -> None:
        widths.append((x.shape[2], *(m.shape[1] for m in matrices)))
        plain(x, matrices, *rest)

    monkeypatch.setattr(pairs, "pair_forward", pair_forward)
    return widths


def check_pairs(case: StackCase, **options) -> tuple:
    """The rule (cips_kernels.testing) for features and colours of `case` with pairs, and the same bits again."""
    exact = case.cast(torch.float64).call(reference.modfc_stack, **options)
    eager = case.call(reference.modfc_stack, **options)
    with fusion.using(fusion.Fusion(pairs=512)), poisoned_empty(), torch.no_grad():
        found, again = (case.call(functional.modfc_stack, backend="triton", **options) for _ in range(2))
    roundings = 2 * torch.finfo(torch.float32).eps
    for a, b, e, x in zip(found, again, eager, exact):
        assert (a is None) == (x is None)
        if a is not None:
            assert torch.equal(a, b), "two runs differ"
            allowed = EAGER_FACTOR * max(relative_error(e, x), roundings)
            assert relative_error(a, x) <= allowed
    return found


SMALL = [
    # widths, rgb_after, pairs expected, options
    ((48, 40, 72, 56, 32), (1, 3), [(48, 40, 72), (72, 56, 32)], dict(batch=2, pixels=130)),
    ((600, 64, 64, 64), (2,), [(64, 64, 64)], dict(batch=3, pixels=65, shared=True, skip=True, noise=7)),
    ((64, 96, 40, 32, 32), (2,), [(64, 96, 40)], dict(batch=1, pixels=33, noise=None, channels=1)),
    ((64, 64, 32), (-1,), [(64, 64, 32)], dict(batch=2, pixels=20, shared=True, channels=4)),
    ((32, 272, 264), (1,), [(32, 272, 264)], dict(batch=2, pixels=70)),
]


@needs_pairs
@pytest.mark.parametrize(("widths", "rgb_after", "expected", "options"), SMALL, ids=lambda v: str(v).replace(" ", ""))
def test_pairs_keep_the_rule(launched: list, widths: tuple, rgb_after: tuple, expected: list, options: dict) -> None:
    check_pairs(random_stack(widths, rgb_after, dtype=torch.float16, device=DEVICE, **options))
    assert launched[: len(expected)] == expected and len(launched) == 2 * len(expected)


@pytest.mark.gpu
@needs_pairs
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("width", [512, 256, 128])
@pytest.mark.parametrize("pixels", [1, 127, 128, 129, 65536])
def test_real_pairs_keep_the_rule(launched: list, width: int, pixels: int, dtype: torch.dtype) -> None:
    widths = (2 * width,) + 4 * (width,)
    batch = 1 if pixels > 1000 else 3
    case = random_stack(widths, (2, 4), batch=batch, pixels=pixels, shared=True, dtype=dtype, device=DEVICE)
    check_pairs(case)
    assert launched


@needs_pairs
def test_colours_alone_and_parts_of_pairs(launched: list) -> None:
    """The last layer is not kept, and what the pairs write does not lie in what they read."""
    options = dict(batch=2, pixels=200, noise=3, dtype=torch.float16, device=DEVICE)
    case = random_stack((64, 32, 64, 32, 96, 32, 32), (1, 3, 5), **options)
    exact = case.cast(torch.float64).call(reference.modfc_stack)[1]
    with fusion.using(fusion.Fusion(pairs=512)), torch.no_grad():
        whole = case.call(functional.modfc_stack, backend="triton")[1]
    assert relative_error(whole, exact) < 2e-3
    with fusion.using(fusion.Fusion(pairs=512, chunks=128)), torch.no_grad(), poisoned_empty():
        features, parted = case.call(functional.modfc_stack, want_features=False, backend="triton")
    assert features is None and len(launched) == 3 + 3 * 4
    torch.testing.assert_close(parted, whole, rtol=1e-5, atol=1e-5)


@needs_pairs
@pytest.mark.parametrize(
    "change",
    [
        dict(widths=(64, 64, 64), rgb_after=(0, 1)),  # colours are read between the two
        dict(widths=(64, 64, 60), rgb_after=(1,)),  # rows of no whole 16 bytes
        dict(widths=(64, 1024, 64), rgb_after=(1,)),
        dict(widths=(64, 64, 64), rgb_after=(1,), blocks=((0, 1),)),
        dict(widths=(64, 64, 64), rgb_after=(1,), channels=5),
        dict(widths=(64, 64, 64), rgb_after=(1,), dtype=torch.float32),
    ],
    ids=str,
)
def test_what_makes_no_pair_goes_layer_by_layer(launched: list, change: dict) -> None:
    options = {"dtype": torch.float16, "device": DEVICE, "batch": 1, "pixels": 20, **change}
    widths, rgb_after = options.pop("widths"), options.pop("rgb_after")
    check_pairs(random_stack(widths, rgb_after, **options))
    assert launched == []


@needs_pairs
def test_gradients_and_the_default_know_no_pairs(launched: list) -> None:
    case = random_stack((64, 64, 64), (1,), batch=1, pixels=20, dtype=torch.float16, device=DEVICE)
    with torch.no_grad():
        case.call(functional.modfc_stack, backend="triton")
    with fusion.using(fusion.Fusion(pairs=512)):
        leaves = replace(case, x=case.x.clone().requires_grad_())
        leaves.call(functional.modfc_stack, backend="triton")[1].sum().backward()
    assert launched == [] and leaves.x.grad is not None
