"""The command `cips`: train, sample, eval, info, convert, data, and the applications in `commands`.

Exit status: 0; 2 for what the user can put right and where training diverged, with one line on stderr; 128 +
the signal's number where training was told to stop (its checkpoint is written). Of several processes one prints.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
import sys
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .architectures import make_generator
from .averaged import is_training_state
from .checkpoint import atomic_file, load_generator, load_training, save_generator
from .commands import COMMANDS, evaluate, sample
from .commands.shared import OFFICIAL_SUFFIXES, is_official, open_generator
from .config import presets
from .data import command as data_command
from .errors import UsageError
from .generator import Generator
from .official import SINES
from .official_training import to_official_training
from .summary import summary
from .training.config import TrainConfig


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
    except UnicodeDecodeError as error:
        print(f"cips: error: config: expected a YAML or JSON file, got one that is no text ({error})", file=sys.stderr)
        return 2
    name = options.pop("subcommand")
    own = {"train": _train, "info": _info, "convert": _convert, "data": data_command.run}
    own |= {"sample": sample.run, "eval": evaluate.run}
    command = own.get(name) or COMMANDS[name].run
    values = {key: value for key, value in vars(options[name]).items() if key != "config"}
    try:
        return command(**values)
    except UsageError as error:
        if not error.quiet:
            print(f"cips: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parser(kind: Any) -> Any:
    def command(usage: str, description: str) -> Any:
        return kind(prog="cips", usage=usage, description=description, exit_on_error=False)

    parser = command(
        "cips COMMAND ...",
        "Train generators whose every pixel is computed on its own, and draw with them. Start with 'cips train --data "
        "earth --size 64', then 'cips sample runs/earth-64'; each other command takes the same runs/earth-64 and says "
        "more with --help, such as 'cips mix --help'.",
    )
    commands = parser.add_subcommands(dest="subcommand")

    train = command("cips train [options]", "Train a generator. First try: cips train --data earth --size 64")
    train.add_argument(
        "--config", action="config", help="YAML or JSON file of options, such as a run's config.yaml"
    )
    hints = typing.get_type_hints(TrainConfig)
    for field in dataclasses.fields(TrainConfig):
        # an option that may be left out is typed by what it holds when given: shorter messages
        kinds = [t for t in typing.get_args(hints[field.name]) if t is not type(None)] or [hints[field.name]]
        hint = functools.reduce(operator.or_, kinds)
        flags = dict.fromkeys((f"--{field.name.replace('_', '-')}", f"--{field.name}"))
        train.add_argument(*flags, type=hint, default=field.default, help=field.metadata["help"])
    commands.add_subcommand("train", train, help="train a generator on images")

    for application in (sample, *COMMANDS.values(), evaluate):
        application.add(commands, command)

    info = command(
        "cips info MODEL", "Print layers, parameters, arithmetic and memory of a preset or of a trained generator."
    )
    info.add_argument(
        "model",
        type=str,
        help=f"{', '.join(presets)}, a generator.safetensors, the folder of a run, or an official .pt",
    )
    commands.add_subcommand("info", info, help="print what a preset or checkpoint consists of")

    convert = command(
        "cips convert SOURCE OUT [options]",
        "Write a checkpoint of the official code as NAME.safetensors, or a generator of this package as an official NAME.pt. The"
        " state of a run (checkpoints/step-N.pt) becomes a whole official training checkpoint.",
    )
    convert.add_argument("source", type=str, help="an official .pt; or a generator.safetensors, the folder of a run or its checkpoints/step-N.pt")
    convert.add_argument("out", type=str, help="the file to write, NAME.safetensors or NAME.pt")
    convert.add_argument("--which", type=str, default=None, help="state dict of a training checkpoint; by default g_ema, or else g")
    convert.add_argument("--size", type=int, default=None, help="pixels a side where they are not the table's: 1024 for ffhq1024")
    convert.add_argument("--activation", type=str, default=None, help="'sin' or 'sinrelu' for a class with a sine, whose files do not tell which")
    commands.add_subcommand("convert", convert, help="official checkpoints to this package's format, or back")

    data = command(data_command.USAGE, data_command.DESCRIPTION)
    data_command.add_arguments(data)
    commands.add_subcommand("data", data, help="look through a set of images")
    return parser


def _train(**values: Any) -> int:
    from .training import DivergenceError, train

    try:
        result = train(TrainConfig(**values))
    except DivergenceError as error:
        if not error.quiet:
            print(f"cips: error: {error}", file=sys.stderr)
        return 2
    if result.stopped_by is not None:
        if result.rank == 0:
            print(
                f"cips: stopped by {result.stopped_by.name} at step {result.step}, saved; --resume auto goes on",
                file=sys.stderr,
            )
        return 128 + result.stopped_by
    if result.rank:
        return 0
    print(f"{result.folder}: {result.step} steps, {result.images_per_second:.1f} images/s")
    print(f"  last grid   {max((result.folder / 'samples').glob('fake-*.png'), default='none')}")
    print(f"  generator   {result.folder / 'generator.safetensors'}")
    return 0


def _info(model: str) -> int:
    if model in presets:
        with torch.device("meta"):
            generator = make_generator(model)
        title = f"preset {model}"
    elif Path(model).exists():
        generator, title = open_generator(model), model
        title += f" (official {_kind(generator)})" if is_official(model) else ""
    else:
        raise UsageError(
            f"model: expected {', '.join(presets)}, or the path of a generator; no such file: {model}"
        )
    print(summary(generator, title))
    return 0


def _convert(source: str, out: str, which: str | None, size: int | None, activation: str | None) -> int:
    if activation not in (None, *SINES):
        raise UsageError(f"activation: expected {' or '.join(SINES)}, got {activation!r}")
    if size is not None and size < 1:
        raise UsageError(f"size: expected an integer of at least 1, got {size}")
    if Path(out).suffix.lower() == ".pt" and Path(source).suffix.lower() in OFFICIAL_SUFFIXES and is_training_state(source):
        for name, value in (("which", which), ("size", size), ("activation", activation)):
            if value is not None:
                raise UsageError(f"{name}: expected none towards the official form, which has no place for it")
        state = to_official_training(source, load_training(source))
        with atomic_file(out) as file:
            torch.save(state, file)
        print(f"{out}: a training checkpoint of the official code, whose iteration it takes from the file's name")
        return 0
    ends = Path(source).suffix.lower() in OFFICIAL_SUFFIXES, Path(out).suffix.lower()
    if ends not in ((True, ".safetensors"), (False, ".pt")):
        raise UsageError(f"out: expected NAME{'.safetensors' if ends[0] else '.pt'} for what {source} becomes, got {out}")
    if ends[0]:
        generator = Generator.from_official(source, which=which, size=size, activation=activation)
        save_generator(out, generator, official=Path(source).name, official_lookup="compat")
        print(f"{out}: {_kind(generator)} of {source}; --lookup compat draws what the official code does when evaluated")
        return 0
    for name, value in (("which", which), ("size", size), ("activation", activation)):
        if value is not None:
            raise UsageError(f"{name}: expected none towards the official form, which has no place for it")
    generator = load_generator(source)
    if not isinstance(generator, Generator):
        raise UsageError(f"{source}: a StyleGAN2, for which there is no official form of CIPS")
    try:
        state = generator.to_official()
    except ValueError as error:
        raise UsageError(f"{source}: {error}") from error
    with atomic_file(out) as file:
        torch.save(state, file)
    print(f"{out}: {_kind(generator)}, a bare state dict")
    return 0


def _kind(generator: Generator) -> str:
    return "CIPSres" if generator.config.residual else "CIPSskip"
