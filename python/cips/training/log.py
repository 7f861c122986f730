"""What a run writes beside its checkpoints: metrics.jsonl, sample grids, and the boards."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..checkpoint import atomic_file
from ..pictures import image_grid, save_png
from .boards import Board, TensorBoard, WeightsAndBiases, finite


class RunLog:
    """Scalars to `metrics.jsonl` and the boards, pictures to `samples/` and the boards.

    TensorBoard is a board wherever it is installed; where it is not, one line says so and `metrics.jsonl` has all the same.

    Args:
        folder: of the run.
        step: the step that the run starts from; later lines of an earlier attempt are removed.
        wandb: project of Weights & Biases; None: not there.
        options: of the run, for Weights & Biases.

    Raises:
        UsageError: a file cannot be written; Weights & Biases is asked for and does not start.
    """

    def __init__(
        self, folder: Path, step: int, wandb: str | None = None, options: Mapping[str, Any] | None = None
    ) -> None:
        self.folder, self.path = folder, folder / "metrics.jsonl"
        if self.path.exists():
            lines = [line for line in self.path.read_text().splitlines() if _step_of(line) <= step]
            with atomic_file(self.path) as file:
                file.write("".join(f"{line}\n" for line in lines).encode())
        self._file = open(self.path, "a", buffering=1)
        self.boards: list[Board] = []
        try:
            self.boards.append(TensorBoard(folder, step))
        except ImportError:
            print("cips: tensorboard is not installed: metrics.jsonl only", file=sys.stderr)
        if wandb is not None:
            self.boards.append(WeightsAndBiases(folder, wandb, options or {}))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """One line of JSON, and one point a value on every board. Values that are not finite are left out."""
        values = finite(values)
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        for board in self.boards:
            board.scalars(step, values)

    def pictures(self, name: str, step: int, images: Tensor) -> Path:
        """uint8 `[B, H, W, 3]` as `samples/NAME.png`; returns the path."""
        grid, path = image_grid(images), self.folder / "samples" / f"{name}.png"
        save_png(path, grid)
        for board in self.boards:
            board.picture(name.split("-")[0], step, grid.numpy())
        return path

    def close(self) -> None:
        self._file.close()
        for board in self.boards:
            board.close()


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")  # the torn last line of a killed run
