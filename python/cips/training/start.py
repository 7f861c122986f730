"""From what was asked for to what a run starts with: options, a checkpoint, shares of the batch."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .. import checkpoint
from ..discriminator import stddev_group
from ..errors import UsageError
from .config import TrainConfig
from .state import TrainingState
from .world import World


def check_division(config: TrainConfig, world: World) -> list[str]:
    """Raises UsageError where the batch does not divide; lines about how it does."""
    assert config.batch is not None
    parts = world.size * config.accumulate
    if config.batch % parts:
        raise UsageError(
            f"batch: expected a multiple of {parts} ({world.size} processes x {config.accumulate} parts each),"
            f" got {config.batch}"
        )
    if parts == 1:
        return []
    lines = [f"{world.size} processes x {config.accumulate} parts of {config.batch // parts} images"]
    whole, group = (stddev_group(n) for n in (config.batch, config.batch // parts))
    if group != whole:
        lines.append(
            f"the discriminator compares images in groups of {group} where one process would of {whole}:"
            f" its gradients differ a little; parts of a multiple of {whole} images avoid it"
        )
    return lines


def find_start(config: TrainConfig) -> tuple[TrainConfig, dict[str, Any] | None, Path | None]:
    """Resolved options, and the checkpoint to go on from, if any.

    Raises:
        UsageError: the checkpoint cannot be read; the folder holds a run, and `resume` is "never".
    """
    if config.resume not in ("never", "auto"):
        path = Path(config.resume)
        if path.is_dir():
            raise UsageError(f"resume: {path} is a folder; --resume auto --out {path} goes on with the run in it")
        if not path.is_file():
            raise UsageError(f"resume: {path}: no such file; expected auto, never or a run's checkpoints/step-*.pt")
        saved = checkpoint.load_training(path)
        if config.out is None and path.resolve().parent.name == "checkpoints":
            config = dataclasses.replace(config, out=str(path.parent.parent))
        config = config.resolve(saved.get("config", {}))
        newest = checkpoint.training_files(checkpoints(config))[:1]
        if newest and newest[0].resolve() != path.resolve():
            raise UsageError(f"out: {config.out} holds {newest[0].name} already; choose another --out")
        return config, saved, path
    fresh = config.resolve()
    files = checkpoint.training_files(checkpoints(fresh))
    if files and config.resume == "never":
        raise UsageError(
            f"out: {fresh.out} holds a run; add --resume auto to go on with it, or choose another --out"
        )
    for path in files:
        try:
            saved = checkpoint.load_training(path)
        except UsageError as error:
            print(f"cips: skipping a damaged checkpoint: {error}", file=sys.stderr)
            continue
        return config.resolve(saved.get("config", {})), saved, path
    if files:
        raise UsageError(f"resume: no whole checkpoint in {checkpoints(fresh)}")
    return fresh, None, None


@contextlib.contextmanager
def sole_use(folder: Path) -> Iterator[None]:
    """Holds a run's folder: processes that outlive a killed torchrun must not write among its successors' files.

    Raises:
        UsageError: another process holds it, or it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"out: {folder} cannot be made: {error.strerror or error}") from error
    handle = None
    try:
        import fcntl

        handle = os.open(folder, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        assert handle is not None
        os.close(handle)
        raise UsageError(f"out: another process is training in {folder}; stop it, or choose another --out") from error
    except (ImportError, OSError):
        pass  # a system or a network file system without such locks
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


def checkpoints(config: TrainConfig) -> Path:
    """The folder of a run's states."""
    return Path(str(config.out)) / "checkpoints"


def last_good(config: TrainConfig) -> str:
    """What a run that has to stop leaves, for its message."""
    files = checkpoint.training_files(checkpoints(config))
    return f"the last good state is {files[0]}" if files else "no checkpoint had been written"


def describe(config: TrainConfig, state: TrainingState, images: int) -> list[str]:
    """Lines about what is about to be trained."""
    millions = [sum(p.numel() for p in m.parameters()) / 1e6 for m in (state.generator, state.discriminator)]
    g = state.generator.config
    return [
        f"device {config.device}, {config.dtype}; data {config.data}: {images} images of {config.size} px",
        f"generator '{config.preset}': {len(g.layer_widths)} layers of {max(g.layer_widths)}, "
        f"{millions[0]:.2f} M parameters; discriminator x{config.d_width:g}: {millions[1]:.2f} M",
        f"batch {config.batch}, {config.steps} steps; run folder {config.out}",
    ]
