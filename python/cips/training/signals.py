"""Being told to stop: SIGINT and SIGTERM are heeded after the step under way."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import threading
import time
from collections.abc import Iterator

_TWICE = 1.0  # seconds within which a second signal is the first one's double


@dataclasses.dataclass
class StopRequest:
    """Which signal has come, if any."""

    signal: signal.Signals | None = None
    at: float = 0.0  # seconds of time.monotonic


@contextlib.contextmanager
def stop_request(insistent: bool = True) -> Iterator[StopRequest]:
    """Notes SIGINT and SIGTERM while the block runs, so that a step is finished and saved.

    Args:
        insistent: a second signal interrupts, unless it comes with the first: `timeout` and job managers signal a process
            and then its group, which is twice. Under torchrun, which passes on what the terminal may have sent as
            well, it must not; torchrun kills after 30 seconds anyway.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request  # only the main thread may set handlers
        return

    def note(number: int, frame: object) -> None:
        if request.signal is None:
            request.signal, request.at = signal.Signals(number), time.monotonic()
        elif insistent and time.monotonic() - request.at > _TWICE:
            raise KeyboardInterrupt

    old = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
