"""Weight gradients of many matrices in one launch: how they are dealt, and whole numbers whose sums are exact."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="this machine has no triton")

from cips_kernels.testing import poisoned_empty
from cips_kernels.triton import descriptors, teams
from cips_kernels.triton.fragment import to_natural

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"

LINES = [
    # matrices, blocks of each, teams
    (1, 1, 1),
    (1, 1000, 16),
    (15, 1024, 16),
    (16, 1024, 16),
    (30, 7, 16),
    (3, 5, 15),
    (3, 5, 7),
    (7, 1, 7),
    (2, 66, 132),
    (100, 3, 33),
]


@pytest.mark.parametrize(("matrices", "blocks", "count"), LINES)
def test_every_block_is_dealt_once(matrices, blocks, count):
    total = matrices * blocks
    ranges = [
        (teams.first_block.fn(t, total, count), teams.first_block.fn(t + 1, total, count))
        for t in range(count)
    ]
    assert [block for first, end in ranges for block in range(first, end)] == list(range(total))
    assert max(end - first for first, end in ranges) - min(end - first for first, end in ranges) <= 1
    for team, (first, end) in enumerate(ranges):
        assert {teams.team_of.fn(block, total, count) for block in range(first, end)} == {team}


@pytest.mark.parametrize(("matrices", "blocks", "count"), LINES)
@pytest.mark.parametrize("tiles", [1, 8])
def test_the_pieces_of_a_cut_matrix_are_found_in_order(matrices, blocks, count, tiles):
    total, kept = matrices * blocks, {}
    whole = {(m, tile): 0 for m in range(matrices) for tile in range(tiles)}
    for team in range(count):  # as the first kernel walks
        start, end = (teams.first_block.fn(t, total, count) for t in (team, team + 1))
        for m in range(start // blocks, -(-end // blocks)):
            begin, stop = max(start - m * blocks, 0), min(end - m * blocks, blocks)
            assert begin < stop
            for tile in range(tiles):
                if (begin, stop) == (0, blocks):
                    whole[m, tile] += 1
                    continue
                number = teams.piece_number.fn(team, tile, tiles, begin)
                assert number not in kept and 0 <= number < 2 * count * tiles
                kept[number] = (m, tile, begin, stop)
    for team in range(1, count):  # as the second one adds
        m = teams.first_block.fn(team, total, count) // blocks
        if teams.team_of.fn(m * blocks, total, count) != team - 1:
            continue
        for tile in range(tiles):
            pieces = [kept.pop(teams.piece_number.fn(team - 1, tile, tiles, 0))]
            for other in range(team, teams.team_of.fn((m + 1) * blocks - 1, total, count) + 1):
                pieces.append(kept.pop(teams.piece_number.fn(other, tile, tiles, 1)))
            assert {piece[:2] for piece in pieces} == {(m, tile)}
            assert [piece[2] for piece in pieces] + [blocks] == [0] + [piece[3] for piece in pieces]
            whole[m, tile] += 1
    assert not kept and set(whole.values()) == {1}


def whole_numbers(*shape: int, seed: int) -> torch.Tensor:
    """Float64 of -4 to 4: products and sums over a few thousand are exact in float32."""
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(seed)).double()


def in_memory(t: torch.Tensor, fragment: bool, dtype: torch.dtype) -> torch.Tensor:
    """`t` `[L, n, P, C]` as a part of something larger: more images before and after, and room between layers."""
    depth, images, pixels, width = t.shape
    flat = torch.full((depth, (images + 2) * pixels * width + 8), float("nan"), dtype=dtype, device=DEVICE)
    view = flat[:, pixels * width : (images + 1) * pixels * width].view(depth, images, pixels, width)
    view.copy_(to_natural(t) if fragment else t)
    return view


def claim_descriptors(monkeypatch: pytest.MonkeyPatch, programs: int) -> None:
    """Interpreted, a chip with descriptors and so many multiprocessors is claimed; a GPU is what it is."""
    if CUDA and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("this GPU has no tensor copy engine")
    if not CUDA:
        monkeypatch.setattr(descriptors, "device_limits", lambda device: (100 * 1024, (9, 0), programs))


SHAPES = [
    # layers, images, pixels, out_features, in_features, shared
    (3, 2, 200, 64, 96, False),
    (5, 1, 130, 160, 64, False),
    (2, 3, 65, 32, 160, True),
    (1, 1, 1000, 32, 32, False),
    (4, 2, 64, 64, 64, False),
    (2, 2, 20, 48, 40, False),
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda v: "x".join(map(str, v)))
@pytest.mark.parametrize("programs", [1, 3, 8, 13])
def test_every_matrix_in_one_launch(monkeypatch, shape, programs):
    claim_descriptors(monkeypatch, programs)
    depth, images, pixels, out_features, in_features, shared = shape
    fragment_u, fragment_x = out_features % 32 == 0, in_features % 32 == 0 and not shared
    u = whole_numbers(depth, images, pixels, out_features, seed=1)
    x = whole_numbers(depth, 1 if shared else images, pixels, in_features, seed=2)
    truth = 0.375 * torch.einsum("lbpo,lbpi->lboi", u, x.expand(-1, images, -1, -1))
    row, count = in_features + 16, depth * images
    order = torch.randperm(count, generator=torch.Generator().manual_seed(3))
    offsets = 16 + order * (out_features * row + 32)
    out = torch.full((16 + count * (out_features * row + 32),), float("nan"), device=DEVICE)
    operands = in_memory(u, fragment_u, torch.float16), in_memory(x, fragment_x, torch.float16)
    with poisoned_empty():
        descriptors.wgrad_chain(
            *operands, offsets.to(DEVICE), out, row, fragment_u=fragment_u, fragment_x=fragment_x, scale=0.375
        )
    found = [out.as_strided((out_features, in_features), (row, 1), int(offset)) for offset in offsets]
    assert torch.equal(torch.stack(found).view(truth.shape).double().cpu(), truth)
    assert int(out.isnan().sum()) == out.numel() - truth.numel()  # nothing else was written


def test_what_does_not_fit_is_refused(monkeypatch):
    claim_descriptors(monkeypatch, 8)
    u = torch.zeros(2, 3, 8, 64, dtype=torch.float16, device=DEVICE)
    offsets, out = torch.zeros(6, dtype=torch.int64, device=DEVICE), torch.zeros(6 * 64 * 64, device=DEVICE)

    def call(u=u, x=u, offsets=offsets, out=out, row=64, **flags):
        descriptors.wgrad_chain(u, x, offsets, out, row, **flags)

    for match, wrong in {
        r"expected \[L, n, P, O\], \[L, n or 1, P, I\]": dict(x=u[:, :2]),
        "expected something in them": dict(u=u[:, :, :0], x=u[:, :, :0]),
        "expected operands that descriptors can read": dict(x=u.float()),
        "x .*: expected operands that descriptors can read": dict(x=u.bfloat16()),
        r"offsets is torch.int64 \(5,\), expected int64 \[6\]": dict(offsets=offsets[:5]),
        "offsets is torch.int32": dict(offsets=offsets.int()),
        "out is torch.float64": dict(out=out.double()),
        "row_stride is 63, expected at least the width 64": dict(row=63),
        "u has 48 channels, expected a multiple of 32": dict(u=u[..., :48], fragment_u=True),
        "x has 48 channels, expected a multiple of 32": dict(x=u[..., :48], fragment_x=True),
    }.items():
        with pytest.raises(ValueError, match=match):
            call(**wrong)
    many = u[:1, :1, :1].expand(1 << 10, 1 << 10, 1 << 14, 64)  # of one row's memory
    with pytest.raises(ValueError, match="u has [0-9]+ blocks of [0-9]+ pixels, expected at most"):
        call(u=many, x=many, offsets=offsets[:1].repeat(1 << 20))
    call()
