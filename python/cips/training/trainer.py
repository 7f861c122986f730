"""The training loop: progress, logging, sample grids, checkpoints, leaving and going on."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import math
import signal
import sys
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .. import checkpoint
from ..data import Batches, open_source
from ..errors import UsageError
from ..pictures import to_uint8
from . import start
from .boards import check_wandb
from .config import TrainConfig
from .evaluate import TrainingEvaluation
from .graphs import GraphedSteps
from .growth import start_from, with_its_architecture
from .log import RunLog
from .progress import ProgressBar, peak_memory
from .progressive import run_stages, stage_configs
from .record import write_config
from .signals import StopRequest, stop_request
from .state import TrainingState
from .world import World, take_device

SAMPLE_SEED = (
    1_000_003  # of the latents of the sample grids: the same for every run, apart from the training's
)


TROUBLE = 1000  # above every signal's number: what one process tells the others after a step

# options that processes may have of their own: each machine its disks and processors
OF_A_MACHINE = ("cache", "workers")


class DivergenceError(RuntimeError):
    """A loss or a weight is no longer finite. The last checkpoint written is still good.

    Attributes:
        quiet: another process of the same run prints the message.
    """

    quiet: bool = False


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
        folder: of the run.
        step: steps done in all.
        stopped_by: the signal that ended it early, or None.
        images_per_second: over the whole of this call, sample grids and checkpoints included.
        rank: of this process; 0 reports.
    """

    folder: Path
    step: int
    stopped_by: signal.Signals | None
    images_per_second: float
    rank: int = 0


def train(config: TrainConfig, *, progress: bool = True) -> TrainResult:
    """Runs a training, from the start or from a checkpoint, to `config.steps` steps or until told to stop.

    The run's folder holds config.yaml, metrics.jsonl, tensorboard/, samples/ (PNG grids), checkpoints/,
    generator.safetensors (the averaged generator, for `cips sample`), and evaluations/ where `eval_every` asks
    for them. SIGINT and SIGTERM save a checkpoint and return.

    Started by torchrun, or in a process group, the processes train together (docs/scale.md): each computes
    its share of every batch, process 0 writes.

    Args:
        config: the options; what is open in it follows the device, or the checkpoint that it goes on from.
        progress: show a progress bar and print what was chosen.

    Raises:
        UsageError: an option, the data or a checkpoint cannot be used; the folder holds a run already and
            `resume` is "never"; the processes differ in options or data; a file cannot be written.
        DivergenceError: NaN or infinity.
    """

    config = with_its_architecture(config)
    stages = [config] if config.stages is None else stage_configs(config)
    take_device(config.device)
    world = World.join(stages[0].resolve().device)
    show = progress and world.rank == 0
    try:
        if config.stages is not None:
            return run_stages(stages, lambda stage: _train(stage, world, show), world.first)
        return _train(config, world, show)
    finally:
        gc.collect()  # graphs that hold recorded sums must go before the process group does
        world.close()


def _train(config: TrainConfig, world: World, progress: bool) -> TrainResult:
    def say(text: str) -> None:
        if progress:
            print(f"cips: {text}", file=sys.stderr, flush=True)

    world.first(lambda: check_wandb(config.wandb))
    given = {n: v for n, v in dataclasses.asdict(config).items() if n not in OF_A_MACHINE}
    world.same(given, "option")
    own = {name: getattr(config, name) for name in OF_A_MACHINE}
    config, saved, source_file = world.first(lambda: start.find_start(config))
    config = dataclasses.replace(config, **own)
    assert config.out is not None and config.batch is not None  # resolved
    folder = Path(config.out)
    names = ("crop", "load_size", "too_small", "cache", "workers")
    how = {name: getattr(config, name) for name in names}
    parts = start.check_division(config, world)
    images = world.together(lambda: open_source(config.data, config.image_size, **how, say=say).to(config.device))
    fingerprint = images.fingerprint()
    world.same(fingerprint, "data")
    batches = Batches(
        images,
        config.batch,
        seed=config.seed,
        flip=config.flip,
        rotate=config.rotate,
        part=slice(world.rank, None, world.size),
    )

    torch.manual_seed(config.seed)
    if config.device.startswith("cuda"):
        torch.backends.cudnn.benchmark = True
    state = world.together(lambda: TrainingState(config, world))
    if world.rank:
        state.seed_random(config.seed)  # process 0 draws as a single one would
    log: dict[str, list[float]] = {}
    if saved is not None:
        notes = world.together(lambda: state.load_state_dict(saved, str(source_file)))
        say(f"going on from {source_file} at step {state.step}")
        if saved["fingerprint"] != fingerprint:
            notes.append("the data has changed since: batches are not what they would have been")
        for note in notes:
            say(f"  {note}")
        log = saved["log"]
        saved = None  # its memory is wanted elsewhere
        if state.step >= (config.steps or 0):
            say(f"all {config.steps} steps are done; raise --steps for more")
    elif config.init is not None:
        say(world.together(lambda: start_from(state, config.init)))
    state.replicate()
    for line in [*start.describe(config, state, len(images)), *parts]:
        say(line)
    evaluation = world.together(lambda: TrainingEvaluation(config, images, say, progress))

    held = contextlib.ExitStack()

    def begin() -> None:
        held.enter_context(start.sole_use(folder))
        write_config(folder, config)
        checkpoint.remove_leftovers(folder)
        checkpoint.remove_leftovers(start.checkpoints(config))

    with held:
        world.first(begin)
        run = _Run(config, state, batches, progress, fingerprint, log, evaluation)
        try:
            return run.loop()
        except (OSError, UsageError) as error:  # a full disk, mostly
            stopped = UsageError(f"stopped at step {state.step}: {error}; {start.last_good(config)}")
            stopped.quiet = world.rank != 0
            raise stopped from error
        finally:
            run.close()


class _Run:
    """One call of `train`: the state, and what is written about it."""

    def __init__(
        self,
        config: TrainConfig,
        state: TrainingState,
        batches: Batches,
        progress: bool,
        fingerprint: dict[str, str],
        log: dict[str, list[float]],
        evaluation: TrainingEvaluation,
    ) -> None:
        self.config, self.state, self.batches, self.progress = config, state, batches, progress
        self.world, self.fingerprint, self.evaluation = state.world, fingerprint, evaluation
        self.folder = Path(str(config.out))
        self.log: RunLog | None = None
        self.world.first(self.open_log)
        # of the steps since the last log entry: this process's values on the device, and means over processes
        self.pending: dict[str, list[Tensor]] = defaultdict(list)
        self.collected: dict[str, list[float]] = defaultdict(list, {n: list(v) for n, v in log.items()})
        self.saved_step = self.shown_step = state.step if state.step else -1
        random = torch.Generator().manual_seed(SAMPLE_SEED)
        self.sample_z = torch.randn(config.samples, state.generator.config.style_dim, generator=random)
        # small steps on a CPU cost nothing to look at; on a GPU looking would make the host wait
        self.watch_every_step = state.device.type == "cpu"
        graphed = config.cuda_graphs and state.device.type == "cuda"
        self.step_function = GraphedSteps(state) if graphed else state.train_step

    def close(self) -> None:
        self.step_function = self.state.train_step  # gives back the graphs
        if self.log is not None:
            with contextlib.suppress(OSError):  # of a full disk, which has been reported
                self.log.close()

    def open_log(self) -> None:
        try:
            self.log = RunLog(self.folder, self.state.step, self.config.wandb, dataclasses.asdict(self.config))
        except OSError as error:
            raise UsageError(f"out: {self.folder} cannot be written: {error.strerror or error}") from error

    def write_log(self, step: int, values: dict[str, float]) -> None:
        def write() -> None:
            assert self.log is not None
            self.log.scalars(step, values)

        self.world.first(write)

    def loop(self) -> TrainResult:
        config, state = self.config, self.state
        assert config.steps is not None and config.batch is not None
        begun_at, began = state.step, time.perf_counter()
        if begun_at == 0:
            self.show_real()
            self.show_samples()
        if self.evaluation.missing(begun_at):
            self.evaluate()
        stopped_by = None
        bar = ProgressBar(config.steps, begun_at, self.progress)
        with bar, stop_request(insistent=self.world.size == 1) as request:
            mark, mark_step = time.perf_counter(), begun_at
            while state.step < config.steps and stopped_by is None:
                trouble = self.train_step()
                request.arm()  # a step may have compiled kernels
                bar.step()
                stopped_by = self.agree(request, trouble)
                if state.step % config.log_every == 0 or state.step == config.steps:
                    values = self.flush()
                    now = time.perf_counter()
                    values["images_per_second"] = (state.step - mark_step) * config.batch / (now - mark)
                    values["memory_gib"] = peak_memory(state.device)
                    self.write_log(state.step, values)
                    bar.values(values)
                    mark, mark_step = now, state.step
                paused = time.perf_counter()
                if config.sample_every and state.step % config.sample_every == 0:
                    self.show_samples()
                if config.checkpoint_every and state.step % config.checkpoint_every == 0:
                    self.save()
                if stopped_by is None and self.evaluation.due(state.step):
                    self.evaluate()
                mark += time.perf_counter() - paused  # images/s counts training alone
            if state.step != self.saved_step:
                self.save()
            if stopped_by is None and state.step != self.shown_step:
                self.show_samples()
        rate = (state.step - begun_at) * config.batch / max(time.perf_counter() - began, 1e-9)
        return TrainResult(self.folder, state.step, stopped_by, rate, self.world.rank)

    def agree(self, request: StopRequest, trouble: str | None) -> signal.Signals | None:
        """The signal that any process has got, for all of them to stop at the same step.

        Raises:
            DivergenceError: on all of them, where one is in trouble.
        """
        number = TROUBLE if trouble else int(request.signal or 0)
        number = self.world.largest(number)
        if number == TROUBLE:
            raise self.diverged(next(each for each in self.world.gather(trouble) if each))
        return signal.Signals(number) if number else None

    def train_step(self) -> str | None:
        """One step; says what is wrong with its losses, where they are looked at."""
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
                    return f"{name} is {float(value)}"
        return None

    def collect(self) -> None:
        """Brings the losses of the steps since the last call to the host, as means over processes: the one place
        where the loop waits for the device.
        """
        if not self.pending:
            return
        lengths = [len(values) for values in self.pending.values()]
        line = torch.stack([value for values in self.pending.values() for value in values]).float()
        self.world.sum_([line])
        for name, part in zip(self.pending, (line / self.world.size).split(lengths)):
            self.collected[name] += part.tolist()
        self.pending.clear()

    def flush(self) -> dict[str, float]:
        """Means since the last call."""
        self.collect()
        values = {name: math.fsum(each) / len(each) for name, each in self.collected.items()}
        self.collected.clear()
        for name, value in values.items():
            if not math.isfinite(value):
                raise self.diverged(f"{name} is {value}")
        return values

    def diverged(self, what: str) -> DivergenceError:
        error = DivergenceError(f"stopped at step {self.state.step}: {what}; {start.last_good(self.config)}")
        error.quiet = self.world.rank != 0
        return error

    def save(self) -> None:
        """The checkpoint of this step, and the averaged generator beside it."""
        if not self.state.all_finite():
            raise self.diverged("a weight is not finite")
        average = self.state.average.module
        average.estimate_w_mean()  # exact for the averaged mapping network; draws from its own seed
        self.collect()
        state = {
            **self.state.state_dict(),
            "fingerprint": self.fingerprint,
            "log": dict(self.collected),
        }

        def write() -> None:
            # the checkpoint last: killed in between, the run goes on from an older one and writes both again
            notes = {"step": self.state.step, "data": self.config.data}
            checkpoint.save_generator(self.folder / "generator.safetensors", average, **notes)
            kept = self.config.keep, self.config.keep_every
            checkpoint.save_training(start.checkpoints(self.config), self.state.step, state, *kept)

        self.world.first(write)
        self.saved_step = self.state.step

    @torch.no_grad()
    def show_samples(self) -> None:
        """The averaged generator's images of the fixed latents, every process some of them."""
        average, step = self.state.average.module, self.state.step
        parts = self.sample_z.split(self.config.batch // (self.world.size * self.config.accumulate))
        # fixed latents and a fixed noise seed: differences between grids are learning, and torch's RNG is
        # left alone
        how = {"noise": SAMPLE_SEED, "lookup": self.config.lookup}
        mine = {
            k: to_uint8(average(parts[k].to(self.state.device), self.state.regime.shown(), **how))
            for k in self.world.share(len(parts))
        }
        drawn = {k: images for each in self.world.gather(mine) for k, images in each.items()}

        def write() -> None:
            assert self.log is not None
            self.log.pictures(f"fake-{step:08d}", step, torch.cat([drawn[k] for k in range(len(parts))]))

        self.world.first(write)
        self.shown_step = step

    @torch.no_grad()
    def evaluate(self) -> None:
        """Measures the averaged generator: a line in metrics.jsonl, everything in evaluations/."""
        average, step = self.state.average.module, self.state.step
        if step != self.saved_step:
            self.save()  # measuring takes a while, and what was measured should not be lost meanwhile
        result = self.evaluation(
            step,
            lambda z, seed: average(
                z.to(self.state.device), self.state.regime.shown(), noise=seed, lookup=self.config.lookup
            ),
            average.config.style_dim,
        )

        def write() -> None:
            assert self.log is not None
            self.log.scalars(step, {f"eval/{name}": value for name, value in result.values.items()})
            result.save(self.evaluation.file(step))

        self.world.first(write)

    def show_real(self) -> None:
        def write() -> None:
            assert self.log is not None
            # a small batch is shown again and again
            index = np.resize(self.batches.indices(0), self.config.samples)
            self.log.pictures("real", 0, self.batches.source.images(index).cpu())

        self.world.first(write)
