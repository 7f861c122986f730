"""Options that the commands share, read and checked before anything is computed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import grids
from ..apps import draw
from ..averaged import is_training_state, load_averaged
from ..checkpoint import load_generator
from ..errors import UsageError
from ..generator import Generator
from ..pictures import save_png, to_uint8
from ..stylegan2 import StyleGAN2
from ..training.config import DTYPES

Command = Callable[[str, str], Any]
OFFICIAL_SUFFIXES = (".pt", ".pth")


def add_common(
    parser: Any, out: str, out_help: str, size: str | None = "as trained", *, magnify: bool = True
) -> None:
    """Adds the checkpoint and the options that every command has."""
    from jsonargparse.typing import PositiveInt

    parser.add_argument("checkpoint", type=str, help="a generator.safetensors, the folder of a run, or an official .pt")
    parser.add_argument("--out", type=str, default=out, help=out_help)
    parser.add_argument("--seed", type=int, default=0, help="of the latents and the noise")
    parser.add_argument(
        "--truncation", "--psi", type=float, default=1.0, help="1: none; towards 0: towards the mean image"
    )
    if size is not None:
        parser.add_argument(
            "--size", type=str, default=None, help=f"pixels a side, or HEIGHTxWIDTH; by default {size}"
        )
    parser.add_argument("--noise", type=str, default="seed", help="'seed': noise from --seed; 'off'")
    parser.add_argument(
        "--device", type=str, default="auto", help="'cuda', 'cpu', ...; 'auto' takes a GPU if there is one"
    )
    parser.add_argument("--dtype", type=str, default="float32", help=f"arithmetic: {' or '.join(DTYPES)}")
    if magnify:
        parser.add_argument(
            "--magnify", type=PositiveInt, default=1, help="repeat each pixel so often, both ways, to look at it"
        )


def opened(checkpoint: str, device: str, dtype: str) -> Generator:
    """The generator, in eval mode on its device.

    Raises:
        UsageError: no such file or device, an unknown dtype, a generator whose pixels are not independent.
    """
    generator = opened_any(checkpoint, device, dtype)
    if not isinstance(generator, Generator):
        raise UsageError(f"{checkpoint}: a StyleGAN2, which draws whole images only: cips sample and cips info take it")
    return generator


def opened_any(checkpoint: str, device: str, dtype: str) -> Generator | StyleGAN2:
    """As `opened`, of any kind."""
    if dtype not in DTYPES:
        raise UsageError(f"dtype: expected {' or '.join(DTYPES)}, got {dtype!r}")
    return open_generator(checkpoint, find_device(device), DTYPES[dtype])


def open_generator(path: str, device: str = "cpu", dtype: torch.dtype | None = None) -> Generator | StyleGAN2:
    """A generator of this package or of the official code, told by the name's ending, in eval mode; of a state that a run
    keeps, `checkpoints/step-*.pt`, the averaged one.
    """
    if Path(path).suffix.lower() not in OFFICIAL_SUFFIXES:
        return load_generator(path, device, dtype=dtype)
    if not is_official(path):
        return load_averaged(path, device, dtype=dtype)
    return Generator.from_official(path, dtype=dtype).to(device).eval()


def is_official(path: str) -> bool:
    """Whether a checkpoint is the official code's: a `.pt` that is not a run's state, `step-*.pt`."""
    if Path(path).suffix.lower() not in OFFICIAL_SUFFIXES:
        return False
    return not (Path(path).name.startswith("step-") and is_training_state(path))


def find_device(name: str) -> str:
    """`name`, or for "auto" a GPU where there is one.

    Raises:
        UsageError: it cannot be used.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device: {name!r} cannot be used ({str(error).splitlines()[0]})") from error
    return name


def parse_noise(noise: str, seed: int) -> draw.Noise:
    """The noise argument of a generator."""
    if noise not in ("seed", "off"):
        raise UsageError(f"noise: expected 'seed' or 'off', got {noise!r}")
    return seed if noise == "seed" else noise


def parse_size(size: str | None) -> tuple[int, int] | None:
    """(height, width) from "256" or "256x512"."""
    if size is None:
        return None
    try:
        return grids.parse_size(size)
    except ValueError as error:
        raise UsageError(str(error)) from error


def parse_point(text: str, name: str) -> tuple[float, float]:
    """(x, y) from "0.5,-0.2"."""
    try:
        x, y = (float(part) for part in text.split(","))
    except ValueError as error:
        raise UsageError(f"{name}: expected X,Y, each from -1 to 1, got {text!r}") from error
    return x, y


def check_out(path: str, *suffixes: str) -> None:
    """Raise UsageError where `path` has another suffix or nothing can be written there: before the work, not after."""
    name = Path(path)
    if suffixes and name.suffix.lower() not in suffixes:
        raise UsageError(f"out: expected {' or '.join(f'NAME{suffix}' for suffix in suffixes)}, got {path}")
    if suffixes and name.is_dir():
        raise UsageError(f"{path}: cannot be written: is a folder")
    folder = name.parent
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UsageError(f"{path}: cannot be written: {folder} is not a folder that takes files")


@contextlib.contextmanager
def usage_errors() -> Iterator[None]:
    """What a library function says of its arguments becomes the line that the command prints."""
    try:
        yield
    except UsageError:
        raise
    except torch.OutOfMemoryError as error:
        raise UsageError("the picture does not fit the device's memory; try a smaller one or --device cpu") from error
    except ValueError as error:
        raise UsageError(str(error)) from error


def picture(image: Tensor) -> Tensor:
    """`[3, H, W]` -> uint8 `[H, W, 3]` on the CPU."""
    return to_uint8(image[None])[0]


def magnified(image: Tensor, times: int) -> Tensor:
    """`[H, W, 3]` with each pixel repeated: `[times H, times W, 3]`."""
    return image.repeat_interleave(times, 0).repeat_interleave(times, 1)


def save_picture(path: str, image: Tensor, what: str, magnify: int) -> int:
    """Writes uint8 `[H, W, 3]`, magnified, and says so; the exit status."""
    save_png(path, magnified(image, magnify))
    print(f"{path}: {what}, {image.shape[0]}x{image.shape[1]}")
    return 0
