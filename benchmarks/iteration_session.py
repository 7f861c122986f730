"""A run of iteration_bench.py: its device, its clock, its time, and what came out."""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

import progress
from cips_kernels import use_backend
from measure import Clock, Entry, peak_bytes, take_turns

SHARES = {"iteration": 0.45, "discriminator": 0.2, "r1": 0.1, "block": 0.1, "filter": 0.05}  # of the budget


@dataclass
class Session:
    """One run: what is measured on, and what came out."""

    options: argparse.Namespace
    device: torch.device
    began: float = field(default_factory=time.perf_counter)
    rows: list[dict] = field(default_factory=list)
    left_out: list[dict] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.clock = Clock(self.device)
        self.dtype = torch.bfloat16 if self.options.dtype == "bfloat16" else torch.float32

    def left(self) -> float:
        """Seconds of the budget."""
        return self.options.budget - (time.perf_counter() - self.began)

    def leave_out(self, case: str, provider: str, reason: str) -> None:
        self.left_out.append({"case": case, "provider": provider, "reason": reason})
        say(f"  {case}: {provider} left out: {reason}")

    def measure(self, case: str, entries: Sequence[Entry], errors: dict[str, float], peaks: bool = True) -> None:
        """Warm up, take turns, and keep a row an entry."""
        ready = []
        for entry in entries:
            try:
                self.clock.prepare(entry)
                peak = peak_bytes(entry.call, self.device) if peaks and self.clock.cuda else None
                ready.append((entry, peak))
            except torch.OutOfMemoryError:
                self.leave_out(case, entry.name, "out of memory")
                release(self.device)
        if not ready:
            return
        seconds = min(SHARES[case] * self.options.budget, max(1.0, self.left() - 5.0))
        take_turns(
            [entry for entry, _ in ready], self.clock, rounds=self.options.rounds, least=3, seconds=seconds,
            progress=lambda steps: progress.follow(case, steps),
        )  # fmt: skip
        for entry, peak in ready:
            name, _, part = entry.name.partition("/")
            self.rows.append(
                {
                    "case": part or case,
                    "provider": name,
                    "batch": self.options.batch,
                    "size": self.options.size,
                    "ms": entry.median,
                    "ms_p20": entry.percentile(0.2),
                    "ms_p80": entry.percentile(0.8),
                    "samples": len(entry.samples),
                    "calls_per_sample": entry.repeats * entry.calls,
                    "peak_mb": None if peak is None else peak / 2**20,
                    "error": errors.get(name.removesuffix("+graph")),
                }
            )
            say(f"  {part or case:14s} {name:22s} {entry.median:9.3f} ms")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def release(device: torch.device) -> None:
    """Give cached memory back."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def reference(call: Callable[[], object]) -> Callable[[], object]:
    """`call` with PyTorch's own operators in place of our kernels."""

    def run() -> object:
        with use_backend("reference"):
            return call()

    return run
