"""The options of a training run. Each is an option of `cips train` with the help text given here."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from cips_kernels.encoding import LOOKUPS

from ..config import DiscriminatorConfig, GeneratorConfig, presets
from ..data import Preparation, data_name
from ..errors import UsageError
from ..grids import parse_size
from ..metrics.options import parse_metrics
from ..stylegan2_config import StyleGAN2Config
from .augmentation import AUGMENTATIONS, Augmentation, make_augmentation, parse_kinds
from .recipes import AUTO, PRESET_DEFAULTS, RECIPES
from .regimes import REGIMES, Cylinder, FullImage, Patches, Regime, check_patch, parse_stages

SAVES = ("all", "some", "none")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def option(default: Any, text: str) -> Any:
    """A dataclass field with a help text."""
    return dataclasses.field(default=default, metadata={"help": text})


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
    size: int | str = option(64, "pixels a side of the images, a power of two; or HEIGHTxWIDTH")
    out: str | None = option(None, "folder of the run; by default runs/DATA-SIZE")
    resume: str = option(
        "never", "'auto': go on from the run's last whole checkpoint; or the path of one; 'never'"
    )
    init: str | None = option(
        None,
        "checkpoint, or folder of a run, whose networks a new run starts from; its images may have been smaller."
        " Or a training checkpoint of the official code",
    )
    stages: str | None = option(
        None, "sizes that a run goes through and the steps of each: '256:100000,512:50000,1024:50000'; instead of size and steps"
    )
    stage_table: str = option(
        "keep", "the coordinate table in later stages: 'keep' its points, or 'grow' them with the image"
    )
    regime: str = option(
        "full", "what the discriminator sees: the 'full' image, a 'patch' of it, or crops of a 'cylinder' for panoramas"
    )
    patch: int | None = option(None, "with regime patch: pixels a side of it, K, a power of two")
    dilation: int | str = option(1, "with regime patch: pixels between those of a patch, sigma; or several: '1,2,4'")
    turn: int | None = option(None, "with regime cylinder: columns of a full turn; by default 4 images' width")
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
    table_size: int | str | None = option(
        None, "points a side of the coordinate table, or ROWSxCOLUMNS, where it is not to be as large as the image"
    )
    fourier_bias: bool | None = option(
        None, "whether the Fourier features have a bias, as in the official code but not in the paper's formula"
    )
    table_init_std: float | None = option(
        None, "deviation with which the coordinate table starts, instead of the preset's"
    )
    architecture: str | None = option(
        None, "the generator instead of the preset's, as JSON without its size; --init OFFICIAL.pt with preset auto fills it in"
    )
    d_width: float | None = option(
        None, "multiplier on the discriminator's channels, at most 512; 1 is StyleGAN2's"
    )
    d_coords: bool | None = option(
        None, "show the discriminator each pixel's (x, y) beside its colours, as the official code does without --img2dis; by default not"
    )
    device: str = option(AUTO, "'cuda', 'cpu', ...; 'auto' takes a GPU if there is one")
    dtype: str = option(AUTO, "arithmetic: 'float32' or 'bfloat16'; 'auto' takes bfloat16 on a GPU")
    backend: str = option(AUTO, "of the fused stack, see python -m cips_kernels.env")
    save: str = option(
        "all", "what the generator keeps for its backward: 'all' outputs, 'some' (of half of the images), or 'none' for large images, at a third more time"
    )
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
    recipe: str = option(
        AUTO, "how to train where no option says: as in the 'paper' or in the 'official' code; 'auto': as the preset"
    )
    lr: float | None = option(
        None, "learning rate of Adam before the correction for lazy regularisation; by default 0.002"
    )
    g_lazy_every: int | None = option(
        None, "correct the generator's Adam as if regularised every so many steps; 0: do not. Paper: 0, official: 4"
    )
    d_lazy: bool | None = option(
        None, "correct the discriminator's Adam for penalties every r1_every steps. Paper: false, official: true"
    )
    r1: float | None = option(None, "weight of the R1 penalty; by default 10")
    r1_every: int | None = option(None, "steps between R1 penalties; 0: none; by default 16")
    ema_decay: float | None = option(
        None, "of the averaged generator, a step. Paper: a half-life of 10,000 images, official: of 312.5 steps"
    )
    noise: bool = option(True, "noise in every layer while training")
    mixing: float = option(0.0, "probability of style mixing for each image; paper and official: 0")
    lookup: str | None = option(
        None, "how the averaged generator and patches read the table: 'exact' or 'compat'. Paper: exact, official: compat"
    )
    augment: str = option("none", "change what the discriminator sees at random: 'none', 'diffaug' or 'ada'")
    augment_kinds: str | None = option(
        None,
        "kinds of change: some of 'colour,translation,cutout' (diffaug; by default all), of"
        " 'blit,geometry,colour,filter,noise,cutout' (ada; by default the first three), or a set as the paper of ada names it: 'bgcfnc'",
    )
    ada_target: float = option(0.6, "with ada: mean sign of the real logits that its probability keeps up")
    ada_images: float = option(500_000, "with ada: real images within which its probability may go from 0 to 1")
    ada_p: float | None = option(None, "with ada: a fixed probability instead of an adaptive one")
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
        positive = ("patch", "turn", "batch", "width", "n_layers", "samples", "log_every", "keep", "workers", "accumulate")
        not_negative = ("steps", "g_lazy_every", "r1_every", "sample_every", "checkpoint_every", "seed", "keep_every")
        for name in positive + not_negative:
            value, low = getattr(self, name), int(name in positive)
            if value is not None and value < low:
                raise UsageError(f"{name}: expected an integer of at least {low}, got {value}")
        for name, allowed, ok in (
            ("lr", "above 0", self.lr is None or self.lr > 0),
            ("r1", "of at least 0", self.r1 is None or self.r1 >= 0),
            ("mixing", "from 0 to 1", 0 <= self.mixing <= 1),
            ("ada_target", "from -1 to 1", -1 <= self.ada_target <= 1),
            ("ada_images", "above 0", self.ada_images > 0),
            ("ada_p", "from 0 to 1", self.ada_p is None or 0 <= self.ada_p <= 1),
            ("ema_decay", "from 0 to below 1", self.ema_decay is None or 0 <= self.ema_decay < 1),
            ("d_width", "above 0", self.d_width is None or self.d_width > 0),
            ("table_init_std", "of at least 0", self.table_init_std is None or self.table_init_std >= 0),
        ):
            if not ok:
                raise UsageError(f"{name}: expected a number {allowed}, got {getattr(self, name)}")
        for name, value, allowed in (
            ("preset", self.preset, (AUTO, *presets)),
            ("dtype", self.dtype, (AUTO, *DTYPES)),
            ("recipe", self.recipe, (AUTO, *RECIPES)),
            ("regime", self.regime, REGIMES),
            ("stage_table", self.stage_table, ("keep", "grow")),
            ("augment", self.augment, tuple(AUGMENTATIONS)),
            ("lookup", self.lookup, (None, *LOOKUPS)),
            ("save", self.save, SAVES),
        ):
            if value not in allowed:
                names = " or ".join(map(str, (n for n in allowed if n not in (AUTO, None))))
                raise UsageError(f"{name}: expected {'auto, ' if AUTO in allowed else ''}{names}, got {value!r}")
        try:
            height, width = parse_size(self.size)
            if self.table_size is not None:
                parse_size(self.table_size, "table_size")
            self.check_sizes()
        except UsageError:
            raise
        except ValueError as error:
            raise UsageError(str(error)) from error
        # squares by a number alone: one spelling of each size
        object.__setattr__(self, "size", height if height == width else f"{height}x{width}")
        self.sigmas()
        self.kinds()
        check_watching(self)

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width)."""
        return parse_size(self.size)

    def check_sizes(self) -> None:
        """Raise ValueError where size, patch, turn, stages, crops and the other options do not fit each other."""
        height, width = size = self.image_size
        DiscriminatorConfig(size)
        Preparation(size, self.crop, self.load_size, self.too_small)
        if self.rotate and height != width:
            raise UsageError(f"rotate: expected square images to turn by quarters, got size {self.size}")
        for name, regime in (("patch", "patch"), ("turn", "cylinder")):
            if getattr(self, name) is not None and self.regime != regime:
                raise UsageError(f"{name}: expected none with regime {self.regime}; it is for regime {regime}")
        if self.sigmas() != (1,) and self.regime != "patch":
            raise UsageError(f"dilation: expected 1 with regime {self.regime}, got {self.dilation!r}")
        if self.regime == "patch":
            if self.patch is None:
                raise UsageError("patch: expected the pixels a side of a patch with regime patch, got none")
            if self.patch < 8 or self.patch & (self.patch - 1):
                raise UsageError(f"patch: expected a power of two of at least 8, got {self.patch}")
            if self.stages is None:
                check_patch(size, self.patch, self.sigmas())
        if self.d_coords and self.augment != "none":
            raise UsageError(f"augment: expected none with d_coords, whose coordinates would not move along, got {self.augment!r}")
        if self.turn is not None and self.turn < width and self.stages is None:
            raise UsageError(f"turn: expected at least the image's width of {width} columns, got {self.turn}")
        if self.stages is not None:
            parse_stages(self.stages)

    def sigmas(self) -> tuple[int, ...]:
        """Dilations of patches to choose from."""
        parts = [part.strip() for part in str(self.dilation).split(",")]
        if not all(part.isascii() and part.isdecimal() and int(part) > 0 for part in parts):
            raise UsageError(f"dilation: expected integers of at least 1, as in '1,2,4', got {self.dilation!r}")
        return tuple(map(int, parts))

    def kinds(self) -> tuple[str, ...]:
        """Kinds of augmentation."""
        return parse_kinds(self.augment, self.augment_kinds)

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
        recipe_name = self.recipe if self.recipe != AUTO else defaults.recipe
        recipe = RECIPES[recipe_name]
        by_default = {**dataclasses.asdict(recipe), "ema_decay": recipe.ema_decay(self.batch or defaults.batch)}
        for name, value in dataclasses.asdict(defaults).items():
            # what the preset says goes before what its recipe says, but not before one that was asked for
            if value is not None and (self.recipe == AUTO or name not in by_default):
                by_default[name] = value
        by_default |= {"recipe": recipe_name, "d_coords": False}
        names = {field.name for field in dataclasses.fields(self)}
        filled = {n: v for n, v in by_default.items() if n in names and getattr(self, n) in (None, AUTO)}
        if self.regime == "cylinder" and self.turn is None:
            filled["turn"] = 4 * self.image_size[1]
        dtype = self.dtype if self.dtype != AUTO else ("bfloat16" if kind == "cuda" else "float32")
        out = self.out or f"runs/{data_name(self.data)}-{self.size}"
        return dataclasses.replace(self, **filled, device=device, preset=preset, dtype=dtype, out=out)

    def generator_config(self) -> GeneratorConfig | StyleGAN2Config:
        """The generator's architecture (of resolved options)."""
        config = dataclasses.replace(self._base(), size=self.image_size)
        names = ("width", "n_layers", "table_init_std", "fourier_bias")
        changes = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if self.table_size is not None and parse_size(self.table_size) != self.image_size:
            changes["table_size"] = parse_size(self.table_size)
        fields = {field.name for field in dataclasses.fields(config)}
        for name in changes:
            if name not in fields:
                raise UsageError(f"{name}: expected none with preset {self.preset!r}, which has no such thing")
        if self.save != "all" and isinstance(config, StyleGAN2Config):
            raise UsageError(f"save: expected 'all' with preset {self.preset!r}, whose layers keep everything")
        for name in ("width", "n_layers"):
            if name in changes and getattr(config, "widths", None) is not None:
                raise UsageError(f"{name}: expected none with preset {self.preset!r}, whose layers have widths of their own")
        try:
            return dataclasses.replace(config, **changes)
        except ValueError as error:
            raise UsageError(str(error)) from error

    def _base(self) -> GeneratorConfig | StyleGAN2Config:
        if self.architecture is None:
            return presets[self.preset]
        try:
            return GeneratorConfig.from_dict(json.loads(self.architecture))
        except (TypeError, ValueError) as error:
            raise UsageError(f"architecture: {error}") from error

    def discriminator_config(self) -> DiscriminatorConfig:
        """The discriminator's architecture (of resolved options)."""
        assert self.d_width is not None, "resolve() fills it in"
        seen = self.image_size if self.regime != "patch" else (self.patch, self.patch)
        return DiscriminatorConfig(size=seen, in_channels=5 if self.d_coords else 3, width=self.d_width)

    def make_regime(self, device: torch.device) -> Regime:
        """What the discriminator sees (of resolved options)."""
        if self.regime == "patch" and (self.patch, self.patch) != self.image_size:
            return Patches(self.image_size, self.patch, self.sigmas(), device)
        if self.regime == "cylinder":
            return Cylinder(self.image_size, self.turn, device)
        return FullImage(self.image_size, device)

    def make_augmentation(self) -> Augmentation:
        """How what it sees is changed (of resolved options)."""
        return make_augmentation(
            self.augment, self.kinds(), target=self.ada_target, images=self.ada_images, fixed=self.ada_p
        )
