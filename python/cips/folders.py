"""A folder of PNGs, encoded by worker processes while a device draws the next images.

    with PngFolder("out") as folder:
        for pixels in on_host(quantised(sampler(z)) for z in latents):
            folder.write(pixels)

An H100 draws 1,400 images of 256x256 a second and one processor encodes some two hundred of them, so that the files and not
the images would set the pace.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures import wait as wait_for
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from torch import Tensor

from .errors import UsageError
from .pictures import save_png

_TASK_BYTES = 1 << 20  # pixels of a task: enough images that passing them on costs little beside encoding them
_TASKS_A_WORKER = 4  # waiting or under way: no worker waits for work, and memory does not grow with the count
_ARRIVING = 0.2  # seconds of a worker's first task: more than it takes to ask for all the others
_FEW_PIXELS = 1 << 24  # encoded before processes would have started

_writing = threading.Lock()  # in a worker: held while a file is being written


def processors() -> int:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def default_workers(pixels: int) -> int:
    """Worker processes for so many pixels in all: a processor each but one, which draws; none for a few pictures."""
    return 0 if pixels < _FEW_PIXELS else processors() - 1


class PngFolder:
    """Writes images as `000000.png`, `000001.png`, ... in the order in which they come.

    Every file appears whole or not at all, also where this process is killed. Files that are there already are
    replaced.

    Args:
        path: of the folder, made with the first file.
        workers: processes that encode, started anew (not forked from this one, which may have a GPU in use) and with a
            bounded number of images waiting for them; 0: encode here.
        level: of compression, 0 to 9, as in `save_png`; the default is the fastest that compresses.

    A script that uses workers needs `if __name__ == "__main__":`, as for every pool of processes that does not fork.

    Raises:
        ValueError: naming the argument.
    """

    def __init__(self, path: str | os.PathLike[str], *, workers: int = 0, level: int = 1) -> None:
        for name, value, high in (("workers", workers, None), ("level", level, 9)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 0 or (high and value > high):
                limits = f"from 0 to {high}" if high else "of at least 0"
                raise ValueError(f"{name}: expected an integer {limits}, got {value!r}")
        self.path = Path(path)
        self.count = 0  # images taken
        self._workers, self._level = workers, level
        self._tasks: deque[tuple[str, Future[None]]] = deque()
        self._pool: ProcessPoolExecutor | None = None
        self._first: list[Future[None]] = []
        if workers:
            # a server that has imported the package forks the workers: it is paid once, and knows of no GPU
            server = "forkserver" in multiprocessing.get_all_start_methods()
            context = multiprocessing.get_context("forkserver" if server else "spawn")
            if server:
                context.set_forkserver_preload(["__main__", __name__])
            self._pool = ProcessPoolExecutor(workers, context, initializer=_initialise)
            # imports take seconds; meanwhile the caller loads its generator
            self._start = threading.Thread(target=self._first_tasks, daemon=True)
            self._start.start()

    def _first_tasks(self) -> None:
        """Starts every process, in a thread where no Ctrl-C interrupts it: one that the pool has started but does not know yet
        would never be told to end, and the program would wait for it at its own end."""
        assert self._pool is not None
        if hasattr(signal, "pthread_sigmask"):
            # of this thread; the server and its workers inherit it. A worker that is still starting when Ctrl-C comes would
            # print a traceback. The tracker, which is started first, would take the mask off again.
            resource_tracker.ensure_running()
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            for _ in range(self._workers):  # the pool starts a process for a task that finds none idle
                self._first.append(self._pool.submit(time.sleep, _ARRIVING))
        except (BrokenProcessPool, RuntimeError, OSError):
            pass  # the first images meet the same

    def wait_for_workers(self) -> None:
        """Waits until the processes are there; without it, the first images wait."""
        if self._pool is not None:
            self._start.join()
            wait_for(self._first)

    def write(self, pixels: np.ndarray | Tensor) -> None:
        """Takes uint8 `[B, H, W, 3]` on the CPU, which may be overwritten afterwards; waits where too many wait already.

        Raises:
            UsageError: a file cannot be written, of these images or of earlier ones; naming it.
        """
        pixels = np.asarray(pixels)
        names = [str(self.path / f"{k:06d}.png") for k in range(self.count, self.count + len(pixels))]
        self.count += len(pixels)
        if self._pool is None:
            _encode(names, pixels, self._level)
            return
        self._start.join()
        step = max(1, _TASK_BYTES // max(1, pixels[:1].nbytes))
        for first in range(0, len(names), step):
            while len(self._tasks) >= _TASKS_A_WORKER * self._workers:
                self._finish_one()
            part = names[first : first + step]
            label = part[0] if len(part) == 1 else f"{part[0]} to {Path(part[-1]).name}"
            # a copy: the pool reads it later, from a thread of its own
            images = np.array(pixels[first : first + step], order="C")
            try:
                task = self._pool.submit(_encode, part, images, self._level)
            except (BrokenProcessPool, OSError) as error:
                raise UsageError(f"{label}: cannot be written: {_stopped(error)}") from error
            self._tasks.append((label, task))

    def _finish_one(self) -> None:
        label, task = self._tasks.popleft()
        try:
            task.result()
        except UsageError:
            raise
        except (BrokenProcessPool, OSError, MemoryError) as error:
            raise UsageError(f"{label}: cannot be written: {_stopped(error)}") from error

    def close(self) -> None:
        """Waits until every file is there.

        Raises:
            UsageError: as `write`.
        """
        try:
            while self._tasks:
                self._finish_one()
        finally:
            self._stop()

    def _stop(self) -> None:
        self._tasks.clear()
        if self._pool is not None:
            self._start.join()
            self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> PngFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._stop()  # what is being written is finished, what waits is dropped


def on_host(batches: Iterable[Tensor]) -> Iterator[np.ndarray]:
    """Each tensor of `batches` on the CPU, as an array that holds until the next is asked for.

    From a GPU they are copied into pinned memory while the next one is computed: one batch is always under way, and the
    host waits for the one before it. All have one shape and dtype, but for the last, which may be shorter.
    """
    slots: list[tuple[Tensor, torch.cuda.Event]] = []
    before: tuple[Tensor, torch.cuda.Event] | None = None
    for number, batch in enumerate(batches):
        if not batch.is_cuda:
            yield batch.contiguous().numpy()
            continue
        if len(slots) < 2:
            slots.append((torch.empty(batch.shape, dtype=batch.dtype, pin_memory=True), torch.cuda.Event()))
        memory, copied = slots[number % 2]
        current = memory[: len(batch)], copied
        current[0].copy_(batch.contiguous(), non_blocking=True)
        copied.record(torch.cuda.current_stream(batch.device))
        if before is not None:
            before[1].synchronize()
            yield before[0].numpy()
        before = current
    if before is not None:
        before[1].synchronize()
        yield before[0].numpy()


def _encode(names: list[str], pixels: np.ndarray, level: int) -> None:
    for name, image in zip(names, pixels):
        with _writing:
            save_png(name, image, level=level, synced=False)


def _stopped(error: BaseException) -> str:
    if isinstance(error, BrokenProcessPool):
        return "a process that encodes has ended; is there memory for so many --workers?"
    return str(error) or type(error).__name__


def _initialise() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the parent decides
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    """Leave when the parent is gone, killed perhaps, but not in the middle of a file."""
    wait([sentinel])
    _writing.acquire()
    os._exit(1)
