"""Who sums up what: how the weight gradients of a part of a backward are dealt to the clusters of a GPU.

A matrix goes by tiles of 256 x 256, each of one cluster at a time. The clusters that own the tiles of one matrix are a team
and walk over its pixels together: a row of the operands then comes from memory once, and for the other tiles from L2. (Tiles
dealt one after the other to single clusters would be at other rows each, three times the traffic, and above what memory
gives.) A team has four clusters; of a matrix with fewer tiles its members share the pixels too. The work of all matrices
forms one line, which is cut into as many equal ranges as there are teams. A tile that is one item's goes straight to its
matrix; others are summed in pieces, added afterwards in the order of their pixels: the same bits every run.

Plain Python: no CUDA, no torch. csrc/tile/wgrad_params.h says what the numbers mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

TEAM = 4  # clusters


class Matrix(NamedTuple):
    """One matrix to be made: of one layer and one image."""

    run: int
    u_plane: int
    x_plane: int
    image: int
    out_features: int
    in_features: int
    place: int  # in n
    # of the ToRGBs' matrices that read this x: place in n and row stride
    colours: tuple[tuple[int, int], ...] = ()


class Item(NamedTuple):
    """csrc's WgradItem but for its unused end."""

    run: int
    u_plane: int
    x_plane: int
    image: int
    output: int
    input: int
    begin: int
    end: int
    piece: int
    colours: int
    colour_step: int
    colour_steps: int
    place: int


class Sum(NamedTuple):
    """csrc's WgradSum."""

    run: int
    first: int
    count: int
    output: int
    input: int
    row_stride: int
    place: int


@dataclass
class Plan:
    """The items of each cluster, what is added up afterwards, and how many pieces and sums of colours there are."""

    clusters: list[list[Item]]
    sums: list[Sum] = field(default_factory=list)
    pieces: int = 0
    colour_parts: int = 0


@dataclass
class _Tile:
    """A tile of a matrix and its shares: (cluster, first block, end), in any order."""

    matrix: Matrix
    output: int
    input: int
    shares: list[tuple[int, int, int]] = field(default_factory=list)


def _groups(matrix: Matrix, tile: int, team: int) -> list[list[_Tile]]:
    """A matrix's tiles, as many together as a team has clusters; those that read the same x beside one another."""
    tiles = [
        _Tile(matrix, o, i)
        for i in range(0, matrix.in_features, tile)
        for o in range(0, matrix.out_features, tile)
    ]
    return [tiles[k : k + team] for k in range(0, len(tiles), team)]


def deal(matrices: Sequence[Matrix], blocks: int, clusters: int, tile: int, steps: int) -> Plan:
    """The plan of matrices that are each a sum over `blocks` blocks of pixels, of `steps` steps each (an even number), in tiles
    of `tile` by `tile`."""
    team = min(TEAM, clusters)
    teams = clusters // team
    groups = [group for matrix in matrices for group in _groups(matrix, tile, team)]
    # a group's clusters beyond its tiles take a share of the pixels each
    shares = [-(-blocks // (team // len(group))) for group in groups]
    total = sum(shares)
    first = 0
    for group, count in zip(groups, shares):
        for number in range(teams):
            begin, end = (min(max(t * total // teams - first, 0), count) for t in (number, number + 1))
            for k in range(team // len(group) if begin < end else 0):
                low, high = (min(k * count + block, blocks) for block in (begin, end))
                for member, part in enumerate(group if low < high else ()):
                    part.shares.append((number * team + k * len(group) + member, low, high))
        first += count
    return _number([part for group in groups for part in group], teams * team, tile, steps)


def _number(tiles: list[_Tile], clusters: int, tile: int, steps: int) -> Plan:
    """The items, their pieces and sums of colours counted up in the order of tiles and pixels."""
    plan = Plan([[] for _ in range(clusters)])
    first = 0  # sum of colours of the tiles that read the same x, which follow one another
    for part in tiles:
        matrix, whole = part.matrix, len(part.shares) == 1
        rows = -(-matrix.out_features // tile)  # of tiles: two share the colours' steps
        step, some = (part.output // tile * (steps // 2), steps // 2) if rows == 2 else (0, steps)
        takes = bool(matrix.colours) and (rows <= 2 or part.output == 0)
        first = plan.colour_parts if part.output == 0 else first
        for cluster, begin, end in sorted(part.shares, key=lambda share: share[1]):
            piece, colours = -1 if whole else plan.pieces, plan.colour_parts if takes else -1
            plan.pieces += not whole
            plan.colour_parts += takes
            where = matrix[:4] + (part.output, part.input, begin, end)
            plan.clusters[cluster].append(Item(*where, piece, colours, step, some, matrix.place))
        if not whole:
            count = len(part.shares)
            plan.sums.append(Sum(matrix.run, plan.pieces - count, count, part.output, part.input, 0, matrix.place))
        if part.output + tile >= matrix.out_features:
            for place, row_stride in matrix.colours:
                count = plan.colour_parts - first
                plan.sums.append(Sum(matrix.run, first, count, -1, part.input, row_stride, place))
    return plan
