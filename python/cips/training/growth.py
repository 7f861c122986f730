"""A run that starts from the networks of another: of the same size to go on with other options, of a smaller one to grow.

What becomes of each part:

- Layers, mapping network, Fourier features and ToRGBs are taken as they are: they know no size.
- The coordinate table: where the new run's has as many points, its entries stay. At a larger image they are then read
  between its points, bilinearly with aligned corners, which is how the released 1024x1024 checkpoint has a table of
  256x256. Where the new table has more points, its entries are what the old one gave at those points, so the images are the
  same as before the growth: the old generator drawn at the new size.
- The averaged generator: the same.
- The discriminator: blocks are matched by the resolution that they see, counted from the 4x4 end. New ones at the top, and
  the layer from RGB where its resolution changes, start from random weights. A patch of unchanged size keeps all.
- Adam's moments go with the weights, the table's interpolated as it is; new weights have none.
- The count of steps, the order of the data and the random numbers start anew.

A training checkpoint of the official code serves like one of a run here, `cips.official_training` reads it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..architectures import config_from_dict, make_generator
from ..checkpoint import check_training, load_state, training_files
from ..config import DiscriminatorConfig, GeneratorConfig, presets
from ..discriminator import Discriminator
from ..errors import UsageError
from ..official_training import from_official_training, is_official_training, official_architectures
from ..states import read_torch_file
from ..stylegan2_config import StyleGAN2Config
from .config import TrainConfig
from .recipes import AUTO
from .state import TrainingState

TABLE = "encoding.table.weight"
NEEDED = (
    "step", "generator_config", "discriminator_config", "generator", "average", "discriminator", "g_optimizer", "d_optimizer",
)  # fmt: skip
_BLOCK = re.compile(r"blocks\.(\d+)\.")
Config = TypeVar("Config", GeneratorConfig, DiscriminatorConfig, StyleGAN2Config)


def read_checkpoint(path: str | os.PathLike[str]) -> tuple[Path, dict[str, Any]]:
    """The file that `newest_checkpoint` finds, and what it holds.

    Raises:
        UsageError: none, or a damaged one.
    """
    file = newest_checkpoint(path)
    state = read_torch_file(file, "training state")
    if is_official_training(state):
        return file, from_official_training(str(file), state)
    return file, check_training(file, state)


def with_its_architecture(config: TrainConfig) -> TrainConfig:
    """Options with the networks of the official training checkpoint that `init` names, if it does and no preset is given.

    Our own checkpoints say by which options their networks were made; an official one has its shapes alone.

    Raises:
        UsageError: it is damaged, or a key is missing, extra or misshapen.
    """
    if config.init is None or config.preset != AUTO or config.architecture is not None or not Path(config.init).is_file():
        return config
    state = read_torch_file(config.init, "training state", lazy=True)
    if not is_official_training(state):
        return config
    generator, discriminator = official_architectures(config.init, state)
    d_coords = discriminator.in_channels == 5 if config.d_coords is None else config.d_coords
    d_width = config.d_width or discriminator.width
    chosen = dataclasses.replace(config, preset="official", d_width=d_width, d_coords=d_coords)
    size = generator.table_size or generator.size
    if generator == dataclasses.replace(presets["official"], size=size):
        return chosen
    fields = {k: v for k, v in generator.to_dict().items() if k not in ("size", "table_size")}
    return dataclasses.replace(chosen, architecture=json.dumps(fields))


def start_from(
    state: TrainingState,
    path: str | os.PathLike[str],
    read: Callable[[str | os.PathLike[str]], tuple[Path, dict[str, Any]]] = read_checkpoint,
) -> str:
    """Takes over the networks of a checkpoint.

    Args:
        state: new, of step 0.
        path: a training checkpoint, of this package or of the official code, or the folder of a run, whose newest is taken.
        read: reads it; of several processes one may read for all.

    Returns:
        A line about what was taken.

    Raises:
        UsageError: no such file, a damaged one, or networks of another architecture, whose field is named. Nothing has
            changed then.
    """
    file, saved = read(path)
    had: list[str] = []
    try:
        saved = {key: saved[key] for key in NEEDED}
        old_g = _generator_config(saved["generator_config"], file)
        old_d = _config(DiscriminatorConfig, saved["discriminator_config"], file)
        now_g = state.generator.config
        if type(old_g) is not type(now_g):
            kinds = (type(config).__name__.removesuffix("Config") for config in (old_g, now_g))
            raise UsageError("{}: its generator has another architecture: {}, here {}".format(file, *kinds))
        of_table = ("size", "table_size", "table_init_std") if isinstance(now_g, GeneratorConfig) else ()
        check_architecture(old_g, now_g, of_table, file, "generator")
        check_architecture(old_d, state.discriminator.config, ("size",), file, "discriminator")
        if old_d.last_pixels != state.discriminator.config.last_pixels:
            raise UsageError(
                f"{file}: its images have another shape ({old_g.size}, now {state.generator.config.size});"
                " expected the same ratio of height and width"
            )
        for name, module in (("generator", state.generator), ("average", state.average.module)):
            load_state(f"{file}: {name}", module, grown_generator(saved[name], state.generator.config, file))
        taken = grown_discriminator(saved["discriminator"], old_d, state.discriminator)
        state.discriminator.load_state_dict({**state.discriminator.state_dict(), **taken})
        with torch.device("meta"):
            names = [[n for n, _ in m.named_parameters()] for m in (make_generator(old_g), Discriminator(old_d))]
        for (optimizer, module, key), before in zip(
            (
                (state.g_optimizer, state.generator, "g_optimizer"),
                (state.d_optimizer, state.discriminator, "d_optimizer"),
            ),
            names,
        ):
            had.append(_changed_settings(saved[key], optimizer, key))
            moments = {before[index]: value for index, value in saved[key]["state"].items()}
            renamed = _renamed(moments, old_d, state.discriminator.config) if module is state.discriminator else moments
            _load_moments(optimizer, module, renamed)
    except KeyError as error:
        raise UsageError(f"{file}: key {error.args[0]!r} is missing") from error
    table, now = (getattr(config, "table_size", None) or config.size for config in (old_g, now_g))
    grown = f", its table grown from {table[0]}x{table[1]} to {now[0]}x{now[1]}" if table != now else ""
    fresh = sum(1 for key in state.discriminator.state_dict() if key not in taken)
    new = f"; {fresh} tensors of the discriminator are new" if fresh else ""
    return f"starting from the networks of {file} (step {saved['step']}){grown}{new}{''.join(had)}"


def _changed_settings(saved: Mapping[str, Any], optimizer: torch.optim.Optimizer, name: str) -> str:
    """Learning rate and betas that a checkpoint had and this run has not; what it has are its own options."""
    then, now = (groups[0] if groups else {} for groups in (saved["param_groups"], optimizer.param_groups))
    differ = [
        f"{key} {then[key]} (here {now[key]})"
        for key in ("lr", "betas")
        if key in then and not np.allclose(then[key], now[key], rtol=1e-9, atol=0)
    ]
    return f"; its {name} had {' and '.join(differ)}" if differ else ""


def newest_checkpoint(path: str | os.PathLike[str]) -> Path:
    """The file itself, or the newest checkpoint of a run's folder.

    Raises:
        UsageError: neither.
    """
    path = Path(path)
    if path.is_dir():
        files = training_files(path / "checkpoints") or training_files(path)
        if not files:
            raise UsageError(f"init: no checkpoint in {path}; expected the folder of a run, or a step-NNNNNNNN.pt")
        return files[0]
    if not path.is_file():
        raise UsageError(f"init: no such file or folder: {path}")
    return path


def check_architecture(old: Config, new: Config, free: tuple[str, ...], source: object, what: str) -> None:
    """Raise UsageError, naming the fields, where two configs differ in others than `free`."""
    differ = [
        f"{field.name} is {getattr(old, field.name)!r}, here {getattr(new, field.name)!r}"
        for field in dataclasses.fields(old)
        if field.name not in free and getattr(old, field.name) != getattr(new, field.name)
    ]
    if differ:
        raise UsageError(f"{source}: its {what} has another architecture: {'; '.join(differ)}")


def grown_generator(state: Mapping[str, Tensor], config: GeneratorConfig, source: object) -> dict[str, Tensor]:
    """A generator's state dict with the table of `config`'s size.

    Raises:
        UsageError: the table would have to shrink.
    """
    grown = dict(state)
    if TABLE in grown:
        grown[TABLE] = grown_table(grown[TABLE], config.table_size or config.size, source)
    return grown


def grown_table(table: Tensor, size: tuple[int, int], source: object = "table") -> Tensor:
    """`[S_h, S_w, C]` at the points of a larger grid, `[*size, C]`, as `CoordinateTable` reads it there.

    Raises:
        UsageError: `size` is smaller.
    """
    rows, columns = table.shape[:2]
    if (rows, columns) == tuple(size):
        return table
    if rows > size[0] or columns > size[1]:
        raise UsageError(
            f"{source}: its table has {rows}x{columns} points and cannot shrink to {size[0]}x{size[1]}; "
            f"expected table_size {rows}x{columns} or larger"
        )
    planes = table.permute(2, 0, 1)[None]
    return F.interpolate(planes, tuple(size), mode="bilinear", align_corners=True)[0].permute(1, 2, 0).contiguous()


def grown_discriminator(
    state: Mapping[str, Tensor], old: DiscriminatorConfig, new: Discriminator
) -> dict[str, Tensor]:
    """What of a discriminator's state dict has a place in another, under the names it has there."""
    return _renamed(state, old, new.config)


def _renamed(values: Mapping[str, Any], old: DiscriminatorConfig, new: DiscriminatorConfig) -> dict[str, Any]:
    """Values by a parameter's name, under the names of a discriminator that begins at another resolution."""
    ahead = len(new.resolutions) - len(old.resolutions)
    renamed = {}
    for key, value in values.items():
        match = _BLOCK.match(key)
        if match:
            block = int(match[1]) + ahead
            if block < 0:
                continue
            key = f"blocks.{block}.{key[match.end() :]}"
        elif key.startswith("from_rgb.") and ahead:
            continue
        renamed[key] = value
    return renamed


def _load_moments(optimizer: torch.optim.Optimizer, module: nn.Module, moments: Mapping[str, Any]) -> None:
    """Moments by a parameter's name into an optimiser of the module's parameters; the table's are interpolated."""
    state = {}
    for index, (name, parameter) in enumerate(module.named_parameters()):
        if name not in moments:
            continue
        state[index] = {
            key: grown_table(value, tuple(parameter.shape[:2])) if name == TABLE and value.dim() == 3 else value
            for key, value in moments[name].items()
        }
        state[index] = {key: _laid_out(value, parameter) for key, value in state[index].items()}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _laid_out(value: Tensor, parameter: Tensor) -> Tensor:
    """The value with the strides of its parameter, which a fused Adam wants: weights here have their channels last."""
    if value.shape != parameter.shape or value.stride() == parameter.stride():
        return value
    return torch.empty_strided(value.shape, parameter.stride(), dtype=value.dtype).copy_(value)


def _generator_config(values: Mapping[str, Any], source: object) -> GeneratorConfig | StyleGAN2Config:
    try:
        return config_from_dict(values)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{source}: {error}") from error


def _config(kind: type[Config], values: Mapping[str, Any], source: object) -> Config:
    try:
        return kind.from_dict(values)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{source}: {error}") from error
