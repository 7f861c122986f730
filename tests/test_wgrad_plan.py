"""The weight gradients' plan: every product is made once, and every piece added once, in the order of the pixels."""

from __future__ import annotations

from collections import Counter

import pytest

from cips_kernels.wgrad_plan import TEAM, Matrix, Plan, deal

TILE, STEPS = 256, 4
PAPER = [(1024, 512), *[(512, 512)] * 14]
RELEASED = [(512, 512)] * 3 + [(512, 256), (256, 256), (256, 128), (128, 64), (64, 32), (32, 32)]
CASES = {
    # (inputs, outputs) of the layers, those whose x a ToRGB reads, images, blocks of pixels, clusters
    "paper, an image": (PAPER, {3, 5, 7, 9, 11, 13}, 1, 1024, 66),
    "paper, many images": (PAPER, {3, 5, 7}, 16, 5, 66),
    "paper, fewer clusters": (PAPER, {3, 5, 7}, 1, 1024, 57),
    "narrow": (RELEASED, {1, 3, 5, 8}, 2, 100, 66),
    "one layer": ([(64, 128)], set(), 1, 1, 66),
    "one block, many clusters": ([(700, 512), (512, 384)], {1}, 3, 1, 60),
    "three clusters": (RELEASED, {1, 3}, 2, 7, 3),
    "one cluster": (PAPER[:4], {3}, 1, 10, 1),
    "three rows of tiles": ([(96, 700), (700, 64)], {1}, 1, 9, 16),
}


def matrices(layers: list[tuple[int, int]], read: set[int], images: int) -> list[Matrix]:
    found = []
    for layer, (inputs, outputs) in enumerate(layers):
        for image in range(images):
            colours = ((10**9 + 100 * layer + image, inputs),) if layer in read else ()
            place = (layer * images + image) * 2**20
            found.append(Matrix(layer, image, 2 * image, image, outputs, inputs, place, colours))
    return found


def made(case: str) -> tuple[list[Matrix], int, int, Plan]:
    layers, read, images, blocks, clusters = CASES[case]
    wanted = matrices(layers, read, images)
    return wanted, blocks, clusters, deal(wanted, blocks, clusters, TILE, STEPS)


@pytest.mark.parametrize("case", CASES)
def test_every_block_of_every_tile_is_summed_once(case: str) -> None:
    wanted, blocks, clusters, plan = made(case)
    assert len(plan.clusters) <= clusters
    found = Counter()
    for item in (item for own in plan.clusters for item in own):
        assert 0 <= item.begin < item.end <= blocks
        found.update((item.place, item.output, item.input, block) for block in range(item.begin, item.end))
    tiles = {
        (m.place, o, i): m
        for m in wanted
        for o in range(0, m.out_features, TILE)
        for i in range(0, m.in_features, TILE)
    }
    assert found == Counter((*tile, block) for tile in tiles for block in range(blocks))


@pytest.mark.parametrize("case", CASES)
def test_items_say_what_their_matrix_says(case: str) -> None:
    wanted, _, _, plan = made(case)
    by_place = {m.place: m for m in wanted}
    for item in (item for own in plan.clusters for item in own):
        m = by_place[item.place]
        assert item[:4] == m[:4]
        assert (item.colours >= 0) <= bool(m.colours)


@pytest.mark.parametrize("case", CASES)
def test_pieces_are_added_in_the_order_of_their_pixels(case: str) -> None:
    _, blocks, _, plan = made(case)
    pieces: dict[int, tuple] = {}
    for item in (item for own in plan.clusters for item in own):
        if item.piece < 0:
            assert (item.begin, item.end) == (0, blocks)
        else:
            assert item.piece not in pieces
            pieces[item.piece] = (item.place, item.output, item.input, item.begin, item.end)
    assert sorted(pieces) == list(range(plan.pieces))
    for entry in (entry for entry in plan.sums if entry.output >= 0):
        own = [pieces.pop(number) for number in range(entry.first, entry.first + entry.count)]
        assert {piece[:3] for piece in own} == {(entry.place, entry.output, entry.input)}
        assert [own[0][3], *(piece[4] for piece in own)] == [*(piece[3] for piece in own), blocks]
    assert not pieces


@pytest.mark.parametrize("case", CASES)
def test_every_step_of_the_colours_is_summed_once(case: str) -> None:
    """For each tile's width of what a ToRGB reads, and added in one sum for each ToRGB."""
    wanted, blocks, _, plan = made(case)
    parts = {}
    for item in (item for own in plan.clusters for item in own if item.colours >= 0):
        assert item.colours not in parts
        steps = [
            STEPS * block + step
            for block in range(item.begin, item.end)
            for step in range(item.colour_step, item.colour_step + item.colour_steps)
        ]
        parts[item.colours] = (item.place, item.input, steps)
    assert sorted(parts) == list(range(plan.colour_parts))
    readers = {m.colours[0]: m for m in wanted if m.colours}
    found = Counter()
    for entry in (entry for entry in plan.sums if entry.output < 0):
        m = readers[entry.place, entry.row_stride]
        own = [parts.pop(number) for number in range(entry.first, entry.first + entry.count)]
        assert {part[:2] for part in own} == {(m.place, entry.input)}
        assert sorted(step for part in own for step in part[2]) == list(range(STEPS * blocks))
        found[entry.place, entry.input] += 1
    assert found == Counter((place, i) for (place, _), m in readers.items() for i in range(0, m.in_features, TILE))
    assert not parts


def test_several_torgbs_that_read_one_layer_share_its_sums() -> None:
    m = Matrix(0, 0, 0, 0, 512, 512, 0, ((7, 512), (9, 512)))
    plan = deal([m], 4, 4, TILE, STEPS)
    assert plan.colour_parts == 4
    assert [(s.place, s.first, s.input) for s in plan.sums if s.output < 0] == [(7, 0, 0), (9, 0, 0), (7, 2, 256), (9, 2, 256)]


@pytest.mark.parametrize("case", CASES)
def test_clusters_have_equal_work(case: str) -> None:
    """But for whole blocks, and for what a team's members cannot share."""
    wanted, blocks, clusters, plan = made(case)
    team = min(TEAM, clusters)
    work = [sum(item.end - item.begin for item in own) for own in plan.clusters]
    tiles = [-(-m.out_features // TILE) * -(-m.in_features // TILE) for m in wanted]
    most = sum(
        -(-blocks // (team // members))
        for count in tiles
        for members in [team] * (count // team) + [count % team] * (count % team > 0)
    )
    teams = clusters // team
    assert max(work) <= -(-most // teams) + len(wanted)
