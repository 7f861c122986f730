"""What is timed of the whole generator, from latents to images: the cases, their random parameters, their arithmetic.

`generator` is the paper's: mapping network, style affines, modulation, Fourier features and table of embeddings,
all layers with their noise, RGB skips; forward only, as in sampling. `generator-25%` draws a random quarter of the
same image's pixels, given as points. A `generator` at another size than its table's reads the table between its
entries; `generator-own-table` has an image as large and a table of that size. Every parameter is random, none zero: noise strengths and biases are seen in the image.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cases import DTYPES, FORWARD, GENERATOR, GENERATOR_ONLY
from cips import Generator, GeneratorConfig, grids, presets
from cips_kernels.backends import NAMES as BACKENDS

FOVEATED = GENERATOR + "-25%"
OWN_TABLE = GENERATOR + "-own-table"
SHARE = 4  # the foveated case draws one pixel in so many
OURS = ("triton", "cuda", "cpu", *GENERATOR_ONLY)
STRENGTH = ".noise_strength"


@dataclass(frozen=True)
class GeneratorCase:
    """One thing to time.

    Attributes:
        name: `GENERATOR`; `FOVEATED`, which draws a random quarter of the pixels; or `OWN_TABLE`, which tells a large
            image from a table of its size from one that is interpolated.
        config: the architecture, table included.
        batch: images.
        height, width: pixels of the full image.
        dtype: compute dtype.
        left_out: providers that are not timed here, though they could be, since time is short.
    """

    name: str
    config: GeneratorConfig
    batch: int
    height: int
    width: int
    dtype: torch.dtype
    left_out: tuple[str, ...] = ()

    @property
    def family(self) -> str:
        """Cases of one family take about equally long to compile."""
        return GENERATOR

    @property
    def pixels(self) -> int:
        """Pixels drawn of one image."""
        every = self.height * self.width
        return max(1, every // SHARE) if self.name == FOVEATED else every

    @property
    def widths(self) -> tuple[int, ...]:
        """`(I_0, O_0, ..., O_{L-1})`."""
        return self.config.fourier_features + self.config.table_features, *self.config.layer_widths

    @property
    def layers(self) -> int:
        """How many there are, ToRGBs left out."""
        return len(self.config.layer_widths)

    @property
    def on_table_grid(self) -> bool:
        """Whether the pixels are the table's own entries in their order: nothing to look up."""
        own = self.config.table_size or self.config.size
        return self.name != FOVEATED and (self.height, self.width) == own

    @property
    def dtype_name(self) -> str:
        """Such as `bfloat16`."""
        return str(self.dtype).removeprefix("torch.")

    def __str__(self) -> str:
        return f"{self.name}, {self.dtype_name}, {self.batch} x {self.height}x{self.width}"

    def flops(self, mode: str = FORWARD) -> int:
        """Floating-point operations of one call: those of the layers' and ToRGBs' products, as the package counts
        them. Mapping, modulation, encodings and activations count nothing."""
        if mode != FORWARD:
            raise ValueError(f"mode: expected {FORWARD}, got {mode!r}")
        return self.batch * self.config.flops(self.pixels)


@dataclass(frozen=True)
class GeneratorProblem:
    """Parameters and inputs of one case.

    Attributes:
        state: the parameters by their names in `cips.Generator`'s state dict, float32 (float64 where the case is).
        z: `[B, style_dim]`.
        coords: points `[P, 2]` for all images; None: the full grid.
        seed: of counter noise.
        run: what a provider made of it: noise (see `rivals.Noise`) -> image.
    """

    case: GeneratorCase
    state: dict[str, Tensor]
    z: Tensor
    coords: Tensor | None
    seed: int
    run: Callable[[Tensor | str | None], Tensor] | None = None

    @property
    def strengths(self) -> tuple[Tensor, ...]:
        """The layers' noise strengths."""
        return tuple(t for name, t in self.state.items() if name.endswith(STRENGTH))

    @property
    def result_bytes(self) -> int:
        """Of the image in float32, which peak memory leaves out."""
        return 12 * self.case.batch * self.case.pixels

    def points(self) -> Tensor:
        """Coordinates `[P, 2]` of every pixel drawn."""
        if self.coords is not None:
            return self.coords
        return grids.full(self.case.height, self.case.width, self.z.device).flatten(0, 1)

    def without_noise(self) -> GeneratorProblem:
        """The same with all noise strengths zero: whatever noise is drawn adds nothing."""
        changed = {k: torch.zeros_like(t) if k.endswith(STRENGTH) else t for k, t in self.state.items()}
        return dataclasses.replace(self, state=changed)


def configuration(
    size: tuple[int, int], channels: int = 512, layers: int | None = None, table: int | None = None
) -> GeneratorConfig:
    """The paper's architecture at a size (its table's, unless `table` names another), with all widths `channels`."""
    paper = presets["paper"]
    widths = ("style_dim", "fourier_features", "table_features", "width")
    return dataclasses.replace(
        paper,
        size=size,
        table_size=table,
        n_layers=layers or paper.n_layers,
        **dict.fromkeys(widths, channels),
    )


def plan(
    *,
    dtypes: Sequence[str],
    batches: Sequence[int],
    size: tuple[int, int],
    channels: int,
    layers: int,
    dense: bool,
    named: bool,
    cuda: bool,
) -> list[GeneratorCase]:
    """The cases to run, what matters most first.

    Args:
        dtypes, batches: names and numbers of images, in order; the points and the dense image take the first dtype.
        size, channels, layers: of the generator and its image.
        dense: with an image of four times the size on each side, one alone, from the same table and from one of its own.
        named: providers were asked for by name: none is left out.
        cuda: on a GPU.
    """
    config = configuration(size, channels, layers)
    # the oracle's own speed is nobody's question; on a CPU one compiled rival is what time allows
    slow = () if named else ("reference",) if cuda else ("reference", "grouped_conv_compiled")
    most, least = max(batches), min(batches)
    found: list[GeneratorCase] = []
    for dtype in dtypes:
        shape = dict(config=config, height=size[0], width=size[1], dtype=DTYPES[dtype], left_out=slow)
        fewer = ("grouped_conv_compiled",) if cuda else ("grouped_conv_compiled", "bmm_compiled")
        quarter = shape | {"left_out": () if named else (*slow, *fewer)}
        whole = [GeneratorCase(GENERATOR, batch=batch, **shape) for batch in batches]
        if dtype != dtypes[0]:
            found += whole
            continue
        points = [GeneratorCase(FOVEATED, batch=batch, **quarter) for batch in dict.fromkeys((most, least))]
        found += [*whole[:2], *points]
        if dense:
            rivals = () if named else ("reference", "bmm", "grouped_conv", "grouped_conv_compiled")
            large = shape | {"height": 4 * size[0], "width": 4 * size[1], "left_out": rivals}
            found.append(GeneratorCase(GENERATOR, batch=1, **large))
            rivals = () if named else ("reference", "grouped_conv", "grouped_conv_compiled", "bmm_compiled")
            large |= {"config": configuration((4 * size[0], 4 * size[1]), channels, layers), "left_out": rivals}
            found.append(GeneratorCase(OWN_TABLE, batch=1, **large))
        found += whole[2:]
    return found


def make_problem(case: GeneratorCase, device: torch.device, seed: int) -> GeneratorProblem:
    """Random parameters, latents and points of a case; the same seed gives the same on the same device."""
    draw = torch.Generator(device).manual_seed(seed)
    master = torch.float64 if case.dtype == torch.float64 else torch.float32

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float32, device=device).to(master)

    def uniform(bound: float, shape: torch.Size) -> Tensor:
        drawn = torch.rand(shape, generator=draw, dtype=torch.float32, device=device)
        return ((2 * drawn - 1) * bound).to(master)

    with torch.device("meta"):
        shapes = {name: t.shape for name, t in Generator(case.config).state_dict().items()}
    state: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        if name.startswith("encoding.fourier"):
            state[name] = uniform(math.sqrt(4.5) if name.endswith("weight") else math.sqrt(0.5), shape)
        elif name.startswith("mapping"):
            spread = 1.0 if name.endswith("weight") else 0.2
            state[name] = normal(*shape) * (spread / case.config.mapping_lr_mul)
        elif name.endswith("affine.weight"):
            state[name] = normal(*shape) * 0.5  # styles about 1, half of it their spread
        elif name.endswith("affine.bias"):
            state[name] = 1 + 0.1 * normal(*shape)
        elif name.endswith(STRENGTH):
            state[name] = 0.1 + 0.05 * normal(*shape)
        elif name.endswith(".bias"):
            state[name] = 0.2 * normal(*shape)
        else:
            state[name] = normal(*shape)
    z = normal(case.batch, case.config.style_dim)
    coords = None
    if case.name == FOVEATED:
        grid = grids.full(case.height, case.width, device).flatten(0, 1)
        coords = grid[torch.randperm(len(grid), generator=draw, device=device)[: case.pixels]].contiguous()
    return GeneratorProblem(case, state, z, coords, seed)


def is_ours(provider: str) -> bool:
    """Whether a provider is this package's."""
    return provider in BACKENDS or provider in GENERATOR_ONLY
