"""A training iteration written as the published code does it, with PyTorch's own operators, and the parts of any.

Generator: planes, one grouped convolution a layer, everything in float32 (TF32 where a GPU has it). Discriminator:
planes, every factor applied where the published code applies it, bias, activation and gain as separate
operations, the filter as weighted sums of the padded image's shifts, rows and then columns: as a depthwise convolution,
or as the published native fallback has it, its second derivative, which R1 needs, takes seconds. Adam as PyTorch comes, an average a parameter at a
time.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import generator_rivals
from cips import Discriminator, Generator, grids
from cips.training.losses import discriminator_loss, generator_loss, r1_penalty
from generator_rivals import Layers, Network
from rivals import GAIN, SLOPE, Noise


@contextmanager
def tf32(allowed: bool = True) -> Iterator[None]:
    """Within the block float32 products and convolutions are TF32, as they were by default in the published code's day,
    or, for `allowed=False`, none is."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


class PublishedGenerator(nn.Module):
    """`generator`'s parameters, copied, in the published formulation; only stacks without residual blocks."""

    def __init__(self, generator: Generator) -> None:
        super().__init__()
        self.config = generator.config
        if self.config.blocks:
            raise ValueError("generator: expected one without residual blocks")
        own = {name: nn.Parameter(p.detach().clone()) for name, p in generator.named_parameters()}
        planes = own["encoding.table.weight"].detach().permute(2, 0, 1)[None].contiguous()
        own["encoding.table.weight"] = nn.Parameter(planes)
        self.named = own
        self.listed = nn.ParameterList(own.values())
        height, width = self.config.size
        grid = grids.full(height, width, device=planes.device)
        self.coords = grid.permute(2, 0, 1)[None].contiguous().to(planes.dtype)

    def _pairs(self, names: list[str]) -> tuple[tuple[Tensor, Tensor], ...]:
        return tuple((self.named[f"{name}.weight"], self.named[f"{name}.bias"]) for name in names)

    def network(self) -> Network:
        """The parameters as `generator_rivals` takes them."""
        named, config = self.named, self.config
        layers = [f"synthesis.layers.{k}" for k in range(len(config.layer_widths))]
        rgbs = [f"synthesis.to_rgbs.{k}" for k in range(len(config.rgb_layers))]
        stack = Layers(
            tuple(named[f"{name}.weight"] for name in layers),
            tuple(named[f"{name}.bias"] for name in layers),
            tuple(named[f"{name}.noise_strength"] for name in layers),
            tuple(named[f"{name}.weight"] for name in rgbs),
            tuple(named[f"{name}.bias"] for name in rgbs),
        )
        return Network(
            self._pairs([f"mapping.{k + 1}" for k in range(config.mapping_layers)]),
            self._pairs([f"{name}.affine" for name in (*layers, *rgbs)]),
            (named["encoding.fourier.weight"], named["encoding.fourier.bias"]),
            named["encoding.table.weight"],
            self.coords,
            stack,
        )

    def forward(self, z: Tensor, noise: Noise = "fresh") -> Tensor:
        """`z [B, D]` -> `[B, 3, H, W]`."""
        config = self.config
        return generator_rivals.grouped_conv(
            self.network(), z, z.dtype, tuple(config.rgb_layers), config.mapping_lr_mul, True, False, noise
        )


class PublishedDiscriminator(nn.Module):
    """`discriminator`'s parameters, copied, in the published formulation and in planes."""

    def __init__(self, discriminator: Discriminator) -> None:
        super().__init__()
        self.parts = copy.deepcopy(discriminator).to(memory_format=torch.contiguous_format)

    @staticmethod
    def _blur(x: Tensor, padding: int) -> Tensor:
        x = F.pad(x, (padding,) * 4)
        for dim in (2, 3):
            count = x.shape[dim] - 3
            first, second, third, fourth = (x.narrow(dim, k, count) for k in range(4))
            x = torch.add((first + fourth) / 8, second + third, alpha=3 / 8)
        return x

    @staticmethod
    def _conv(x: Tensor, layer: nn.Module, stride: int = 1, padding: int = 0) -> Tensor:
        weight = layer.weight * (1 / math.sqrt(layer.weight[0].numel()))
        return F.conv2d(x, weight, stride=stride, padding=padding)

    @staticmethod
    def _activate(x: Tensor, bias: Tensor) -> Tensor:
        return F.leaky_relu(x + bias[:, None, None], SLOPE) * GAIN

    def forward(self, images: Tensor) -> Tensor:
        """`[B, 3, size, size]` -> logits `[B]`."""
        d = self.parts
        x = self._activate(self._conv(images, d.from_rgb), d.from_rgb.bias)
        for block in d.blocks:
            y = self._activate(self._conv(x, block.conv1, padding=1), block.conv1.bias)
            y = self._activate(self._conv(self._blur(y, 2), block.conv2, stride=2), block.conv2.bias)
            x = (y + self._conv(self._blur(x, 1), block.skip, stride=2)) / math.sqrt(2)
        batch, _, height, width = x.shape
        group = min(batch, 4)
        deviation = (x.view(group, -1, *x.shape[1:]).var(0, correction=0) + 1e-8).sqrt().mean((1, 2, 3))
        deviation = deviation.view(-1, 1, 1, 1).repeat(group, 1, height, width)
        x = self._activate(self._conv(torch.cat((x, deviation), 1), d.final_conv, padding=1), d.final_conv.bias)
        first, last = d.final_linear
        x = F.linear(x.flatten(1), first.weight * (1 / math.sqrt(first.weight.shape[1])), first.bias)
        x = F.leaky_relu(x, SLOPE) * GAIN
        return F.linear(x, last.weight * (1 / math.sqrt(last.weight.shape[1])), last.bias).squeeze(1)


@dataclass
class Parts:
    """The steps of an iteration over any generator and discriminator, in the trainer's order."""

    generator: nn.Module
    discriminator: nn.Module
    g_optimizer: torch.optim.Optimizer
    d_optimizer: torch.optim.Optimizer
    style_dim: int
    r1: float
    r1_every: int

    def _latents(self, real: Tensor) -> Tensor:
        return torch.randn(len(real), self.style_dim, device=real.device)

    def _descend(self, optimizer: torch.optim.Optimizer, loss: Tensor) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.detach()

    def d_step(self, real: Tensor) -> Tensor:
        """The logistic loss on a real and a fake batch."""
        with torch.no_grad():
            fake = self.generator(self._latents(real))
        self.discriminator.requires_grad_(True)
        return self._descend(self.d_optimizer, discriminator_loss(self.discriminator(real), self.discriminator(fake)))

    def r1_step(self, real: Tensor) -> Tensor:
        """The gradient penalty on the real batch, a step of its own."""
        self.discriminator.requires_grad_(True)
        images = real.detach().requires_grad_(True)
        penalty = r1_penalty(self.discriminator(images), images)
        return self._descend(self.d_optimizer, self.r1 / 2 * penalty * self.r1_every)

    def g_step(self, real: Tensor) -> Tensor:
        """The logistic loss of fresh fakes."""
        self.discriminator.requires_grad_(False)
        return self._descend(self.g_optimizer, generator_loss(self.discriminator(self.generator(self._latents(real)))))


class PublishedIteration(Parts):
    """The whole of it from copies of a generator and a discriminator, with its average."""

    def __init__(self, generator: Generator, discriminator: Discriminator, r1: float, r1_every: int, decay: float) -> None:
        planes, judge = PublishedGenerator(generator), PublishedDiscriminator(discriminator)
        optimizers = [
            torch.optim.Adam(module.parameters(), lr=0.002 * c, betas=(0.0, 0.99**c))
            for module, c in ((planes, 4 / 5), (judge, r1_every / (r1_every + 1)))
        ]
        super().__init__(planes, judge, *optimizers, generator.config.style_dim, r1, r1_every)
        self.decay = decay
        self.average = [p.detach().clone() for p in planes.parameters()]

    def d_step(self, real: Tensor) -> Tensor:
        with tf32():
            return super().d_step(real)

    def r1_step(self, real: Tensor) -> Tensor:
        with tf32():
            return super().r1_step(real)

    def g_step(self, real: Tensor) -> Tensor:
        with tf32():
            return super().g_step(real)

    def iteration(self, real: Tensor, penalty: bool) -> None:
        """One training iteration, with or without the R1 step."""
        self.d_step(real)
        if penalty:
            self.r1_step(real)
        self.g_step(real)
        with torch.no_grad():
            for mine, theirs in zip(self.average, self.generator.parameters()):
                mine.mul_(self.decay).add_(theirs, alpha=1 - self.decay)
