"""Images decoded once, kept as a memory map, found again at the next start.

Two files a set and preparation: `NAME.json` says what is kept and of which files; `NAME-FINGERPRINT.u8` holds the
pixels, image after image, uint8 `[height, width, 3]` each. NAME contains a digest of the set's path and of the
preparation; the fingerprint is one of the names, sizes and times of the files. The start lists the files anew and
compares: where one has come, gone or changed, everything is read again. (A file replaced by one of the same size and
time goes unnoticed: remove the cache, or `touch` it.) Both files are renamed into place, the description last, and a
lock lets one process read while others wait.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoint import atomic_file
from ..errors import UsageError
from ..grids import as_size
from .container import Container
from .prepare import Preparation, TooSmallError
from .recognise import data_name

OFF = "off"
VARIABLE = "CIPS_CACHE"
VERSION = 1  # raise it where decoding or scaling changes

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Decoded:
    """The images of a set as kept.

    Attributes:
        names: of the images, in the set's order.
        shapes: height and width of each, int64 `[N, 2]`.
        pixels: of all, in order, uint8 `[sum of height * width, 3]`; a private map of a file, or memory.
        skipped: (name, reason) of those that could not be used.
    """

    names: list[str]
    shapes: np.ndarray
    pixels: np.ndarray
    skipped: list[tuple[str, str]]


def cache_folder(name: str | None = None) -> Path:
    """Where caches lie: `name`, else `$CIPS_CACHE`, else `cips` in the user's cache folder."""
    if name is None:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        name = os.environ.get(VARIABLE) or str(Path(base) / "cips")
    return Path(name).expanduser()


def default_workers() -> int:
    """Threads that decode: one a processor that this process may use, at most 16."""
    affinity = getattr(os, "sched_getaffinity", None)
    return min(16, len(affinity(0)) if affinity else os.cpu_count() or 1)


def decoded_images(
    container: Container,
    preparation: Preparation,
    *,
    cache: str | None = None,
    workers: int | None = None,
    say: Say = lambda text: None,
) -> Decoded:
    """All images of a container, prepared: from the cache where it holds them, else decoded and kept there.

    Args:
        container: open; it is only listed where the cache serves.
        preparation: what is kept of an image.
        cache: its folder, see `cache_folder`; "off": decode into memory and keep nothing.
        workers: threads that decode; None: `default_workers`. The result does not depend on it.
        say: gets one line of text about what is done.

    Raises:
        UsageError: no image can be used; one is too small and is not to be; the cache cannot be written.
    """
    if workers is not None and workers < 1:
        raise UsageError(f"workers: expected an integer of at least 1, got {workers}")
    workers = workers or default_workers()
    if cache == OFF:
        memory = bytearray()
        names, shapes, skipped = _decode(container, preparation, workers, memory.extend)
        return Decoded(names, shapes, np.frombuffer(memory, np.uint8).reshape(-1, 3), skipped)
    files = _Files(cache_folder(cache), container, preparation)
    with files.locked(say):
        found, reason = files.read()
        if found is not None:
            say(f"images from the cache {files.index}")
            return found
        say(f"{reason}: reading {len(container)} files with {workers} threads into the cache {files.index}")
        files.write(*files.build(workers))
        found, reason = files.read()
    if found is None:
        raise UsageError(f"cache: {files.index} cannot be read back: {reason}")
    return found


class _Files:
    """The cache's files of one set and preparation."""

    def __init__(self, folder: Path, container: Container, preparation: Preparation) -> None:
        self.container, self.preparation, self.folder = container, preparation, folder
        self.source = os.path.abspath(container.path)
        self.options = dataclasses.asdict(preparation)
        key = hashlib.sha256(repr((self.source, container.kind, sorted(self.options.items()))).encode())
        size = "x".join(map(str, dict.fromkeys(as_size(preparation.size))))
        self.name = f"{data_name(str(container.path))}-{size}-{key.hexdigest()[:12]}"
        self.fingerprint = container.fingerprint()
        self.index = folder / f"{self.name}.json"
        self.data = folder / f"{self.name}-{self.fingerprint[:12]}.u8"

    @contextlib.contextmanager
    def locked(self, say: Say) -> Iterator[None]:
        """One process at a time; without a lock where the folder or the system allows none."""
        try:
            import fcntl

            self.folder.mkdir(parents=True, exist_ok=True)
            file = open(self.folder / f"{self.name}.lock", "wb")
        except (ImportError, OSError):
            # a cache that can only be read still serves; writing it will say why it cannot
            yield
            return
        with file:
            with contextlib.suppress(OSError):  # some network file systems have no locks
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    say("another process is reading these images: waiting for it")
                    fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def read(self) -> tuple[Decoded | None, str]:
        """What the cache holds, or None and why it does not serve."""
        try:
            index = json.loads(self.index.read_bytes())
        except FileNotFoundError:
            return None, "not cached yet"
        except (OSError, ValueError) as error:
            return None, f"the cache is damaged ({error})"
        try:
            if index["version"] != VERSION:
                return None, "the cache is of another version"
            if index["fingerprint"] != self.fingerprint:
                return None, "the files have changed since they were cached"
            shapes = np.array(index["shapes"], np.int64).reshape(-1, 2)
            pixels = np.memmap(self.data, np.uint8, mode="c").reshape(-1, 3)
            if len(pixels) != shapes.prod(1).sum() or len(index["names"]) != len(shapes):
                return None, "the cache is damaged (its files do not fit each other)"
            skipped = [(name, why) for name, why in index["skipped"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            return None, f"the cache is damaged ({error})"
        return Decoded(index["names"], shapes, pixels, skipped), ""

    def build(self, workers: int) -> tuple[list[str], np.ndarray, list[tuple[str, str]]]:
        """Decodes everything into the data file."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(
                f"cache: {self.folder} cannot be made ({error.strerror}); expected a folder to write to, or 'off'"
            ) from error
        for path in self.folder.glob(f".{self.name}*.tmp"):  # of killed processes: the lock is ours
            path.unlink(missing_ok=True)
        with atomic_file(self.data) as file:
            return _decode(self.container, self.preparation, workers, file.write)

    def write(self, names: list[str], shapes: np.ndarray, skipped: list[tuple[str, str]]) -> None:
        """The description; from here on the cache holds. What an older one described is removed."""
        index = {
            "version": VERSION,
            "source": self.source,
            "kind": self.container.kind,
            "preparation": self.options,
            "fingerprint": self.fingerprint,
            "names": names,
            "shapes": shapes.tolist(),
            "skipped": skipped,
        }
        with atomic_file(self.index) as file:
            file.write(json.dumps(index).encode())
        for path in self.folder.glob(f"{self.name}-*.u8"):
            if path != self.data:
                path.unlink(missing_ok=True)


def _decode(
    container: Container, preparation: Preparation, workers: int, write: Callable[[Any], Any]
) -> tuple[list[str], np.ndarray, list[tuple[str, str]]]:
    """Prepares every image, in order, and hands its bytes to `write`; names, shapes, and what was skipped."""
    from tqdm import tqdm

    names: list[str] = []
    shapes: list[tuple[int, int]] = []
    skipped = list(container.damage)
    with tqdm(total=len(container), desc="reading images", delay=2, leave=False) as bar:
        for name, result in in_order(container, lambda k: preparation(container.read(k)), workers):
            bar.update()
            if isinstance(result, TooSmallError) and preparation.too_small == "refuse":
                raise refusal(container, name, result) from result
            if isinstance(result, Exception):
                skipped.append((name, reason_of(result)))
                continue
            write(result.tobytes())
            names.append(name)
            shapes.append(result.shape[:2])
    if not names:
        name, why = skipped[0]
        raise UsageError(
            f"data: none of the {len(container)} images in {container.path} can be used; {name}: {why}"
        )
    return names, np.array(shapes, np.int64).reshape(-1, 2), skipped


def refusal(container: Container, name: str, error: TooSmallError) -> UsageError:
    """What is raised of an image that is too small, where those are refused."""
    hint = "(too_small: 'skip' leaves such images out, 'enlarge' scales them)"
    return UsageError(f"{container.path}/{name}: {error} {hint}")


def reason_of(error: Exception) -> str:
    """One line for a list of skipped files."""
    if isinstance(error, TooSmallError):
        return str(error)
    text = str(error.strerror or error) if isinstance(error, OSError) else str(error)
    return f"cannot be read as an image ({' '.join(text.split()) or type(error).__name__})"


def in_order(container: Container, function: Callable[[int], Any], workers: int) -> Iterator[tuple[str, Any]]:
    """(name, function(number) or the exception that it raised) of every image, in order, computed in threads.

    Threads suffice: PIL decodes and scales with the interpreter lock released. A few results an idle thread are
    computed ahead, so memory holds a few images and not the set.
    """
    ahead: deque[tuple[str, Future[Any]]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for number, name in enumerate(container.names):
                ahead.append((name, pool.submit(function, number)))
                if len(ahead) >= 4 * workers:
                    yield _result(*ahead.popleft())
            while ahead:
                yield _result(*ahead.popleft())
        finally:
            pool.shutdown(cancel_futures=True)


def _result(name: str, future: Future[Any]) -> tuple[str, Any]:
    try:
        return name, future.result()
    except Exception as error:
        return name, error
