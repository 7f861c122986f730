"""Clocks, rounds and memory.

All entries of a group take turns, one sample each a round, so that a clock that drifts with heat or load hits
all alike; the ceilings take turns with them. Whose caches and heat an entry inherits changes from round to round. A sample is one call, or as many as fill a few milliseconds. On
a GPU it is timed by events around the calls, after the device has gone idle: launches that the host cannot
hide count, as they do in use.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

Call = Callable[[], object]


@dataclass
class Entry:
    """Something that is called and timed.

    Attributes:
        name: whose it is.
        call: does the work once (`calls` times).
        calls: how often one `call` does it; more than 1 where a captured graph holds several.
        repeats: calls in one sample.
        samples: milliseconds for doing it once, one a round.
    """

    name: str
    call: Call
    calls: int = 1
    repeats: int = 1
    samples: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Milliseconds."""
        return statistics.median(self.samples)

    def percentile(self, fraction: float) -> float:
        """Milliseconds below which `fraction` of the samples lie (linear between samples)."""
        ordered = sorted(self.samples)
        place = fraction * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


class Clock:
    """Times calls on one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cuda = device.type == "cuda"

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def time(self, call: Call, repeats: int = 1) -> float:
        """Milliseconds of `repeats` calls."""
        self.synchronize()
        if not self.cuda:
            start = time.perf_counter()
            for _ in range(repeats):
                call()
            return (time.perf_counter() - start) * 1e3
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def prepare(self, entry: Entry) -> None:
        """Warm an entry up and choose its repeats."""
        filled = 10.0 if self.cuda else 20.0
        entry.call()
        once = self.time(entry.call)
        if once < filled:
            once = self.time(entry.call, 3) / 3
        entry.repeats = max(1, min(100, round(filled / max(once, 1e-3))))


def order_of(count: int, number: int) -> list[int]:
    """Who is sampled when in a round: rows of Williams' square, forwards and backwards for an odd count.

    Over `count` rounds (an odd count: twice as many) each entry stands once (twice) in each place, and follows
    each other one equally often. A plain rotation would leave everyone behind the same neighbour.
    """
    odd = count % 2
    start = number // 2 if odd else number
    zigzag = [(start + (i + 1) // 2 * (1 if i % 2 else -1)) % count for i in range(count)]
    return zigzag[::-1] if odd and number % 2 else zigzag


def take_turns(
    entries: Sequence[Entry],
    clock: Clock,
    *,
    rounds: int,
    least: int,
    seconds: float,
    progress: Callable[[Iterable[int]], Iterable[int]],
) -> None:
    """Sample every entry once a round, in an order that changes (see `order_of`).

    For `rounds` rounds or until `seconds` have passed, but `least` rounds at least; on a machine so busy or
    slow that those take four times `seconds`, a single round has to do.
    """
    start = time.perf_counter()
    collecting = gc.isenabled()
    gc.disable()  # a collection inside a sample is nobody's time
    try:
        for done in progress(range(rounds)):
            taken = time.perf_counter() - start
            if taken > seconds and (done >= least or (done > 0 and taken > 4 * seconds)):
                break
            for entry in (entries[i] for i in order_of(len(entries), done)):
                entry.samples.append(clock.time(entry.call, entry.repeats) / (entry.repeats * entry.calls))
    finally:
        if collecting:
            gc.enable()


def rotating(call: Callable[[object], object], sets: Sequence[object]) -> Call:
    """`call` on one input set after the other: sets that together exceed the cache are read from memory."""
    turn = itertools.cycle(sets)
    return lambda: call(next(turn))


def captured(calls: Sequence[Call]) -> Entry:
    """The calls as one CUDA graph; an exception of the capture passes through."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in (*calls, *calls):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()

    def replay(held: Sequence[Call] = tuple(calls)) -> None:
        """`held`: the graph reads what the calls own."""
        graph.replay()

    return Entry("", replay, calls=len(calls))


def peak_bytes(call: Call, device: torch.device) -> int | None:
    """Most bytes that a call holds beyond what was held before it, which is its inputs.

    On a GPU by the allocator's own count. On Linux by the process's resident memory, which counts in pages
    and leaves out what the C library kept from before; None where neither exists.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    status = Path("/proc/self/status")
    if not sys.platform.startswith("linux") or not status.exists():
        return None
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    except (OSError, AttributeError):
        return None

    def kilobytes(key: str) -> int:
        line = next(line for line in status.read_text().splitlines() if line.startswith(key))
        return int(line.split()[1])

    before = kilobytes("VmRSS:")
    call()
    return max(0, kilobytes("VmHWM:") - before) * 1024
