"""The command `cips`: train, sample, info, data.

Exit status: 0; 1 where training diverged; 2 for what the user can put right, with one line on stderr; 128 +
the signal's number where training was told to stop (its checkpoint is written).
"""

from __future__ import annotations

import dataclasses
import sys
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .checkpoint import load_generator
from .data import command as data_command
from .errors import UsageError
from .generator import Generator, presets
from .pictures import image_grid, save_png, to_uint8
from .sampler import Sampler
from .training.config import DTYPES, TrainConfig


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    try:
        from jsonargparse import ArgumentError, ArgumentParser
    except ImportError:
        print(
            "cips: error: the command line needs jsonargparse; install the extra: pip install -e '.[train]'",
            file=sys.stderr,
        )
        return 2
    try:
        options = _parser(ArgumentParser).parse_args(arguments)
    except ArgumentError as error:
        print(f"cips: error: {' '.join(str(error).split())} (see cips --help)", file=sys.stderr)
        return 2
    name = options.pop("subcommand")
    command = {"train": _train, "sample": _sample, "info": _info, "data": data_command.run}[name]
    values = {key: value for key, value in vars(options[name]).items() if key != "config"}
    try:
        return command(**values)
    except UsageError as error:
        print(f"cips: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parser(kind: Any) -> Any:
    def command(usage: str, description: str) -> Any:
        return kind(prog="cips", usage=usage, description=description, exit_on_error=False)

    parser = command(
        "cips {train,sample,info,data} ...", "Train and sample generators with conditionally-independent pixels."
    )
    commands = parser.add_subcommands(dest="subcommand")

    train = command("cips train [options]", "Train a generator. First try: cips train --data earth --size 64")
    train.add_argument(
        "--config", action="config", help="JSON or YAML file of options, such as a run's config.json"
    )
    hints = typing.get_type_hints(TrainConfig)
    for field in dataclasses.fields(TrainConfig):
        # an option that may be left out is typed by what it holds when given: shorter messages
        kinds = [t for t in typing.get_args(hints[field.name]) if t is not type(None)] or [hints[field.name]]
        flags = dict.fromkeys((f"--{field.name.replace('_', '-')}", f"--{field.name}"))
        train.add_argument(*flags, type=kinds[0], default=field.default, help=field.metadata["help"])
    commands.add_subcommand("train", train, help="train a generator on images")

    sample = command(
        "cips sample CHECKPOINT [options]",
        "Draw images from a trained generator, as one grid or as a folder of PNGs.",
    )
    sample.add_argument("checkpoint", type=str, help="a generator.safetensors, or the folder of a run")
    sample.add_argument(
        "--out", type=str, default="samples.png", help="NAME.png for a grid, a folder for one PNG an image"
    )
    sample.add_argument("--count", type=int, default=36, help="number of images")
    sample.add_argument("--seed", type=int, default=0, help="of the latents and the noise")
    sample.add_argument(
        "--truncation", type=float, default=1.0, help="1: none; towards 0: towards the mean image"
    )
    sample.add_argument(
        "--size", type=int, default=None, help="pixels a side, by default as trained; larger: denser"
    )
    sample.add_argument("--noise", type=str, default="seed", help="'seed': noise from --seed; 'off'")
    sample.add_argument("--batch", type=int, default=16, help="images at a time")
    sample.add_argument(
        "--device", type=str, default="auto", help="'cuda', 'cpu', ...; 'auto' takes a GPU if there is one"
    )
    sample.add_argument("--dtype", type=str, default="float32", help=f"arithmetic: {' or '.join(DTYPES)}")
    commands.add_subcommand("sample", sample, help="draw images from a trained generator")

    info = command(
        "cips info MODEL", "Print layers, parameters and arithmetic of a preset or of a trained generator."
    )
    info.add_argument(
        "model", type=str, help=f"{', '.join(presets)}, a generator.safetensors, or the folder of a run"
    )
    commands.add_subcommand("info", info, help="print what a preset or checkpoint consists of")

    data = command(data_command.USAGE, data_command.DESCRIPTION)
    data_command.add_arguments(data)
    commands.add_subcommand("data", data, help="look through a set of images")
    return parser


def _train(**values: Any) -> int:
    from .training import DivergenceError, train

    try:
        result = train(TrainConfig(**values))
    except DivergenceError as error:
        print(f"cips: {error}", file=sys.stderr)
        return 1
    if result.stopped_by is not None:
        print(
            f"cips: stopped by {result.stopped_by.name} at step {result.step}, saved; --resume auto goes on",
            file=sys.stderr,
        )
        return 128 + result.stopped_by
    print(f"{result.folder}: {result.step} steps, {result.images_per_second:.1f} images/s")
    print(f"  last grid   {max((result.folder / 'samples').glob('fake-*.png'), default='none')}")
    print(f"  generator   {result.folder / 'generator.safetensors'}")
    return 0


@torch.no_grad()
def _sample(
    checkpoint: str,
    out: str,
    count: int,
    seed: int,
    truncation: float,
    size: int | None,
    noise: str,
    batch: int,
    device: str,
    dtype: str,
) -> int:
    from tqdm import tqdm

    for name, value in (("count", count), ("batch", batch), ("size", size)):
        if value is not None and value < 1:
            raise UsageError(f"{name}: expected an integer of at least 1, got {value}")
    if noise not in ("seed", "off"):
        raise UsageError(f"noise: expected 'seed' or 'off', got {noise!r}")
    if dtype not in DTYPES:
        raise UsageError(f"dtype: expected {' or '.join(DTYPES)}, got {dtype!r}")
    generator = load_generator(checkpoint, _device(device), dtype=DTYPES[dtype])
    random = torch.Generator().manual_seed(seed)
    latents = torch.randn(count, generator.config.style_dim, generator=random)
    grid = Path(out).suffix.lower() == ".png"
    parts = []
    batch = min(batch, count)
    sampler = Sampler(generator, batch, size=size)
    with tqdm(total=count, unit="image", delay=2, leave=False) as bar:
        for start in range(0, count, batch):
            z = latents[start : start + batch].to(generator.w_mean.device)
            wanted = len(z)
            z = torch.nn.functional.pad(z, (0, 0, 0, batch - wanted), value=1.0)  # the last batch may be short
            # each batch its own noise seed: noise is keyed by the image's place in its batch
            try:
                images = sampler(z, truncation=truncation, noise="off" if noise == "off" else seed + start)
            except torch.OutOfMemoryError as error:
                raise UsageError(
                    f"batch: {batch} images at a time do not fit the device's memory; try --batch 1"
                ) from error
            pixels = to_uint8(images[:wanted])
            if grid:
                parts.append(pixels)
            else:
                for k, image in enumerate(pixels, start):
                    save_png(Path(out) / f"{k:06d}.png", image)
            bar.update(len(pixels))
    if grid:
        save_png(out, image_grid(torch.cat(parts)))
    print(f"{out}: {count} images of {images.shape[2]}x{images.shape[3]} from {checkpoint}")
    return 0


def _info(model: str) -> int:
    if model in presets:
        with torch.device("meta"):
            generator = Generator(presets[model])
        title = f"preset {model}"
    elif Path(model).exists():
        generator, title = load_generator(model), model
    else:
        raise UsageError(
            f"model: expected {', '.join(presets)}, or the path of a generator; no such file: {model}"
        )
    config = generator.config
    parts = {
        "mapping": generator.mapping,
        "Fourier features": generator.encoding.fourier,
        "coordinate table": generator.encoding.table,
        "modulated layers": generator.synthesis.layers,
        "ToRGB": generator.synthesis.to_rgbs,
    }
    height, width = config.size
    counts = {name: sum(p.numel() for p in module.parameters()) for name, module in parts.items()}
    print(f"{title}: {height}x{width}, style {config.style_dim}, {config.mapping_layers} mapping layers")
    print(
        f"  layers      {generator.encoding.features} -> " + " -> ".join(str(n) for n in config.layer_widths)
    )
    print(f"  ToRGB after {', '.join(str(n + 1) for n in config.rgb_layers)}")
    for name, number in counts.items():
        print(f"  {name:17s} {number:>12,d} parameters")
    print(f"  {'all':17s} {sum(counts.values()):>12,d} parameters")
    print(f"  {config.flops() / 1e9:.4g} GFLOP an image, forward")
    return 0


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device: {name!r} cannot be used ({str(error).splitlines()[0]})") from error
    return name
