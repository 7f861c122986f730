"""Everything that a training step changes, and the step itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint import load_state
from ..discriminator import Discriminator
from ..errors import UsageError
from ..generator import Generator
from .config import DTYPES, TrainConfig
from .ema import AveragedModel
from .losses import discriminator_loss, every_parameter, generator_loss, r1_penalty
from .mixing import StyleMixing
from .regimes import Sight

# What must agree between a checkpoint and the run that goes on from it. Everything else may change.
FIXED = ("data", "size", "batch", "seed", "flip", "preset", "width", "n_layers", "d_width")
FIXED += ("regime", "patch", "turn", "table_size", "fourier_bias")


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

    Args:
        config: resolved options. Weights are drawn from torch's global generator.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.device = torch.device(config.device)
        on_gpu = self.device.type == "cuda"
        # None: as the parameters, which are float32
        dtype = None if config.dtype == "float32" else DTYPES[config.dtype]
        self.generator = Generator(config.generator_config(), dtype=dtype, backend=config.backend).to(
            self.device
        )
        self.discriminator = Discriminator(config.discriminator_config(), dtype=dtype).to(self.device)
        self.discriminator.to(memory_format=torch.channels_last)
        assert config.ema_decay is not None, "resolve() fills it in"
        self.average = AveragedModel(self.generator, config.ema_decay)
        self.regime = config.make_regime(self.device)
        self.augment = config.make_augmentation().to(self.device)
        self.mixing = StyleMixing(self.generator.config, config.mixing, self.device) if config.mixing else None
        assert config.lr is not None and config.g_lazy_every is not None and config.r1_every is not None
        self.g_optimizer = lazy_adam(self.generator.parameters(), config.lr, config.g_lazy_every, on_gpu)
        d_every = config.r1_every if config.d_lazy else 0
        self.d_optimizer = lazy_adam(self.discriminator.parameters(), config.lr, d_every, on_gpu)
        self.step = 0

    def train_step(self, real: Tensor) -> dict[str, Tensor]:
        """One step of the discriminator, its R1 penalty where due, one step of the generator, one of the
        average.

        Args:
            real: `[B, 3, size, size]` in [-1, 1].

        Returns:
            0-d tensors on the device, detached: "d_loss", "g_loss", "real_logit", "fake_logit", and "r1"
            where due, "augment_p" with an adaptive augmentation. Nothing here makes the host wait for the device.
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

    def judge(self, images: Tensor) -> Tensor:
        """The discriminator's logits of images, augmented."""
        return self.discriminator(self.augment(images))

    def _discriminator_step(self, seen: Sight) -> dict[str, Tensor]:
        with torch.no_grad():
            fake = self.fakes(seen)
        self.discriminator.requires_grad_(True)
        fake_logits, real_logits = self.judge(fake), self.judge(seen.real)
        self.augment.observe(real_logits)
        loss = discriminator_loss(real_logits, fake_logits)
        _descend(self.d_optimizer, loss)
        return {
            "d_loss": loss.detach(),
            "real_logit": real_logits.detach().mean(),
            "fake_logit": fake_logits.detach().mean(),
        }

    def _r1_step(self, seen: Sight) -> Tensor:
        images = seen.real.detach().requires_grad_(True)
        penalty = r1_penalty(self.judge(images), images)
        # times r1_every: a penalty seen so seldom weighs as if it were seen at every step
        _descend(self.d_optimizer, self.config.r1 / 2 * penalty * self.config.r1_every + every_parameter(self.discriminator))
        return penalty.detach()

    def _generator_step(self, seen: Sight) -> Tensor:
        self.discriminator.requires_grad_(False)
        loss = generator_loss(self.judge(self.fakes(seen)))
        _descend(self.g_optimizer, loss)
        return loss.detach()

    def all_finite(self) -> bool:
        """Whether every parameter is finite. Waits for the device."""
        tensors = [*self.generator.parameters(), *self.discriminator.parameters()]
        return bool(torch.stack(torch._foreach_norm([t.detach() for t in tensors])).isfinite().all())

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers and strings from which `load_state_dict` makes the same state, RNG included."""
        cuda = torch.cuda.get_rng_state_all() if self.device.type == "cuda" else []
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
            "rng": {"cpu": torch.get_rng_state(), "cuda": cuda},
        }

    def load_state_dict(self, state: Mapping[str, Any], source: str) -> None:
        """Takes over a saved state; also sets torch's global generators.

        Args:
            state: from `state_dict`, read back from a file.
            source: the file's name, for messages.

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
            torch.set_rng_state(state["rng"]["cpu"])
            if self.device.type == "cuda" and len(state["rng"]["cuda"]) == torch.cuda.device_count():
                torch.cuda.set_rng_state_all(state["rng"]["cuda"])
        except KeyError as error:
            raise UsageError(f"{source}: key {error.args[0]!r} is missing") from error


def _descend(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()


def _plain(config: TrainConfig) -> dict[str, Any]:
    return dataclasses.asdict(config)
