"""Progressive training: a run in stages of growing size, as the paper trained 1024x1024 "starting from 256x256
initialization" (supplement, section 2), of which neither text nor code say more.

Every stage is a run of its own in a folder of its own, which starts from the networks of the stage before it
(`cips.training.growth` says what becomes of them). So each keeps its checkpoints, resumes, and can be looked at alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..checkpoint import training_files
from ..config import DiscriminatorConfig, presets
from ..data import check_fit, data_name
from ..errors import UsageError
from ..grids import parse_size
from ..stylegan2_config import StyleGAN2Config
from .config import TrainConfig
from .regimes import parse_stages


def stage_configs(config: TrainConfig) -> list[TrainConfig]:
    """The run of each stage: checked, and nothing has begun.

    Args:
        config: with `stages`; its `out` holds the stages' folders, `1-256`, `2-512`, ...

    Raises:
        UsageError: options that do not fit a stage, named with it, or not stages at all.
    """
    stages = parse_stages(str(config.stages))
    if config.steps is not None:
        raise UsageError(f"steps: expected none with stages, each of which says its own, got {config.steps}")
    if isinstance(presets.get(config.preset), StyleGAN2Config):
        raise UsageError(f"preset: expected one of CIPS with stages, got {config.preset!r}, which does not grow")
    shapes = {DiscriminatorConfig(parse_size(size)).last_pixels for size, _ in stages}
    if config.regime != "patch" and len(shapes) > 1:
        raise UsageError(
            f"stages: expected the same ratio of height and width in all with regime {config.regime}, got {config.stages!r}"
        )
    out = config.out or f"runs/{data_name(config.data)}-{'-'.join(size for size, _ in stages)}"
    configs: list[TrainConfig] = []
    for number, (size, steps) in enumerate(stages, 1):
        changes: dict[str, Any] = {"stages": None, "size": size, "steps": steps, "out": f"{out}/{number}-{size}"}
        if configs:
            changes["init"] = configs[-1].out
        if config.stage_table == "keep" and config.table_size is None:
            changes["table_size"] = stages[0][0]
        try:
            configs.append(dataclasses.replace(config, **changes))
        except UsageError as error:
            raise UsageError(f"stage {size}: {error}") from error
    return configs


def run_stages(
    configs: list[TrainConfig],
    train: Callable[[TrainConfig], Any],
    look: Callable[..., Any] = lambda found: found(),
) -> Any:
    """Trains one stage after the other; with resume "auto" goes on where a run was interrupted.

    Args:
        configs: of `stage_configs`.
        train: trains one; its result has `stopped_by`, the signal that ended it early, or None.
        look: calls a function that looks at the disk; of several processes one does it for all.

    Returns:
        The result of the last stage that was trained, or would have been.

    Raises:
        UsageError: a folder of a stage holds a run and `resume` is "never"; `resume` is a path; images too small for a
            later stage.
    """
    resume = configs[0].resume
    if resume not in ("never", "auto"):
        raise UsageError(f"resume: expected auto or never with stages, each of which has checkpoints of its own, got {resume}")
    begun = look(lambda: [bool(training_files(Path(str(config.out)) / "checkpoints")) for config in configs])
    if resume == "never" and any(begun):
        held = configs[begun.index(True)].out
        raise UsageError(f"out: {held} holds a run; add --resume auto to go on with it, or choose another --out")
    if not any(begun):
        # of all sizes the last is the hardest to serve: not to be found out when the others are done
        last, names = configs[-1], ("crop", "load_size", "too_small", "workers")
        look(lambda: check_fit(last.data, last.image_size, **{name: getattr(last, name) for name in names}))
    result = None
    for config, later in zip(configs, [*begun[1:], False]):
        if later:  # the stage after this one has begun, so this one is done
            continue
        result = train(config)
        if result.stopped_by is not None:
            break
    return result
