"""What must be in the environment before PyTorch is imported; this page must not import it."""

from __future__ import annotations

import os
import time
from pathlib import Path

busy = False
_BUSY = 0.15  # of all cores' time, spent by others


def busy_share(seconds: float = 0.4, stat: Path = Path("/proc/stat")) -> float:
    """Share of the cores' time that is in use while this process sleeps; 0 where the system does not tell."""

    def times() -> tuple[int, int]:
        values = [int(value) for value in stat.read_text().split("\n", 1)[0].split()[1:9]]
        return sum(values), values[3] + values[4]  # all; idle and waiting for a disk

    try:
        total, idle = times()
        time.sleep(seconds)
        more, still = times()
    except (OSError, ValueError, IndexError):
        return 0.0
    return 1.0 - (still - idle) / (more - total) if more > total else 0.0


def prepare() -> None:
    """Set what is not set already, and note in `busy` whether others keep the processor busy."""
    global busy
    # Providers of different sizes take turns: without this, one's cached blocks are in the next one's way.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    busy = busy_share() > _BUSY
    if busy:
        # OpenMP's threads wait for each other by spinning. Where another process has one of their cores, each
        # of a stack's hundreds of parallel regions spins for a time slice: measured on two cores with one of
        # them taken, 4 to 20 times slower instead of 2. To spin less costs a quarter where nobody is in the way.
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
