"""The training loop: progress, logging, sample grids, checkpoints, leaving and going on."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import signal
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import checkpoint
from ..data import Batches, open_source
from ..errors import UsageError
from ..pictures import to_uint8
from .config import TrainConfig
from .graphs import GraphedSteps
from .growth import start_from
from .log import RunLog
from .progressive import run_stages, stage_configs
from .state import TrainingState

SAMPLE_SEED = (
    1_000_003  # of the latents of the sample grids: the same for every run, apart from the training's
)


class DivergenceError(RuntimeError):
    """A loss or a weight is no longer finite. The last checkpoint written is still good."""


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
        folder: of the run.
        step: steps done in all.
        stopped_by: the signal that ended it early, or None.
        images_per_second: over the whole of this call, sample grids and checkpoints included.
    """

    folder: Path
    step: int
    stopped_by: signal.Signals | None
    images_per_second: float


def train(config: TrainConfig, *, progress: bool = True) -> TrainResult:
    """Runs a training, from the start or from a checkpoint, to `config.steps` steps or until told to stop.

    The run's folder holds config.json, metrics.jsonl, tensorboard/, samples/ (PNG grids), checkpoints/ and
    generator.safetensors (the averaged generator, for `cips sample`). SIGINT and SIGTERM save a checkpoint
    and return.

    Args:
        config: the options; what is open in it follows the device, or the checkpoint that it goes on from.
        progress: show a progress bar and print what was chosen.

    Raises:
        UsageError: an option, the data or a checkpoint cannot be used; the folder holds a run already and
            `resume` is "never".
        DivergenceError: NaN or infinity.
    """

    if config.stages is not None:
        return run_stages(stage_configs(config), lambda stage: train(stage, progress=progress))

    def say(text: str) -> None:
        if progress:
            print(f"cips: {text}", file=sys.stderr, flush=True)

    config, saved, source_file = _find_start(config)
    assert config.out is not None and config.batch is not None  # resolved
    folder = Path(config.out)
    names = ("crop", "load_size", "too_small", "cache", "workers")
    how = {name: getattr(config, name) for name in names}
    images = open_source(config.data, config.image_size, **how, say=say).to(config.device)
    batches = Batches(images, config.batch, seed=config.seed, flip=config.flip, rotate=config.rotate)

    torch.manual_seed(config.seed)
    if config.device.startswith("cuda"):
        torch.backends.cudnn.benchmark = True
    state = TrainingState(config)
    if saved is not None:
        state.load_state_dict(saved, str(source_file))
        say(f"going on from {source_file} at step {state.step}")
        if state.step >= (config.steps or 0):
            say(f"all {config.steps} steps are done; raise --steps for more")
    elif config.init is not None:
        say(start_from(state, config.init))
    for line in _describe(config, state, len(images)):
        say(line)
    with checkpoint.atomic_file(folder / "config.json") as file:
        file.write(json.dumps(dataclasses.asdict(config), indent=1).encode())
    checkpoint.remove_leftovers(folder)
    checkpoint.remove_leftovers(_checkpoints(config))
    run = _Run(config, state, batches, progress)
    try:
        return run.loop()
    finally:
        run.close()


def _find_start(config: TrainConfig) -> tuple[TrainConfig, dict[str, Any] | None, Path | None]:
    """Resolved options, and the checkpoint to go on from, if any."""
    if config.resume not in ("never", "auto"):
        path = Path(config.resume)
        saved = checkpoint.load_training(path)
        if config.out is None and path.resolve().parent.name == "checkpoints":
            config = dataclasses.replace(config, out=str(path.parent.parent))
        config = config.resolve(saved.get("config", {}))
        newest = checkpoint.training_files(_checkpoints(config))[:1]
        if newest and newest[0].resolve() != path.resolve():
            raise UsageError(f"out: {config.out} holds {newest[0].name} already; choose another --out")
        return config, saved, path
    fresh = config.resolve()
    files = checkpoint.training_files(_checkpoints(fresh))
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
        raise UsageError(f"resume: no whole checkpoint in {_checkpoints(fresh)}")
    return fresh, None, None


def _checkpoints(config: TrainConfig) -> Path:
    return Path(str(config.out)) / "checkpoints"


def _describe(config: TrainConfig, state: TrainingState, images: int) -> list[str]:
    millions = [sum(p.numel() for p in m.parameters()) / 1e6 for m in (state.generator, state.discriminator)]
    g = state.generator.config
    return [
        f"device {config.device}, {config.dtype}; data {config.data}: {images} images of {config.size} px",
        f"generator '{config.preset}': {len(g.layer_widths)} layers of {max(g.layer_widths)}, "
        f"{millions[0]:.2f} M parameters; discriminator x{config.d_width:g}: {millions[1]:.2f} M",
        f"batch {config.batch}, {config.steps} steps; run folder {config.out}",
    ]


class _Run:
    """One call of `train`: the state, and what is written about it."""

    def __init__(self, config: TrainConfig, state: TrainingState, batches: Batches, progress: bool) -> None:
        self.config, self.state, self.batches, self.progress = config, state, batches, progress
        self.folder = Path(str(config.out))
        self.log = RunLog(self.folder, state.step)
        self.pending: dict[str, list[Tensor]] = defaultdict(list)
        self.saved_step = self.shown_step = state.step if state.step else -1
        random = torch.Generator().manual_seed(SAMPLE_SEED)
        self.sample_z = torch.randn(config.samples, state.generator.config.style_dim, generator=random)
        # small steps on a CPU cost nothing to look at; on a GPU looking would make the host wait
        self.watch_every_step = state.device.type == "cpu"
        graphed = config.cuda_graphs and state.device.type == "cuda"
        self.step_function = GraphedSteps(state) if graphed else state.train_step

    def close(self) -> None:
        self.log.close()

    def loop(self) -> TrainResult:
        from tqdm import tqdm

        config, state = self.config, self.state
        assert config.steps is not None and config.batch is not None
        start, began = state.step, time.perf_counter()
        if start == 0:
            self.show_real()
            self.show_samples()
        stopped_by = None
        # on a terminal redraw often, in a log file seldom
        every = 0.2 if sys.stderr.isatty() else 15.0
        bar = tqdm(
            total=config.steps,
            initial=start,
            unit="step",
            mininterval=every,
            disable=not self.progress,
            dynamic_ncols=True,
        )
        with bar, _stop_request() as request:
            mark, mark_step = time.perf_counter(), start
            while state.step < config.steps and request.signal is None:
                self.train_step()
                bar.update()
                if state.step % config.log_every == 0 or state.step == config.steps:
                    values = self.flush()
                    now = time.perf_counter()
                    values["images_per_second"] = (state.step - mark_step) * config.batch / (now - mark)
                    self.log.scalars(state.step, values)
                    bar.set_postfix_str(_postfix(values), refresh=False)
                    mark, mark_step = now, state.step
                paused = time.perf_counter()
                if config.sample_every and state.step % config.sample_every == 0:
                    self.show_samples()
                if config.checkpoint_every and state.step % config.checkpoint_every == 0:
                    self.save()
                mark += time.perf_counter() - paused  # images/s counts training alone
            stopped_by = request.signal
            if state.step != self.saved_step:
                self.save()
            if stopped_by is None and state.step != self.shown_step:
                self.show_samples()
        rate = (state.step - start) * config.batch / max(time.perf_counter() - began, 1e-9)
        return TrainResult(self.folder, state.step, stopped_by, rate)

    def train_step(self) -> None:
        state = self.state
        try:
            metrics = self.step_function(self.batches(state.step))
        except ValueError as error:
            # kernels on a CPU refuse styles that are not finite
            if state.all_finite():
                raise
            raise self.diverged("a weight is not finite") from error
        for name, value in metrics.items():
            self.pending[name].append(value)
        if self.watch_every_step:
            for name, value in metrics.items():
                if not math.isfinite(float(value)):
                    raise self.diverged(f"{name} is {float(value)}")

    def flush(self) -> dict[str, float]:
        """Means since the last call; the one place where the loop waits for the device."""
        if not self.pending:
            return {}
        names = list(self.pending)
        means = torch.stack([torch.stack(self.pending[name]).float().mean() for name in names]).tolist()
        self.pending.clear()
        values = dict(zip(names, means))
        for name, value in values.items():
            if not math.isfinite(value):
                raise self.diverged(f"{name} is {value}")
        return values

    def diverged(self, what: str) -> DivergenceError:
        files = checkpoint.training_files(_checkpoints(self.config))
        last = f"the last good state is {files[0]}" if files else "no checkpoint had been written"
        return DivergenceError(f"stopped at step {self.state.step}: {what}; {last}")

    def save(self) -> None:
        """The checkpoint of this step, and the averaged generator beside it."""
        if not self.state.all_finite():
            raise self.diverged("a weight is not finite")
        average = self.state.average.module
        average.estimate_w_mean()  # exact for the averaged mapping network; draws from its own seed
        checkpoint.save_training(
            _checkpoints(self.config), self.state.step, self.state.state_dict(), self.config.keep
        )
        checkpoint.save_generator(
            self.folder / "generator.safetensors", average, step=self.state.step, data=self.config.data
        )
        self.saved_step = self.state.step

    @torch.no_grad()
    def show_samples(self) -> None:
        average, batch = self.state.average.module, self.config.batch
        # fixed latents and a fixed noise seed: differences between grids are learning, and torch's RNG is
        # left alone
        parts = [
            to_uint8(average(z.to(self.state.device), self.state.regime.shown(), noise=SAMPLE_SEED, lookup=self.config.lookup))
            for z in self.sample_z.split(batch)
        ]
        self.log.pictures(f"fake-{self.state.step:08d}", self.state.step, torch.cat(parts))
        self.shown_step = self.state.step

    def show_real(self) -> None:
        source = self.batches.source
        index = self.batches.indices(0)
        index = np.resize(index, self.config.samples)  # a small batch is shown again and again
        self.log.pictures("real", 0, source.images(index).cpu())


def _postfix(values: dict[str, float]) -> str:
    shown = {
        "img/s": values.get("images_per_second"),
        "D": values.get("d_loss"),
        "G": values.get("g_loss"),
        "R1": values.get("r1"),
    }
    return ", ".join(f"{name} {value:.4g}" for name, value in shown.items() if value is not None)


@dataclasses.dataclass
class _Request:
    signal: signal.Signals | None = None


@contextlib.contextmanager
def _stop_request() -> Iterator[_Request]:
    """Notes SIGINT and SIGTERM while the block runs, so that a step is finished and saved; a second one
    interrupts.
    """
    request = _Request()
    if threading.current_thread() is not threading.main_thread():
        yield request  # only the main thread may set handlers
        return

    def note(number: int, frame: object) -> None:
        if request.signal is not None:
            raise KeyboardInterrupt
        request.signal = signal.Signals(number)

    old = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
