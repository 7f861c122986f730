"""The line that shows how a run is getting on: steps, time left, images/s, losses, R1, memory."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch

# title in the line, by the name in metrics.jsonl
SHOWN = {"images_per_second": "img/s", "d_loss": "D", "g_loss": "G", "r1": "R1", "memory_gib": "GiB"}


class ProgressBar:
    """A bar over the steps of a run, with the time spent, the time left and the last logged values.

    Args:
        total: steps in all.
        start: steps done before.
        show: whether to show it.
    """

    def __init__(self, total: int, start: int, show: bool) -> None:
        from tqdm import tqdm

        # on a terminal redraw often, in a log file seldom
        every = 0.2 if sys.stderr.isatty() else 15.0
        self._bar: Any = tqdm(
            total=total, initial=start, unit="step", mininterval=every, disable=not show, dynamic_ncols=True
        )
        self._values: dict[str, float] = {}

    def step(self) -> None:
        """One more is done."""
        self._bar.update()

    def values(self, values: Mapping[str, float]) -> None:
        """Takes in what was logged. R1 is not penalised at every step: its last value stays."""
        self._values |= values
        self._bar.set_postfix_str(describe(self._values), refresh=False)

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()


def describe(values: Mapping[str, float]) -> str:
    """`img/s 812, D 1.21, G 0.87, R1 0.03, GiB 3.1`, as far as there are values."""
    return ", ".join(f"{title} {values[name]:.4g}" for name, title in SHOWN.items() if name in values)


def peak_memory(device: torch.device) -> float:
    """Most memory in use so far, GiB: on a GPU what tensors took there, otherwise the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        import resource
    except ImportError:  # not on Windows
        return float("nan")
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
