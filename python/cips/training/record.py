"""The options beside a run, from which `cips train --config` makes the same run again."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
from pathlib import Path

import torch

from ..checkpoint import atomic_file
from .config import TrainConfig

NAME = "config.yaml"


def write_config(folder: Path, config: TrainConfig) -> Path:
    """Writes `folder/config.yaml`: every option as it was resolved, and in comments what it ran on.

    `resume` is left at "never": a run that was gone on with is, from its options, the run that was not interrupted.

    Raises:
        UsageError: it cannot be written.
    """
    import yaml

    options = {**dataclasses.asdict(config), "resume": "never"}
    try:
        version = importlib.metadata.version("cips-kernels")
    except importlib.metadata.PackageNotFoundError:
        version = "from its source"
    device = config.device
    if torch.device(device).type == "cuda":
        device = f"{device}, {torch.cuda.get_device_name(device)}"
    text = (
        "# the same run again: cips train --config THIS_FILE --out ANOTHER_FOLDER\n"
        "# to go on with it: cips train --config THIS_FILE --resume auto --steps MORE\n"
        f"# cips-kernels {version}, torch {torch.__version__}, Python {platform.python_version()}, {device}\n"
    )
    path = folder / NAME
    with atomic_file(path) as file:
        file.write((text + yaml.safe_dump(options, sort_keys=False)).encode())
    return path
