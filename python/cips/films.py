"""From pictures to films: GIF, MP4, or a folder of PNGs."""

from __future__ import annotations

import itertools
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
from torch import Tensor

from .checkpoint import atomic_file
from .errors import UsageError
from .pictures import save_png


def check_film(path: str | Path) -> None:
    """Raise UsageError unless `save_film` can write the kind of file that the name says."""
    suffix = Path(path).suffix.lower()
    if suffix not in ("", ".gif", ".mp4"):
        raise UsageError(f"out: expected NAME.gif, NAME.mp4 or a folder, got {path}")
    if suffix == ".mp4":
        _ffmpeg()


def save_film(path: str | Path, frames: Iterable[Tensor], fps: float = 20.0) -> int:
    """Writes a film that repeats for ever (GIF), plays once (MP4) or is a folder of `000000.png`, `000001.png`, ...

    Args:
        path: NAME.gif, NAME.mp4 or, without a suffix, a folder.
        frames: uint8 `[H, W, 3]` each, all of one size; taken one by one.
        fps: frames a second; GIF counts in hundredths of a second.

    Returns:
        The number of frames.

    Raises:
        UsageError: another suffix, MP4 without imageio-ffmpeg, or the file cannot be written. A GIF or MP4 appears
        whole or not at all.
    """
    check_film(path)
    suffix = Path(path).suffix.lower()
    counted = _Counted(frames)
    if suffix == ".gif":
        _save_gif(path, iter(counted), fps)
    elif suffix == ".mp4":
        _save_mp4(path, iter(counted), fps)
    else:
        for k, frame in enumerate(counted):
            save_png(Path(path) / f"{k:06d}.png", frame)
    return counted.number


class _Counted:
    def __init__(self, frames: Iterable[Tensor]) -> None:
        self.frames, self.number = frames, 0

    def __iter__(self) -> Iterator[Tensor]:
        for frame in self.frames:
            self.number += 1
            yield frame


def _save_gif(path: str | Path, frames: Iterator[Tensor], fps: float) -> None:
    from PIL import Image

    # a palette for each frame, without dithering: grain that moves would multiply the size
    pictures = (Image.fromarray(frame.numpy()).quantize(dither=Image.Dither.NONE) for frame in frames)
    with atomic_file(path) as file:
        next(pictures).save(
            file, "GIF", save_all=True, append_images=pictures, duration=max(1, round(100 / fps)) * 10, loop=0
        )


def _save_mp4(path: str | Path, frames: Iterator[Tensor], fps: float) -> None:
    ffmpeg = _ffmpeg()
    first = next(frames)
    height, width = first.shape[:2]
    even = ((0, height % 2), (0, width % 2), (0, 0))  # the codec takes even sides: an odd one is repeated
    # ffmpeg writes to a seekable file of its own; the finished one is copied
    with atomic_file(path) as file, tempfile.TemporaryDirectory() as folder:
        name = Path(folder) / "film.mp4"
        size = (width + width % 2, height + height % 2)
        writer = ffmpeg.write_frames(str(name), size, fps=fps, macro_block_size=2, ffmpeg_log_level="error")
        writer.send(None)
        for frame in itertools.chain((first,), frames):
            writer.send(np.pad(frame.numpy(), even, mode="edge").tobytes())
        writer.close()
        with open(name, "rb") as finished:
            shutil.copyfileobj(finished, file)


def _ffmpeg() -> ModuleType:
    try:
        import imageio_ffmpeg
    except ImportError as error:
        raise UsageError(
            "out: an MP4 needs imageio-ffmpeg; install the extra: pip install -e '.[apps]', or choose NAME.gif"
        ) from error
    return imageio_ffmpeg
