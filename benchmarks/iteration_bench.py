"""Times a training iteration and its parts, ours beside the published formulation and beside PyTorch's own operators.

    python benchmarks/iteration_bench.py --budget 150       # on a GPU: 256x256, 16 images, the paper's generator
    python benchmarks/iteration_bench.py --device cpu --preset small --size 16 --batch 2 --d-width 0.05

Providers take turns (see `measure`), medians are told, a provider that misses its check is not timed. What is measured:

    discriminator    forward and backward to every parameter: `published` (TF32), `depthwise` (bfloat16, channels-last, the
                     filter as a depthwise convolution), the same compiled, `ours`, and `ours` in a CUDA graph
    r1               forward, gradient to the images, its derivative to every parameter
    block            conv1's tail, filter and conv2 forward and backward: `ours`, `depthwise`, and `folded`, the filter
                     multiplied into a 6x6 convolution of stride 2
    filter           bias, activation and filter forward and backward: `ours`, `depthwise`
    d_step, r1_step, g_step, iteration, iteration_r1      of the trainer (`ours`, also as CUDA graphs) and `published`

The line at the end is the whole iteration with R1 in every 16th: images a second of each, and their ratio.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "python"), str(ROOT / "benchmarks")]

import environment  # noqa: E402

environment.prepare()

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import machine  # noqa: E402
from cips.discriminator import Blur, Discriminator  # noqa: E402
from cips.layers import EqualConv2d  # noqa: E402
from cips.training import TrainConfig  # noqa: E402
from cips.training.graphs import GraphedSteps  # noqa: E402
from cips.training.losses import r1_penalty  # noqa: E402
from cips.training.state import TrainingState  # noqa: E402
from cips_kernels import filters, use_backend  # noqa: E402
from cips_kernels.testing import EAGER_FACTOR, relative_error  # noqa: E402
from iteration_rivals import Parts, PublishedDiscriminator, PublishedIteration, tf32  # noqa: E402
from iteration_session import Session, reference, release, say  # noqa: E402
from measure import Entry, captured  # noqa: E402

IMAGE_ERROR = 0.05  # of a bfloat16 generator beside the published one in TF32; 0.01 was measured
COMPILING = 75.0  # seconds that compiling the discriminator takes with its backward


# --- the whole iteration --------------------------------------------------------------------------------------------


def training_state(session: Session) -> TrainingState:
    """The trainer's state, as `cips train` makes it."""
    o = session.options
    config = TrainConfig(
        size=o.size, batch=o.batch, preset=o.preset, d_width=o.d_width, device=str(session.device), dtype=o.dtype,
        width=o.width, n_layers=o.layers, seed=o.seed, recipe="official",
    )  # fmt: skip
    torch.manual_seed(o.seed)
    return TrainingState(config.resolve())


def check_iteration(state: TrainingState, published: PublishedIteration, real: Tensor) -> dict[str, float]:
    """Relative errors of the trainer's images and logits beside the published formulation, from the same parameters.

    Raises:
        RuntimeError: they differ by more than bfloat16 explains.
    """
    z = torch.randn(min(4, len(real)), state.generator.config.style_dim, device=real.device)
    with torch.no_grad(), tf32():
        image_error = relative_error(state.generator(z, noise="off"), published.generator(z, noise=None))
        logit_error = relative_error(state.discriminator(real), published.discriminator(real))
    if not max(image_error, logit_error / 4) < IMAGE_ERROR:
        raise RuntimeError(f"ours differs from the published formulation: images {image_error:.1e}, logits {logit_error:.1e}")
    return {"ours": image_error, "ours, logits": logit_error}


def forced(state: TrainingState, step: Callable[[Tensor], object], real: Tensor, penalty: bool) -> Callable[[], object]:
    """A trainer's step with or without the R1 penalty, whatever its number."""

    def run() -> object:
        state.step = 0 if penalty else 1
        return step(real)

    return run


def iteration(session: Session, real: Tensor) -> None:
    """The parts and the whole, the trainer's beside the published."""
    state = training_state(session)
    c = state.config
    published = PublishedIteration(state.generator, state.discriminator, c.r1, c.r1_every, float(c.ema_decay or 0))
    errors = check_iteration(state, published, real)
    ours = Parts(
        state.generator, state.discriminator, state.g_optimizer, state.d_optimizer,
        state.generator.config.style_dim, c.r1, c.r1_every,
    )  # fmt: skip
    entries = []
    for name, parts in (("published", published), ("ours", ours)):
        for part in ("d_step", "r1_step", "g_step"):
            entries.append(Entry(f"{name}/{part}", functools.partial(getattr(parts, part), real)))
    for case, penalty in (("iteration", False), ("iteration_r1", True)):
        entries.append(Entry(f"published/{case}", functools.partial(published.iteration, real, penalty)))
        entries.append(Entry(f"ours/{case}", forced(state, state.train_step, real, penalty)))
    session.measure("iteration", entries, errors)
    if session.clock.cuda:
        # after the others: what graphs hold beside the published iteration is more than 80 GB
        del entries, published, ours
        release(session.device)
        entries = []
        try:
            graphed = GraphedSteps(state)
            for case, penalty in (("iteration", False), ("iteration_r1", True)):
                call = forced(state, graphed, real, penalty)
                for _ in range(4):  # warm-up, capture, replay
                    call()
                entries.append(Entry(f"ours+graph/{case}", call))
        except RuntimeError as error:
            session.leave_out("iteration", "ours+graph", str(error).splitlines()[0])
        session.measure("iteration", entries, errors)
    if not state.all_finite():
        raise RuntimeError("a weight of ours is no longer finite")


def summary(rows: Sequence[dict], batch: int, every: int = 16) -> dict[str, dict[str, float]]:
    """Images a second with R1 in every 16th iteration, and the ratio to the published formulation, by provider."""
    ms = {(row["provider"], row["case"]): row["ms"] for row in rows}
    found = {}
    for provider in ("published", "ours", "ours+graph"):
        plain, penalised = ms.get((provider, "iteration")), ms.get((provider, "iteration_r1"))
        if plain is not None and penalised is not None:
            mean = ((every - 1) * plain + penalised) / every
            found[provider] = {"ms": mean, "images_per_second": batch / mean * 1e3}
    for values in found.values():
        if "published" in found:
            values["ratio"] = found["published"]["ms"] / values["ms"]
    return found


# --- the discriminator ----------------------------------------------------------------------------------------------


def gradients(d: nn.Module, images: Tensor) -> list[Tensor]:
    """Forward, and backward to every parameter."""
    return list(torch.autograd.grad(F.softplus(-d(images)).mean(), list(d.parameters())))


def r1_gradients(d: nn.Module, images: Tensor) -> list[Tensor]:
    """The penalty's gradient to every parameter that has one."""
    images = images.detach().requires_grad_(True)
    found = torch.autograd.grad(r1_penalty(d(images), images), list(d.parameters()), allow_unused=True)
    return [g for g in found if g is not None]


def make_discriminator(session: Session) -> Discriminator:
    o = session.options
    config = TrainConfig(size=o.size, preset=o.preset, d_width=o.d_width, device=str(session.device)).resolve()
    torch.manual_seed(o.seed)
    d = Discriminator(config.discriminator_config(), dtype=session.dtype).to(session.device)
    return d.to(memory_format=torch.channels_last)


def discriminator(session: Session, real: Tensor) -> None:
    """Forward and backward of the whole network, then with R1."""
    d = make_discriminator(session)
    published = PublishedDiscriminator(d)
    few = real[: min(len(real), 4)]
    # float32 is exact enough beside bfloat16, and takes a tenth of the time that a GPU has for float64
    wide = torch.float32 if session.dtype == torch.bfloat16 else torch.float64
    exact = PublishedDiscriminator(d).to(wide)
    for case, compute in (("discriminator", gradients), ("r1", r1_gradients)):

        def in_tf32(compute: Callable = compute) -> object:
            with tf32():
                return compute(published, real)

        with tf32(False):
            truth = compute(exact, few.to(wide))
        with use_backend("reference"):
            errors = {"depthwise": relative_error(compute(d, few), truth)}
        errors["ours"] = relative_error(compute(d, few), truth)
        release(session.device)
        entries = [
            Entry("published", in_tf32),
            Entry("depthwise", reference(functools.partial(compute, d, real))),
        ]
        allowed = EAGER_FACTOR * max(errors["depthwise"], torch.finfo(session.dtype).eps)
        if errors["ours"] <= allowed:
            call = functools.partial(compute, d, real)
            entries.append(Entry("ours", call))
            if session.clock.cuda:
                try:
                    graph = captured([call])
                    graph.name = "ours+graph"
                    entries.append(graph)
                except RuntimeError as error:
                    session.leave_out(case, "ours+graph", str(error).splitlines()[0])
        else:
            session.leave_out(case, "ours", f"check failed: error {errors['ours']:.1e}, allowed {allowed:.1e}")
        # the later cases need their time, too
        if case == "discriminator" and session.options.compile:
            if session.left() > COMPILING + 0.35 * session.options.budget:
                call = reference(functools.partial(gradients, torch.compile(d), real))
                try:
                    call()
                    entries.append(Entry("depthwise_compiled", call))
                except Exception as error:  # a compiler that is not there, or that fails: the others go on
                    session.leave_out(case, "depthwise_compiled", f"{type(error).__name__}: {str(error).splitlines()[0]}")
            else:
                session.leave_out(case, "depthwise_compiled", "compiling it does not fit the time budget")
        session.measure(case, entries, errors)
        del entries
        release(session.device)


def block(session: Session) -> None:
    """The filter before a stride: by itself, and with the convolution behind it."""
    o = session.options
    d = make_discriminator(session)
    first = d.blocks[0]
    channels = first.conv1.weight.shape[0]
    shape = (o.batch, channels, o.size, o.size)
    y = torch.randn(shape, device=session.device).to(session.dtype).contiguous(memory_format=torch.channels_last)
    y.requires_grad_(True)
    conv: EqualConv2d = first.conv2
    bias = first.conv1.scaled_bias().detach().normal_().requires_grad_(True)
    filtered = Blur(2).to(session.device)
    taps = filtered.kernel

    def ours() -> Tensor:
        return filters.blur(y, bias, padding=2, negative_slope=0.2)

    def depthwise() -> Tensor:
        with use_backend("reference"):
            return filtered(F.leaky_relu(y + bias.to(y.dtype)[:, None, None], 0.2))

    def folded() -> Tensor:
        # the filter is symmetric, so correlating the weight with it convolves the two
        weight = F.conv2d(conv.weight.flatten(0, 1)[:, None], taps, padding=3).unflatten(0, conv.weight.shape[:2])
        weight = (weight[:, :, 0] * conv.scale).to(y.dtype).contiguous(memory_format=torch.channels_last)
        z = F.conv2d(filters.bias_lrelu(y, bias), weight, stride=2, padding=2)
        return filters.bias_lrelu(z, conv.scaled_bias())

    leaves = [y, bias]
    # the same in another order: within a few roundings of each other, TF32's on a GPU even in float32
    rounding = torch.finfo(torch.bfloat16 if session.clock.cuda else session.dtype).eps

    def backward(call: Callable[[], Tensor], leaves: Sequence[Tensor], gradient: Tensor) -> Callable[[], object]:
        return lambda: torch.autograd.grad(call(), leaves, gradient)

    cases: dict[str, tuple[dict[str, Callable[[], Tensor]], list[Tensor]]] = {
        "filter": ({"depthwise": depthwise, "ours": ours}, leaves),
        "block": (
            {"depthwise": lambda: conv(depthwise()), "ours": lambda: conv(ours()), "folded": folded},
            [*leaves, conv.weight],
        ),
    }
    for case, (calls, wanted) in cases.items():
        results = {name: call() for name, call in calls.items()}
        gradient = torch.randn_like(results["ours"])
        errors = {name: relative_error(result, results["depthwise"]) for name, result in results.items()}
        entries = []
        for name, call in calls.items():
            if errors[name] <= 8 * rounding:
                entries.append(Entry(name, backward(call, wanted, gradient)))
            else:
                session.leave_out(case, name, f"check failed: {errors[name]:.1e} from depthwise")
        del results
        session.measure(case, entries, errors)
    elements = math.prod(shape)
    for row in session.rows:
        if row["case"] == "filter" and row["provider"] == "ours":
            # forward: read y, write; backward: read the gradient and y, write; and read that for the bias
            row["gb_per_s"] = 6 * elements * y.element_size() / row["ms"] * 1e-6


# --- command line ---------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--budget", type=float, default=150.0, help="seconds in all (default: 150)")
    found.add_argument("--batch", type=int, default=16, help="images (default: 16)")
    found.add_argument("--size", type=int, default=256, help="pixels, a power of two (default: 256)")
    found.add_argument("--preset", default="paper", help="the generator (default: paper)")
    found.add_argument("--width", type=int, default=None, help="of the generator's layers (default: the preset's)")
    found.add_argument("--layers", type=int, default=None, help="of the generator (default: the preset's)")
    found.add_argument("--d-width", type=float, default=1.0, help="factor on the discriminator's channels (default: 1)")
    found.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    found.add_argument("--dtype", default=None, help="bfloat16 or float32 (default: bfloat16 on a GPU)")
    found.add_argument("--rounds", type=int, default=20, help="most samples of a provider (default: 20)")
    found.add_argument("--cases", default="iteration,discriminator,block", help="of these, joined by commas")
    found.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=None, help="the compiled rival, too (on a GPU)"
    )
    found.add_argument("--seed", type=int, default=0, help="of all random tensors")
    found.add_argument("--out", type=Path, default=machine.RESULTS, help="folder for the results file")
    return found


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Checked options; exits with status 2 on a bad one, as argparse does."""
    command = parser()
    options = command.parse_args(arguments)
    cuda = options.device.startswith("cuda")
    options.dtype = options.dtype or ("bfloat16" if cuda else "float32")
    options.compile = cuda if options.compile is None else options.compile
    options.cases = [case.strip() for case in options.cases.split(",") if case.strip()]
    for name in ("batch", "rounds"):
        if getattr(options, name) < 1:
            command.error(f"--{name}: expected an integer of at least 1, got {getattr(options, name)}")
    if options.batch > 4 and options.batch % 4:
        command.error(f"--batch: expected a multiple of 4, or at most 4, got {options.batch}")
    if not 0 < options.budget < math.inf:
        command.error(f"--budget: expected seconds above 0, got {options.budget}")
    if options.dtype not in ("bfloat16", "float32"):
        command.error(f"--dtype: expected bfloat16 or float32, got {options.dtype!r}")
    for case in options.cases:
        if case not in ("iteration", "discriminator", "block"):
            command.error(f"--cases: expected some of iteration, discriminator, block, got {case!r}")
    if cuda and not torch.cuda.is_available():
        command.error("--device: there is no CUDA device here")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: 0, 1 where a check failed, or 2 for a bad argument."""
    options = parse(arguments)
    device = torch.device(options.device)
    session = Session(options, device)
    torch.backends.cudnn.benchmark = True  # as the trainer sets it
    head = machine.describe(device)
    say(f"{head['device']}, torch {head['torch']}, triton {head['triton']}, commit {str(head['commit'])[:12]}")
    random = torch.Generator().manual_seed(options.seed)
    real = torch.rand(options.batch, 3, options.size, options.size, generator=random).mul_(2).sub_(1).to(device)
    failed = False
    runs = {"iteration": lambda: iteration(session, real), "discriminator": lambda: discriminator(session, real)}
    for case in options.cases:
        try:
            runs.get(case, lambda: block(session))()
        except (RuntimeError, ValueError) as error:
            session.leave_out(case, "all", f"{type(error).__name__}: {str(error).splitlines()[0]}")
            failed = True
        release(device)
    whole = summary(session.rows, options.batch)
    results = head | {
        "seconds": round(time.perf_counter() - session.began, 1),
        "options": {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()},
        "summary": whole,
        "rows": session.rows,
        "left_out": session.left_out,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{machine.slug(str(head['device']))}{machine.ITERATION}.json"
    machine.replace(path, json.dumps(results, indent=1) + "\n")
    for provider, values in whole.items():
        print(f"{provider}: {values['ms']:.1f} ms an iteration, {values['images_per_second']:.1f} images/s, "
              f"{values.get('ratio', math.nan):.2f}x published")  # fmt: skip
    print(f"{path} written, {results['seconds']:.0f} s")
    return 1 if failed or any("check failed" in item["reason"] for item in session.left_out) else 0


if __name__ == "__main__":
    sys.exit(main())
