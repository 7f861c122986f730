"""Files: a generator as safetensors with its config inside, and a training run's whole state.

Every file is written under a temporary name, flushed to the disk and renamed: at any moment the name holds
either the old file or the new one, whole. Reading executes nothing (`weights_only`), and errors name the file
and the key.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from .architectures import config_from_dict, make_generator
from .errors import UsageError
from .generator import Generator
from .states import check_state, read_torch_file
from .stylegan2 import StyleGAN2

GENERATOR_FORMAT = "cips.generator"
TRAINING_FORMAT = "cips.training"
VERSION = 1
TRAINING_VERSION = 2  # 2: random states of every process, losses not logged yet
_STATE_NAME = re.compile(r"step-(\d+)\.pt")


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str], *, synced: bool = True) -> Iterator[BinaryIO]:
    """A file to write whose content appears at `path`, whole, when the block ends without an exception.

    Args:
        path: its folder is made where it does not exist.
        synced: wait until the disk has it, so that a power cut loses nothing; not worth its time for thousands of
            small files that can be made again. A process that is killed leaves whole files either way.

    Raises:
        UsageError: the folder cannot be written, or the disk is full. Nothing is left at `path` then but what
        was there.
    """
    path = Path(path)
    temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = open(temporary, "wb")
    except OSError as error:
        raise UsageError(f"{path}: cannot be written: {error.strerror or error}") from error
    try:
        with handle:
            yield handle
            if synced:
                handle.flush()
                os.fsync(handle.fileno())
        os.replace(temporary, path)
        if synced:
            _sync_folder(path.parent)
    except OSError as error:
        raise UsageError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def _sync_folder(folder: Path) -> None:
    # makes the rename itself survive a power cut, where the system can open folders
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove_leftovers(folder: str | os.PathLike[str]) -> None:
    """Removes the temporary files that killed processes left in a folder."""
    for path in Path(folder).glob(".*.tmp"):
        with contextlib.suppress(OSError):
            path.unlink()


def load_state(source: str, module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """`module.load_state_dict(state)` with errors that name `source` and the key."""
    check_state(source, state, module.state_dict())
    module.load_state_dict(state)


def save_generator(path: str | os.PathLike[str], generator: Generator | StyleGAN2, **notes: Any) -> None:
    """Writes a generator as safetensors; config and `notes` (JSON values) stand in the file's metadata."""
    from safetensors.torch import save

    tensors = {key: value.detach().cpu().contiguous() for key, value in generator.state_dict().items()}
    metadata = {
        "format": GENERATOR_FORMAT,
        "version": str(VERSION),
        "config": json.dumps(generator.config.to_dict()),
        "notes": json.dumps(notes),
    }
    with atomic_file(path) as file:
        file.write(save(tensors, metadata))


def load_generator(
    path: str | os.PathLike[str],
    device: torch.device | str = "cpu",
    *,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Generator | StyleGAN2:
    """Reads what `save_generator` wrote, in eval mode on `device`. `dtype` and `backend` as in `Generator`.

    Args:
        path: the file, or a training run's folder (then its `generator.safetensors`).

    Raises:
        UsageError: no such file, not a whole safetensors file, another kind of file, a key missing, extra or
        misshapen.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    path = path / "generator.safetensors" if path.is_dir() else path
    if not path.is_file():
        raise UsageError(f"{path}: no such file")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{path}: not a whole safetensors file ({error})") from error
    if metadata.get("format") != GENERATOR_FORMAT:
        raise UsageError(
            f"{path}: not a generator of this package: metadata 'format' is {metadata.get('format')!r}"
        )
    if metadata.get("version") != str(VERSION):
        raise UsageError(f"{path}: format version {metadata.get('version')}; this package reads {VERSION}")
    try:
        config = config_from_dict(json.loads(metadata["config"]))
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{path}: metadata 'config': {error}") from error
    generator = make_generator(config, dtype=dtype, backend=backend)
    load_state(str(path), generator, state)
    return generator.to(device).eval()


def save_training(
    folder: str | os.PathLike[str], step: int, state: Mapping[str, Any], keep: int = 2, keep_every: int = 0
) -> Path:
    """Writes a run's state after `step` steps as `folder/step-NNNNNNNN.pt`, then removes all but the newest
    `keep` and those of multiples of `keep_every` steps (0: none).
    """
    path = Path(folder) / f"step-{step:08d}.pt"
    with atomic_file(path) as file:
        try:
            torch.save({"format": TRAINING_FORMAT, "version": TRAINING_VERSION, "step": step, **state}, file)
        except RuntimeError as error:
            # the archive's writer notices that bytes are missing, and hides the reason: a full disk
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
    for old in training_files(folder)[max(keep, 1) :]:
        if keep_every and step_of(old) % keep_every == 0:
            continue
        with contextlib.suppress(OSError):
            old.unlink()
    return path


def step_of(path: Path) -> int:
    """The steps that a file of `training_files` says it was written after."""
    match = _STATE_NAME.fullmatch(path.name)
    assert match is not None, path
    return int(match[1])


def training_files(folder: str | os.PathLike[str]) -> list[Path]:
    """The states in a folder, newest (most steps) first."""
    found = [
        (int(match[1]), path)
        for path in Path(folder).glob("step-*.pt")
        if (match := _STATE_NAME.fullmatch(path.name))
    ]
    return [path for _, path in sorted(found, reverse=True)]


def load_training(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads what `save_training` wrote, on the CPU, executing nothing.

    Raises:
        UsageError: no such file, a file that is not whole, another kind of file.
    """
    return check_training(path, read_torch_file(path, "training state"))


def check_training(path: str | os.PathLike[str], state: Any) -> dict[str, Any]:
    """What a file held, if it is what `save_training` writes.

    Raises:
        UsageError: another kind of file, another version.
    """
    if not isinstance(state, dict) or state.get("format") != TRAINING_FORMAT:
        raise UsageError(f"{path}: not a training state of this package: no 'format' {TRAINING_FORMAT!r}")
    if state.get("version") != TRAINING_VERSION:
        version = f"format version {state.get('version')}; this package reads {TRAINING_VERSION}"
        raise UsageError(f"{path}: {version}")
    return state
