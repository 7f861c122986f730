"""Where a long run stands, on stderr: tqdm's bar, or plain lines where it is not installed."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

Step = TypeVar("Step")
SECONDS = 2.0  # between lines about numbered steps


def follow(title: str, steps: Sequence[Step], seconds: float = SECONDS) -> Iterable[Step]:
    """The same steps, telling how far they are; the loop over them may stop early."""
    try:
        from tqdm import tqdm
    except ImportError:
        return _lines(title, steps, seconds)
    return tqdm(steps, desc=title, leave=False, disable=None)


def _lines(title: str, steps: Sequence[Step], seconds: float) -> Iterator[Step]:
    """A line for each step that has a name, since it may take long; for numbered ones not too many lines."""
    said = -float("inf")
    for number, step in enumerate(steps, 1):
        named = isinstance(step, str)
        if named or time.monotonic() - said >= seconds:
            said = time.monotonic()
            what = f"{step}, " if named else ""
            print(f"  {title}: {what}{number} of {len(steps)}", file=sys.stderr, flush=True)
        yield step
