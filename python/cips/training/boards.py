"""Programs that show a run while it goes on: TensorBoard, and Weights & Biases where asked for."""

from __future__ import annotations

import importlib.util
import json
import math
import uuid
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoint import atomic_file
from ..errors import UsageError


class Board(ABC):
    """Takes scalars and pictures of a step."""

    @abstractmethod
    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One point a value."""

    @abstractmethod
    def picture(self, name: str, step: int, image: np.ndarray) -> None:
        """uint8 `[H, W, 3]`."""

    @abstractmethod
    def close(self) -> None:
        """Writes what is left."""


class TensorBoard(Board):
    """Events in `folder/tensorboard`.

    Args:
        folder: of the run.
        step: that it starts from; what an earlier attempt wrote of later ones is hidden.

    Raises:
        ImportError: tensorboard is not installed.
    """

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def picture(self, name: str, step: int, image: np.ndarray) -> None:
        self._writer.add_image(name, image, step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases(Board):
    """A run of Weights & Biases, gone on with where the folder has one.

    Args:
        folder: of the run; `wandb.json` in it keeps the id.
        project: its project.
        options: of the run, shown beside it.

    Raises:
        UsageError: it is not installed, or cannot be reached.
    """

    def __init__(self, folder: Path, project: str, options: Mapping[str, Any]) -> None:
        check_wandb(project)
        import wandb

        note = folder / "wandb.json"
        try:
            number = json.loads(note.read_text())["id"]
        except (OSError, ValueError, KeyError):
            number = uuid.uuid4().hex
            with atomic_file(note) as file:
                file.write(json.dumps({"id": number, "project": project}).encode())
        self._images = wandb.Image
        try:
            self._run: Any = wandb.init(
                project=project,
                name=folder.name,
                id=number,
                resume="allow",
                dir=str(folder),
                config=dict(options),
            )
        except (wandb.Error, OSError) as error:
            raise UsageError(
                f"wandb: {str(error).splitlines()[0]}; WANDB_MODE=offline keeps the run here"
            ) from error
        # a step of our own: its counter never goes back, and a resumed run may begin before the last point
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def picture(self, name: str, step: int, image: np.ndarray) -> None:
        self._run.log({"step": step, name: self._images(image)})

    def close(self) -> None:
        self._run.finish()


def check_wandb(project: str | None) -> None:
    """Raise UsageError where Weights & Biases is asked for and not installed."""
    if project is None:
        return
    if not project.strip():
        raise UsageError("wandb: expected the name of a project, got an empty one")
    if importlib.util.find_spec("wandb") is None:
        raise UsageError(
            f"wandb: project {project!r} needs Weights & Biases, which is not installed: pip install wandb"
        )


def finite(values: Mapping[str, float]) -> dict[str, float]:
    """Those that JSON and a plot can hold, rounded to six digits."""
    return {name: float(f"{value:.6g}") for name, value in values.items() if math.isfinite(value)}
