"""The options of a training run. Each is an option of `cips train` with the help text given here."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..config import DiscriminatorConfig, GeneratorConfig, presets
from ..data import Preparation, data_name
from ..errors import UsageError
from ..metrics.options import parse_metrics
from ..stylegan2_config import StyleGAN2Config

AUTO = "auto"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def option(default: Any, text: str) -> Any:
    """A dataclass field with a help text."""
    return dataclasses.field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Defaults:
    """What a preset trains with where nothing else is said."""

    batch: int
    steps: int
    d_width: float
    ema_decay: float
    log_every: int
    sample_every: int
    checkpoint_every: int


_FULL_SIZE = Defaults(
    batch=32,
    steps=100_000,
    d_width=1.0,
    ema_decay=0.5 ** (32 / 10_000),  # the official one
    log_every=50,
    sample_every=500,
    checkpoint_every=2000,
)
PRESET_DEFAULTS = {
    **dict.fromkeys(("paper", "official", "base", "ne", "no-fourier", "residual", "sine", "stylegan2"), _FULL_SIZE),
    "small": Defaults(
        batch=16,
        steps=1000,
        d_width=1 / 32,
        ema_decay=0.99,  # of a run this short the official average would still show the beginning
        log_every=10,
        sample_every=50,
        checkpoint_every=200,
    ),
}


def check_watching(config: TrainConfig) -> None:
    """Raise UsageError for options of measuring and reporting that cannot be."""
    for name, low in (("eval_every", 0), ("eval_count", 1)):
        value = getattr(config, name)
        if value is not None and value < low:
            raise UsageError(f"{name}: expected an integer of at least {low}, got {value}")
    if config.eval_metrics is not None:
        parse_metrics(config.eval_metrics)  # raises


@dataclass(frozen=True)
class TrainConfig:
    """Options of a run; `resolve` fills in those left to the device and the preset ("auto" or None)."""

    data: str = option(
        "earth", "'earth' (built-in satellite images), or the path of a folder, zip, LMDB or WebDataset shards"
    )
    size: int = option(64, "height and width of the images, a power of two")
    out: str | None = option(None, "folder of the run; by default runs/DATA-SIZE")
    resume: str = option(
        "never", "'auto': go on from the run's last whole checkpoint; or the path of one; 'never'"
    )
    steps: int | None = option(None, "training steps in all; by default as the preset says")
    batch: int | None = option(
        None, "images a step, of all processes and parts together; by default as the preset says"
    )
    accumulate: int = option(
        1, "parts of a process's images that are computed one after the other, for less memory: the gradient is the same"
    )
    preset: str = option(
        AUTO, f"generator: {', '.join(presets)}; 'auto' takes paper on a GPU and small on a CPU"
    )
    width: int | None = option(None, "channels of every generator layer, instead of the preset's")
    n_layers: int | None = option(None, "number of generator layers, instead of the preset's")
    table_init_std: float | None = option(
        None, "deviation with which the coordinate table starts, instead of the preset's"
    )
    d_width: float | None = option(
        None, "multiplier on the discriminator's channels, at most 512; 1 is StyleGAN2's"
    )
    device: str = option(AUTO, "'cuda', 'cpu', ...; 'auto' takes a GPU if there is one")
    dtype: str = option(AUTO, "arithmetic: 'float32' or 'bfloat16'; 'auto' takes bfloat16 on a GPU")
    backend: str = option(AUTO, "of the fused stack, see python -m cips_kernels.env")
    cuda_graphs: bool = option(True, "replay steps as CUDA graphs (on a GPU; the host is then never in the way)")
    seed: int = option(0, "of the weights, the latents, the noise and the order of the data")
    flip: bool = option(True, "mirror half of the real images")
    rotate: bool = option(False, "turn real images by random quarters; for satellite pictures")
    crop: str = option("centre", "what is cut out of a larger image: its 'centre', or another part each time: 'random'")
    load_size: int | None = option(
        None, "scale shorter sides down to this first; by default to the size, or for random crops not at all"
    )
    too_small: str = option("refuse", "images smaller than the size: 'refuse', 'skip' or 'enlarge' them")
    cache: str | None = option(
        None, "folder of decoded images, by default $CIPS_CACHE or ~/.cache/cips; 'off': decode at every start"
    )
    workers: int | None = option(None, "threads that decode images; by default one a processor")
    lr: float = option(0.002, "learning rate of Adam before the correction for lazy regularisation")
    g_lazy_every: int = option(
        4, "correct the generator's Adam as if regularised every so many steps (official); 0: do not"
    )
    r1: float = option(10.0, "weight of the R1 penalty")
    r1_every: int = option(16, "steps between R1 penalties; 0: none")
    ema_decay: float | None = option(None, "of the averaged generator, a step; by default as the preset says")
    samples: int = option(36, "images on a sample grid")
    log_every: int | None = option(None, "steps between log entries")
    sample_every: int | None = option(None, "steps between sample grids; 0: only at the end")
    checkpoint_every: int | None = option(None, "steps between checkpoints; 0: only at the end")
    keep: int = option(2, "newest checkpoints to keep")
    keep_every: int = option(0, "keep the checkpoints of multiples of so many steps as well; 0: none")
    eval_every: int | None = option(
        None, "steps between measurements against the data, needs the extra [metrics]; by default, and with 0, none"
    )
    eval_metrics: str | None = option(None, "what is measured, of fid,kid,precision,recall,is; by default fid")
    eval_count: int | None = option(None, "images generated for a measurement, by default 5000; all real ones are used")
    eval_extractor: str = option(AUTO, "whose features are compared, see cips eval --help")
    eval_weights: str | None = option(None, "file of the extractor's weights, such as Inception's")
    wandb: str | None = option(None, "project of Weights & Biases to report to, needs the package wandb")

    def __post_init__(self) -> None:
        positive = ("batch", "width", "n_layers", "samples", "log_every", "keep", "workers", "accumulate")
        not_negative = ("steps", "g_lazy_every", "r1_every", "sample_every", "checkpoint_every", "seed", "keep_every")
        for name in positive + not_negative:
            value, low = getattr(self, name), int(name in positive)
            if value is not None and value < low:
                raise UsageError(f"{name}: expected an integer of at least {low}, got {value}")
        for name, allowed, ok in (
            ("lr", "above 0", self.lr > 0),
            ("r1", "of at least 0", self.r1 >= 0),
            ("ema_decay", "from 0 to below 1", self.ema_decay is None or 0 <= self.ema_decay < 1),
            ("d_width", "above 0", self.d_width is None or self.d_width > 0),
            ("table_init_std", "of at least 0", self.table_init_std is None or self.table_init_std >= 0),
        ):
            if not ok:
                raise UsageError(f"{name}: expected a number {allowed}, got {getattr(self, name)}")
        if self.size < 8 or self.size & (self.size - 1):
            raise UsageError(f"size: expected a power of two of at least 8, got {self.size}")
        Preparation(self.size, self.crop, self.load_size, self.too_small)  # raises
        if self.preset not in (AUTO, *presets):
            raise UsageError(f"preset: expected auto, {' or '.join(presets)}, got {self.preset!r}")
        if self.dtype not in (AUTO, *DTYPES):
            raise UsageError(f"dtype: expected auto, {' or '.join(DTYPES)}, got {self.dtype!r}")
        check_watching(self)

    def resolve(self, saved: Mapping[str, Any] | None = None) -> TrainConfig:
        """The same with every "auto" and None replaced.

        Args:
            saved: a checkpoint's resolved options; what was left open is taken from it (but the device is
                chosen here).

        Raises:
            UsageError: a device that is not there.
        """
        if saved is not None:
            here = ("device", "dtype", "out", "backend", "cuda_graphs", "cache", "workers")
            names = [field.name for field in dataclasses.fields(self) if field.name not in here]
            taken = {n: saved[n] for n in names if getattr(self, n) in (None, AUTO) and n in saved}
            return dataclasses.replace(self, **taken).resolve()
        device = self.device
        if device == AUTO:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            kind = torch.device(device).type
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise UsageError(f"device: {device!r} cannot be used ({str(error).splitlines()[0]})") from error
        preset = self.preset if self.preset != AUTO else ("paper" if kind == "cuda" else "small")
        defaults = PRESET_DEFAULTS[preset]
        filled = {n: v for n, v in dataclasses.asdict(defaults).items() if getattr(self, n) is None}
        dtype = self.dtype if self.dtype != AUTO else ("bfloat16" if kind == "cuda" else "float32")
        out = self.out or f"runs/{data_name(self.data)}-{self.size}"
        return dataclasses.replace(self, **filled, device=device, preset=preset, dtype=dtype, out=out)

    def generator_config(self) -> GeneratorConfig | StyleGAN2Config:
        """The generator's architecture (of resolved options)."""
        config = dataclasses.replace(presets[self.preset], size=(self.size, self.size))
        names = ("width", "n_layers", "table_init_std")
        changes = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        fields = {field.name for field in dataclasses.fields(config)}
        for name in changes:
            if name not in fields:
                raise UsageError(f"{name}: expected none with preset {self.preset!r}, which has no such thing")
        for name in ("width", "n_layers"):
            if name in changes and getattr(config, "widths", None) is not None:
                raise UsageError(f"{name}: expected none with preset {self.preset!r}, whose layers have widths of their own")
        try:
            return dataclasses.replace(config, **changes)
        except ValueError as error:
            raise UsageError(str(error)) from error

    def discriminator_config(self) -> DiscriminatorConfig:
        """The discriminator's architecture (of resolved options)."""
        assert self.d_width is not None, "resolve() fills it in"
        return DiscriminatorConfig(size=self.size, width=self.d_width)
