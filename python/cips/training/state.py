"""Everything that a training step changes, and the step itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..architectures import make_generator
from ..checkpoint import load_state
from ..discriminator import Discriminator
from ..errors import UsageError
from ..grids import full
from .config import DTYPES, TrainConfig
from .ema import AveragedModel
from .losses import discriminator_loss, every_parameter, generator_loss, r1_penalty
from .mixing import StyleMixing
from .regimes import Sight
from .world import World

# What must agree between a checkpoint and the run that goes on from it: the networks, and which images a step sees.
FIXED = (
    "data", "size", "batch", "seed", "flip", "rotate", "crop", "load_size", "too_small", "preset", "width", "n_layers",
    "architecture", "d_width", "d_coords", "regime", "patch", "turn", "table_size", "fourier_bias",
)  # fmt: skip
# What never alters what is learnt. Every other option may change too, and the run says so.
FREE = (
    "out", "resume", "init", "stages", "stage_table", "steps", "accumulate", "device", "backend", "save", "cuda_graphs", "cache",
    "workers", "samples", "log_every", "sample_every", "checkpoint_every", "keep", "keep_every", "eval_every",
    "eval_metrics", "eval_count", "eval_extractor", "eval_weights", "wandb",
)  # fmt: skip

Loss = Callable[[Sight], tuple[Tensor, dict[str, Tensor]]]


def lazy_adam(parameters: Any, lr: float, every: int, fused: bool) -> torch.optim.Adam:
    """Adam with betas (0, 0.99), corrected for a regulariser that steps the same optimiser every `every`
    steps.

    StyleGAN2's correction: c = every / (every + 1), learning rate c lr, betas to the power c; none for
    `every` = 0.
    """
    c = every / (every + 1) if every else 1.0
    # 0.0, not 0: recent PyTorch refuses betas of different types
    # capturable: the count of steps lies on the device, so that a step can be part of a CUDA graph
    return torch.optim.Adam(
        parameters, lr=lr * c, betas=(0.0, 0.99**c), eps=1e-8, fused=fused, foreach=not fused, capturable=fused
    )


class TrainingState:
    """Generator, discriminator, averaged generator, both optimisers and the count of steps.

    With several processes each has all of it, and the same bits of it: they start from the weights of process 0
    (`replicate`) and every step sums their gradients. The sum is our own and not that of DistributedDataParallel: R1 leaves some
    parameters without a gradient in some steps, the discriminator runs twice before its backward, and a step must be
    the same inside a CUDA graph; each of these needs another exception there. Nothing is lost by it: the fused stack's
    gradients all arrive at once, at the end of its backward.

    Args:
        config: resolved options. Weights are drawn from torch's global generator.
        world: the processes of the run; None: this one alone.
    """

    def __init__(self, config: TrainConfig, world: World | None = None) -> None:
        self.config, self.world = config, world or World()
        self.device = torch.device(config.device)
        on_gpu = self.device.type == "cuda"
        # None: as the parameters, which are float32
        dtype = None if config.dtype == "float32" else DTYPES[config.dtype]
        model = config.generator_config()
        self.generator = make_generator(model, dtype=dtype, backend=config.backend, save=config.save).to(self.device)
        self.discriminator = Discriminator(config.discriminator_config(), dtype=dtype).to(self.device)
        self.discriminator.to(memory_format=torch.channels_last)
        assert config.ema_decay is not None, "resolve() fills it in"
        self.average = AveragedModel(self.generator, config.ema_decay)
        self.regime = config.make_regime(self.device)
        self.grid = full(*self.regime.seen, self.device) if config.d_coords else None
        self.augment = config.make_augmentation().to(self.device)
        self.mixing = StyleMixing(self.generator.config, config.mixing, self.device) if config.mixing else None
        assert config.lr is not None and config.g_lazy_every is not None and config.r1_every is not None
        self.g_optimizer = lazy_adam(self.generator.parameters(), config.lr, config.g_lazy_every, on_gpu)
        d_every = config.r1_every if config.d_lazy else 0
        self.d_optimizer = lazy_adam(self.discriminator.parameters(), config.lr, d_every, on_gpu)
        self.step = 0

    def replicate(self) -> None:
        """Gives every process the weights of process 0."""
        for module in (self.generator, self.discriminator, self.average.module):
            self.world.copy_from_first_([*module.parameters(), *module.buffers()])

    def seed_random(self, seed: int, step: int = 0) -> None:
        """Seeds torch's global generators: of process 0 with `seed`, of the others with a mixture of it and their
        rank; at a later `step`, where a run goes on with other processes than before, with a mixture of all three.
        """
        if self.world.rank or step:
            words = np.random.SeedSequence((seed, self.world.rank, step)).generate_state(1, np.uint64)
            seed = int(words[0] >> np.uint64(1))
        torch.manual_seed(seed)

    def train_step(self, real: Tensor) -> dict[str, Tensor]:
        """One step of the discriminator, its R1 penalty where due, one step of the generator, one of the
        average.

        Args:
            real: `[B, 3, size, size]` in [-1, 1]: of the batch of images of the step, every `world.size`-th.

        Returns:
            0-d tensors on the device, detached, means over `real`: "d_loss", "g_loss", "real_logit", "fake_logit",
            "r1" where due, "augment_p" with an adaptive augmentation. Nothing here makes the host wait for the device.
        """
        seen = self.regime(real)
        metrics = self._discriminator_step(seen)
        if self.penalty_due():
            metrics["r1"] = self._r1_step(seen)
        metrics["g_loss"] = self._generator_step(seen)
        probability = self.augment.adapted()
        if probability is not None:
            metrics["augment_p"] = probability
        self.average.update()
        self.step += 1
        return metrics

    def penalty_due(self) -> bool:
        """Whether the coming step has an R1 penalty."""
        return bool(self.config.r1_every and self.config.r1 and self.step % self.config.r1_every == 0)

    def latents(self, count: int) -> Tensor:
        """`[count, style_dim]` ~ N(0, 1) from torch's global generator of the device."""
        return torch.randn(count, self.generator.config.style_dim, device=self.device)

    def fakes(self, seen: Sight) -> Tensor:
        """Images, or what a regime sees of them, from new latents: as many as there are real ones."""
        config, coords = self.config, seen.coords
        # the official code reads the table itself for whole images and interpolates, as its eval mode does, otherwise
        lookup = "exact" if coords is None else config.lookup
        how = {"noise": "fresh" if config.noise else "off", "lookup": lookup}
        if self.mixing is None:
            return self.generator(self.latents(len(seen)), coords, **how)
        w = self.generator.styles(self.latents(2 * len(seen)))
        return self.generator(self.mixing(*w.chunk(2)), coords, input_is_w=True, **how)

    def with_coords(self, images: Tensor, seen: Sight) -> Tensor:
        """What the discriminator is shown of images `[B, 3, h, w]`: themselves, or with `d_coords` each pixel's (x, y) as
        two more channels, the same for real and generated ones.
        """
        if self.grid is None:
            return images
        coords = self.grid if seen.coords is None else seen.coords
        planes = coords.movedim(-1, -3).to(images.dtype).expand(len(images), -1, -1, -1)
        return torch.cat((images, planes), 1)

    def judge(self, images: Tensor) -> Tensor:
        """The discriminator's logits of what it is shown, augmented."""
        return self.discriminator(self.augment(images))

    def _discriminator_step(self, seen: Sight) -> dict[str, Tensor]:
        self.discriminator.requires_grad_(True)
        judged: list[Tensor] = []

        def loss_of(seen: Sight) -> tuple[Tensor, dict[str, Tensor]]:
            with torch.no_grad():
                fake = self.with_coords(self.fakes(seen), seen)
            fake_logits, real_logits = self.judge(fake), self.judge(self.with_coords(seen.real, seen))
            judged.append(real_logits.detach())
            loss = discriminator_loss(real_logits, fake_logits)
            return loss, {"d_loss": loss, "real_logit": real_logits.mean(), "fake_logit": fake_logits.mean()}

        values = self._descend(self.d_optimizer, seen, loss_of)
        self.augment.observe(torch.cat(judged))
        return values

    def _r1_step(self, seen: Sight) -> Tensor:
        def loss_of(seen: Sight) -> tuple[Tensor, dict[str, Tensor]]:
            # coordinates included, as in the official code
            images = self.with_coords(seen.real, seen).detach().requires_grad_(True)
            penalty = r1_penalty(self.judge(images), images)
            # times r1_every: a penalty seen so seldom weighs as if it were seen at every step
            weighed = self.config.r1 / 2 * penalty * self.config.r1_every
            return weighed + every_parameter(self.discriminator), {"r1": penalty}

        return self._descend(self.d_optimizer, seen, loss_of)["r1"]

    def _generator_step(self, seen: Sight) -> Tensor:
        self.discriminator.requires_grad_(False)

        def loss_of(seen: Sight) -> tuple[Tensor, dict[str, Tensor]]:
            loss = generator_loss(self.judge(self.with_coords(self.fakes(seen), seen)))
            return loss, {"g_loss": loss}

        return self._descend(self.g_optimizer, seen, loss_of, self.generator)["g_loss"]

    def _descend(
        self, optimizer: torch.optim.Optimizer, seen: Sight, loss_of: Loss, tracked: nn.Module | None = None
    ) -> dict[str, Tensor]:
        """One step down the mean over all processes and parts of a loss.

        Part k holds the images k, k + parts, ...: with the images of a process chosen in the same way, the groups of
        the minibatch deviation are those of the whole batch, as long as a part holds whole groups.

        Args:
            optimizer: its parameters' gradients are made anew.
            seen: the images of this process.
            loss_of: loss of a part of them (a mean over images), and values to keep.
            tracked: its floating-point buffers (running means) become means over processes.

        Returns:
            The values, detached, as means over this process's parts.
        """
        parts = self.config.accumulate
        optimizer.zero_grad(set_to_none=True)
        values: list[dict[str, Tensor]] = []
        for k in range(parts):
            loss, kept = loss_of(seen[k::parts] if parts > 1 else seen)
            # divided before the backward, so that a sum over parts and processes is the mean
            (loss / (parts * self.world.size)).backward()
            values.append({name: value.detach() for name, value in kept.items()})
        if self.world.size > 1:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            buffers = [b for b in tracked.buffers() if b.is_floating_point()] if tracked is not None else []
            for buffer in buffers:
                buffer.mul_(1 / self.world.size)
            # which parameters have none depends on the loss alone, so it is the same on every process
            self.world.sum_([p.grad for p in parameters if p.grad is not None] + buffers)
        optimizer.step()
        if parts == 1:
            return values[0]
        return {name: torch.stack([each[name] for each in values]).mean() for name in values[0]}

    def all_finite(self) -> bool:
        """Whether every parameter is finite. Waits for the device."""
        tensors = [*self.generator.parameters(), *self.discriminator.parameters()]
        return bool(torch.stack(torch._foreach_norm([t.detach() for t in tensors])).isfinite().all())

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers and strings from which `load_state_dict` makes the same state, RNG of every process
        included: all of them must call it.
        """
        # of the own device alone: asking for all would begin to use the other processes'
        device = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        return {
            "config": _plain(self.config),
            "generator_config": self.generator.config.to_dict(),
            "discriminator_config": self.discriminator.config.to_dict(),
            "step": self.step,
            "generator": self.generator.state_dict(),
            "discriminator": self.discriminator.state_dict(),
            "average": self.average.module.state_dict(),
            "augment": self.augment.state_dict(),
            "g_optimizer": self.g_optimizer.state_dict(),
            "d_optimizer": self.d_optimizer.state_dict(),
            "rng": self.world.gather({"cpu": torch.get_rng_state(), "device": device}),
        }

    def load_state_dict(self, state: Mapping[str, Any], source: str) -> list[str]:
        """Takes over a saved state; also sets torch's global generators.

        Args:
            state: from `state_dict`, read back from a file.
            source: the file's name, for messages.

        Returns:
            Lines about what is not as it was: options that alter what is learnt, the number of processes.

        Raises:
            UsageError: it belongs to other options, or a key is missing, extra or misshapen.
        """
        now, then = _plain(self.config), state.get("config", {})
        differ = [
            f"{name} was {then.get(name)!r}, now {now[name]!r}"
            for name in FIXED
            if then.get(name, now[name]) != now[name]
        ]
        if differ:
            raise UsageError(f"{source}: belongs to a run with other options: {'; '.join(differ)}")
        changed = [n for n in now if n not in (*FIXED, *FREE) and n in then and then[n] != now[n]]
        notes = [f"{name} was {then[name]!r}, from here on {now[name]!r}" for name in changed]
        try:
            modules: dict[str, nn.Module] = {
                "generator": self.generator,
                "discriminator": self.discriminator,
                "average": self.average.module,
            }
            for name, module in modules.items():
                load_state(f"{source}: {name}", module, state[name])
            # of another augmentation nothing is taken over: the option may change
            if state.get("augment", {}).keys() == self.augment.state_dict().keys():
                load_state(f"{source}: augment", self.augment, state.get("augment", {}))
            for name, optimizer in (("g_optimizer", self.g_optimizer), ("d_optimizer", self.d_optimizer)):
                # moments come from the file, settings (learning rate, fused) from this run
                settings = optimizer.state_dict()["param_groups"]
                optimizer.load_state_dict({"state": state[name]["state"], "param_groups": settings})
            self.step = int(state["step"])
            states = state["rng"]
            on_gpu = self.device.type == "cuda"
            if len(states) == self.world.size and (states[0]["device"] is not None) == on_gpu:
                mine = states[self.world.rank]
                torch.set_rng_state(mine["cpu"])
                if on_gpu:
                    torch.cuda.set_rng_state(mine["device"], self.device)
            else:
                self.seed_random(self.config.seed, self.step)
                kind = f"{self.world.size} processes on {self.device.type}"
                notes.append(f"was {len(states)} processes, from here on {kind}: latents and noise are drawn anew")
        except KeyError as error:
            raise UsageError(f"{source}: key {error.args[0]!r} is missing") from error
        return notes


def _plain(config: TrainConfig) -> dict[str, Any]:
    return dataclasses.asdict(config)
