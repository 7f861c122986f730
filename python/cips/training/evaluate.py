"""Metrics of the averaged generator while it trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..data import ImageSource
from ..metrics import Draw, Evaluation, Evaluator, open_extractor, parse_metrics
from ..metrics.share import first_says
from .config import TrainConfig

METRICS, COUNT = "fid", 5000  # cheap enough to look at often


class TrainingEvaluation:
    """What `--eval-every` asks for: off, or an `Evaluator` of the run's own images, made before the first step.

    Every process of a run makes one and calls it at the same step; torch's random numbers stay as they are.

    Args:
        config: resolved options.
        source: the real images, on the run's device.
        say: is told where their features came from.
        progress: show bars.

    Raises:
        UsageError: a package or the weights are missing; too few images for a metric.
    """

    def __init__(self, config: TrainConfig, source: ImageSource, say: Any, progress: bool) -> None:
        self.every, self.steps = config.eval_every or 0, config.steps
        self.folder = Path(str(config.out)) / "evaluations"
        self._evaluator: Evaluator | None = None
        if not self.every:
            return
        metrics = parse_metrics(METRICS if config.eval_metrics is None else config.eval_metrics)
        extractor = open_extractor(config.eval_extractor, config.eval_weights, metrics, config.device)
        count = COUNT if config.eval_count is None else config.eval_count
        self._evaluator = Evaluator(
            source,
            extractor,
            metrics,
            count=count,
            cache=config.cache,
            say=say,
            progress=progress,
        )
        self._evaluator.real_features()  # what fails, fails before the first step

    def due(self, step: int) -> bool:
        """Whether to measure after so many steps: every `eval_every`, and at the end."""
        return bool(self.every) and step > 0 and (step % self.every == 0 or step == self.steps)

    def missing(self, step: int) -> bool:
        """Whether it is due and has not been done: a run that was killed while it measured does so when it goes on."""
        return self.due(step) and not first_says(self.file(step).exists())

    def file(self, step: int) -> Path:
        """Where the whole result of a step belongs."""
        return self.folder / f"step-{step:08d}.json"

    def __call__(self, step: int, draw: Draw, style_dim: int) -> Evaluation:
        """Measures what `draw` makes (see `Evaluator`)."""
        assert self._evaluator is not None, "due() has been asked"
        return self._evaluator(draw, style_dim, step=step)
