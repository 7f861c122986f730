"""`cips eval`: a trained generator measured against real images."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from torch import Tensor

from cips_kernels.encoding import LOOKUPS

from ..data import open_source
from ..errors import UsageError
from ..metrics import Evaluator, open_extractor, parse_metrics
from ..metrics.options import DEFAULT
from ..metrics.share import launched, rank_and_world
from ..sampler import Sampler
from .shared import Command, check_out, find_device, opened_any, usage_errors


def add(commands: Any, command: Command) -> None:
    parser = command(
        "cips eval CHECKPOINT DATA [options]",
        "Measure a generator against real images. Try: cips eval runs/earth-64 earth --count 5000. Several GPUs share the "
        "work under torchrun: torchrun --nproc-per-node 2 -m cips eval ...",
    )
    parser.add_argument(
        "checkpoint",
        type=str,
        help="a generator.safetensors, the folder of a run, one of its checkpoints/step-*.pt, or an official .pt",
    )
    parser.add_argument("data", type=str, help="real images: what cips train takes as --data")
    parser.add_argument("--metrics", type=str, default=DEFAULT, help=f"of {DEFAULT}")
    parser.add_argument(
        "--count", type=int, default=50_000, help="images to generate; all real ones are used"
    )
    parser.add_argument(
        "--extractor",
        type=str,
        default="auto",
        help="whose features are compared: 'effnet-lite0', carried by a package; 'inception' or another of torch-fidelity "
        "with --weights; 'module:Class'; 'auto': inception where --weights is given, else effnet-lite0",
    )
    parser.add_argument(
        "--weights", type=str, default=None, help="file of the extractor's weights; nothing is downloaded"
    )
    parser.add_argument("--out", type=str, default=None, help="NAME.json; by default beside the checkpoint")
    parser.add_argument("--seed", type=int, default=0, help="of the latents and the noise")
    parser.add_argument(
        "--truncation", "--psi", type=float, default=1.0, help="1: none; towards 0: towards the mean image"
    )
    parser.add_argument("--noise", type=str, default="seed", help="'seed': noise from --seed; 'off'")
    parser.add_argument(
        "--lookup",
        type=str,
        default="exact",
        help="of the table; 'compat': as the official code when evaluated",
    )
    parser.add_argument("--batch", type=int, default=16, help="images at a time")
    parser.add_argument(
        "--crop", type=str, default="centre", help="of real images, as in cips train; always the middle"
    )
    parser.add_argument(
        "--load-size", "--load_size", type=int, default=None, help="of real images, as in cips train"
    )
    parser.add_argument("--too-small", "--too_small", type=str, default="refuse", help="as in cips train")
    parser.add_argument(
        "--cache", type=str, default=None, help="folder of decoded images and features, as in cips train"
    )
    parser.add_argument("--workers", type=int, default=None, help="threads that decode images")
    parser.add_argument(
        "--device", type=str, default="auto", help="'cuda', 'cpu', ...; 'auto' takes a GPU if there is one"
    )
    parser.add_argument(
        "--dtype", type=str, default="float32", help="the generator's arithmetic: float32 or bfloat16"
    )
    commands.add_subcommand("eval", parser, help="measure a trained generator against real images")


def run(checkpoint: str, data: str, out: str | None, device: str, **options: Any) -> int:
    if out is not None:
        check_out(out, ".json")
    with launched(find_device(device)) as mine, usage_errors():
        return _run(checkpoint, data, out, mine, **options)


def _run(
    checkpoint: str,
    data: str,
    out: str | None,
    device: str,
    metrics: str,
    count: int,
    extractor: str,
    weights: str | None,
    seed: int,
    truncation: float,
    noise: str,
    lookup: str,
    batch: int,
    crop: str,
    load_size: int | None,
    too_small: str,
    cache: str | None,
    workers: int | None,
    dtype: str,
) -> int:
    first = rank_and_world()[0] == 0

    def say(text: str) -> None:
        if first:
            print(f"cips: {text}", file=sys.stderr, flush=True)

    for name, value in (("count", count), ("batch", batch)):
        if value < 1:
            raise UsageError(f"{name}: expected an integer of at least 1, got {value}")
    if noise not in ("seed", "off"):
        raise UsageError(f"noise: expected 'seed' or 'off', got {noise!r}")
    if lookup not in LOOKUPS:
        raise UsageError(f"lookup: expected {' or '.join(LOOKUPS)}, got {lookup!r}")
    wanted = parse_metrics(metrics)
    generator = opened_any(checkpoint, device, dtype)
    network = open_extractor(extractor, weights, wanted, device)
    source = open_source(
        data,
        generator.config.size,
        crop=crop,
        load_size=load_size,
        too_small=too_small,
        cache=cache,
        workers=workers,
        say=say,
    ).to(device)
    evaluator = Evaluator(
        source, network, wanted, count=count, batch=batch, seed=seed, cache=cache, say=say, progress=True
    )
    sampler = Sampler(generator, evaluator.batch, lookup=lookup)

    def draw(z: Tensor, noise_seed: int) -> Tensor:
        return sampler(z.to(device), truncation=truncation, noise=noise_seed if noise == "seed" else "off")

    result = evaluator(
        draw,
        generator.config.style_dim,
        checkpoint=checkpoint,
        truncation=truncation,
        noise=noise,
        lookup=lookup,
        dtype=dtype,
    )
    if first:
        path = Path(out) if out else _beside(checkpoint, source.name, network.label)
        result.save(path)
        print(f"{checkpoint}: {result.table()}\n{path}")
    return 0


def _beside(checkpoint: str, data: str, label: str) -> Path:
    path = Path(checkpoint)
    folder, stem = (path, "generator") if path.is_dir() else (path.parent, path.stem)
    return folder / re.sub(r"[^\w.-]", "-", f"{stem}-{data}-{label}.json")
