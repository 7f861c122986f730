"""The benchmark's rounds: who follows whom changes, and somebody who watches hears how far it is."""

from __future__ import annotations

import builtins
import sys
from collections import Counter

import pytest

from benchmark_helpers import CPU

import measure  # isort: skip
import progress  # isort: skip


@pytest.mark.parametrize("count", range(1, 12))
def test_everyone_follows_everyone_equally_often(count: int) -> None:
    """And stands in every place equally often: no entry always inherits the same neighbour's caches."""
    rounds = count * (1 + count % 2)
    orders = [measure.order_of(count, number) for number in range(rounds)]
    assert all(sorted(order) == list(range(count)) for order in orders)
    followed = Counter(pair for order in orders for pair in zip(order, order[1:]))
    assert len(followed) == count * (count - 1) and len(set(followed.values())) <= 1
    places = Counter(place for order in orders for place in enumerate(order))
    assert len(places) == count**2 and len(set(places.values())) == 1


def test_neighbours_change_within_few_rounds() -> None:
    """A CPU's run may have three rounds only."""
    for count in (3, 6, 7, 8, 9):
        sampled = [i for number in range(3) for i in measure.order_of(count, number)]
        before = [{a for a, b in zip(sampled, sampled[1:]) if b == i} for i in range(count)]
        assert all(len(neighbours) > 1 for neighbours in before), count


def test_rounds_are_sampled_in_that_order() -> None:
    order: list[int] = []
    entries = [measure.Entry(str(i), lambda i=i: order.append(i)) for i in range(4)]
    clock = measure.Clock(CPU)
    measure.take_turns(entries, clock, rounds=5, least=2, seconds=60, progress=lambda steps: steps)
    assert order == [i for number in range(5) for i in measure.order_of(4, number)]
    assert all(len(entry.samples) == 5 for entry in entries)


def _without_tqdm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)


def test_plain_lines_where_tqdm_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On stderr: a line for each named step, and for numbered ones no more than one in some seconds."""
    _without_tqdm(monkeypatch)
    assert list(progress.follow("checking", ["bmm", "cpu"])) == ["bmm", "cpu"]
    assert list(progress.follow("forward", range(3), seconds=0.0)) == [0, 1, 2]
    assert list(progress.follow("fast", range(100), seconds=1e9)) == list(range(100))
    out, err = capsys.readouterr()
    assert out == ""
    assert [line.strip() for line in err.splitlines()] == [
        "checking: bmm, 1 of 2", "checking: cpu, 2 of 2",
        "forward: 1 of 3", "forward: 2 of 3", "forward: 3 of 3", "fast: 1 of 100",
    ]  # fmt: skip


def test_tqdm_is_used_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its bar is asked for the very steps; nothing else imports it."""
    asked: list[tuple] = []
    real = builtins.__import__

    class Fake:
        @staticmethod
        def tqdm(steps, **options):
            asked.append((list(steps), options["desc"]))
            return steps

    def importing(name: str, *arguments: object, **more: object):
        return Fake if name == "tqdm" else real(name, *arguments, **more)

    monkeypatch.setattr(builtins, "__import__", importing)
    assert list(progress.follow("forward", range(3))) == [0, 1, 2]
    assert asked == [([0, 1, 2], "forward")]
