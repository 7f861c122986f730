"""Being told to stop: SIGINT and SIGTERM are heeded after the step under way."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import threading
import time
from collections.abc import Callable, Iterator

_TWICE = 1.0  # seconds within which a second signal is the first one's double


@dataclasses.dataclass
class StopRequest:
    """Which signal has come, if any."""

    signal: signal.Signals | None = None
    at: float = 0.0  # seconds of time.monotonic
    arm: Callable[[], None] = lambda: None  # sets the handlers again


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

    def arm() -> None:
        # Compiling with Triton puts LLVM's handlers in front of these, and LLVM's are reset to the default as they
        # run: a second signal right behind the first would kill the process.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, note)

    old = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    request.arm = arm
    arm()
    try:
        yield request
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
