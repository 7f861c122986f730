"""What a run writes beside its checkpoints: metrics.jsonl, TensorBoard events, sample grids."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from torch import Tensor

from ..checkpoint import atomic_file
from ..pictures import image_grid, save_png


class RunLog:
    """Scalars to `metrics.jsonl` and TensorBoard, pictures to `samples/` and TensorBoard.

    Args:
        folder: of the run.
        step: the step that the run starts from; later lines of an earlier attempt are removed.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self.folder, self.path = folder, folder / "metrics.jsonl"
        if self.path.exists():
            lines = [line for line in self.path.read_text().splitlines() if _step_of(line) <= step]
            with atomic_file(self.path) as file:
                file.write("".join(f"{line}\n" for line in lines).encode())
        self._file = open(self.path, "a", buffering=1)
        self._board: Any = None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            print("cips: tensorboard is not installed: metrics.jsonl only", file=sys.stderr)
        else:
            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """One line of JSON, and one TensorBoard point a value."""
        self._file.write(
            json.dumps({"step": step, **{k: float(f"{v:.6g}") for k, v in values.items()}}) + "\n"
        )
        if self._board:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def pictures(self, name: str, step: int, images: Tensor) -> Path:
        """uint8 `[B, H, W, 3]` as `samples/NAME.png`; returns the path."""
        grid, path = image_grid(images), self.folder / "samples" / f"{name}.png"
        save_png(path, grid)
        if self._board:
            self._board.add_image(name.split("-")[0], grid.numpy(), step, dataformats="HWC")
        return path

    def close(self) -> None:
        self._file.close()
        if self._board:
            self._board.close()


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")  # the torn last line of a killed run
