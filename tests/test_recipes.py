"""Training as the paper writes and as the official code does: twenty steps against the steps written out in PyTorch.

Networks, losses, penalty, optimisers, average and order of the steps are those of the official code's description; only the
random numbers (latents, noise) are taken from the package, so that both sides see the same.
"""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cips import Discriminator, Generator, grids
from cips.training import TrainConfig
from cips.training.recipes import PRESET_DEFAULTS, RECIPES
from cips.training.state import TrainingState
from cips_kernels.noise import normal
from official_formulas import OfficialGenerator, full_grid
from test_official_discriminator import make, official_logits

SIZE, BATCH, DIM, STEPS = 16, 4, 16, 20

# (G's learning rate, its beta_2, D's, its beta_2), as numbers and not as the package computes them
ADAM = {
    "paper": (0.002, 0.99, 0.002, 0.99),
    "official": (0.0016, 0.99**0.8, 0.0018823529411764706, 0.99 ** (16 / 17)),
}
# the official average is for 8 x 4 images whatever the batch; StyleGAN2's half-life is 10,000 images
DECAY = {"paper": 0.5 ** (BATCH / 10_000), "official": 0.5 ** (32 / 10_000)}


class OfficialSteps:
    """The official training loop, with `--img2dis` where the discriminator has three channels and without where it has five."""

    def __init__(self, recipe: str, generator: OfficialGenerator, discriminator: dict[str, torch.Tensor]) -> None:
        self.img2dis = discriminator["convs.0.0.weight"].shape[1] == 3
        self.g = generator.train()
        # pairs, since of a mapping the keys would be sorted
        self.d = nn.ParameterDict([(k.replace(".", "/"), v.clone()) for k, v in discriminator.items() if "kernel" not in k])
        self.kernels = {k: v for k, v in discriminator.items() if "kernel" in k}
        self.average = copy.deepcopy(generator).eval()
        g_lr, g_beta, d_lr, d_beta = ADAM[recipe]
        self.g_optimizer = torch.optim.Adam(self.g.parameters(), lr=g_lr, betas=(0.0, g_beta))
        self.d_optimizer = torch.optim.Adam(self.d.parameters(), lr=d_lr, betas=(0.0, d_beta))
        self.decay, self.iteration = DECAY[recipe], 0

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        return official_logits({k.replace("/", "."): v for k, v in self.d.items()} | self.kernels, images)

    def fakes(self) -> torch.Tensor:
        z, seed = torch.randn(BATCH, DIM), torch.randint(2**63 - 1, ())
        points = grids.full(SIZE, SIZE).flatten(0, 1)
        layers = 1 + len(self.g.linears)
        noise = [normal(seed, k, BATCH, SIZE * SIZE, points).view(BATCH, 1, SIZE, SIZE) for k in range(layers)]
        return self.g(full_grid(SIZE, SIZE).expand(BATCH, -1, -1, -1), z, torch.stack(noise))

    def stack(self, images: torch.Tensor) -> torch.Tensor:
        return images if self.img2dis else torch.cat((images, full_grid(SIZE, SIZE).expand(BATCH, -1, -1, -1)), 1)

    def step(self, real: torch.Tensor) -> dict[str, float]:
        losses = {}
        real = self.stack(real)
        with torch.no_grad():
            fake = self.stack(self.fakes())
        fake_pred, real_pred = self.logits(fake), self.logits(real)
        d_loss = F.softplus(-real_pred).mean() + F.softplus(fake_pred).mean()
        self.d_optimizer.zero_grad()
        d_loss.backward()
        self.d_optimizer.step()
        losses["d_loss"] = d_loss.item()
        if self.iteration % 16 == 0:
            real = real.clone().requires_grad_(True)
            real_pred = self.logits(real)
            (grad,) = torch.autograd.grad(real_pred.sum(), real, create_graph=True)
            r1 = grad.pow(2).reshape(BATCH, -1).sum(1).mean()
            self.d_optimizer.zero_grad()
            (10 / 2 * r1 * 16 + 0 * real_pred[0]).backward()
            self.d_optimizer.step()
            losses["r1"] = r1.item()
        g_loss = F.softplus(-self.logits(self.stack(self.fakes()))).mean()
        self.g_optimizer.zero_grad()
        g_loss.backward()
        self.g_optimizer.step()
        losses["g_loss"] = g_loss.item()
        with torch.no_grad():
            for mine, theirs in zip(self.average.parameters(), self.g.parameters()):
                mine.mul_(self.decay).add_(theirs, alpha=1 - self.decay)
        self.iteration += 1
        return losses


def begin(recipe: str, channels: int = 3) -> tuple[TrainingState, OfficialSteps]:
    """Our state and the official one, from the same weights, with a discriminator of colours, or of coordinates too."""
    torch.manual_seed(0)
    official = OfficialGenerator(SIZE, (8, 8, 8, 8), fourier=8, table=8, style_dim=DIM, mapping=2)
    for key, p in official.named_parameters():
        if "modulation.bias" in key:
            nn.init.ones_(p)
    d_state = {k: v if "weight" in k or "kernel" in k else torch.zeros_like(v) for k, v in make(channels=channels, seed=1).items()}
    generator, discriminator = Generator.from_official(official.state_dict()), Discriminator.from_official(d_state)

    class Given(TrainConfig):
        def generator_config(self):
            return generator.config

        def discriminator_config(self):
            return discriminator.config

    config = Given(size=SIZE, batch=BATCH, device="cpu", preset="paper", recipe=recipe, d_coords=channels == 5)
    state = TrainingState(config.resolve())
    for module, source in (
        (state.generator, generator),
        (state.average.module, generator),
        (state.discriminator, discriminator),
    ):
        module.load_state_dict(source.state_dict())
    return state, OfficialSteps(recipe, official, d_state)


@pytest.mark.parametrize("recipe, channels", [*((recipe, 3) for recipe in RECIPES), ("official", 5)])
def test_twenty_steps_are_the_official_ones(recipe, channels):
    state, official = begin(recipe, channels)
    start = {key: value.clone() for key, value in state.generator.to_official().items()}
    images = torch.rand(STEPS, BATCH, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(2)) * 2 - 1
    for k in range(STEPS):
        torch.manual_seed(100 + k)
        ours = {key: value.item() for key, value in state.train_step(images[k]).items()}
        torch.manual_seed(100 + k)
        theirs = official.step(images[k])
        assert ("r1" in ours) == ("r1" in theirs) == (k % 16 == 0)
        for key, value in theirs.items():
            assert ours[key] == pytest.approx(value, rel=1e-3, abs=1e-3), f"{key} of step {k}"
    for ours, theirs in (
        (state.generator.to_official(), official.g.state_dict()),
        (state.average.module.to_official(), official.average.state_dict()),
        (state.discriminator.to_official(), {k.replace("/", "."): v for k, v in official.d.items()}),
    ):
        for key, value in theirs.items():
            # in the mean over a tensor: Adam makes a step of full length of a gradient that is zero but for rounding
            error, size = ((t.double().square().mean().sqrt()) for t in (ours[key] - value, value))
            assert error <= 1e-3 * (1 + size), f"{key}: RMS error {error:.2e} of {size:.2e}"
    for key, value in state.generator.to_official().items():
        assert not torch.equal(value, start[key]), f"{key} has not moved"


def test_the_recipes_part_where_paper_and_code_do():
    """Each other's numbers do not pass."""
    for recipe in RECIPES:
        state, _ = begin(recipe)
        groups = [optimizer.param_groups[0] for optimizer in (state.g_optimizer, state.d_optimizer)]
        found = tuple(value for group in groups for value in (group["lr"], group["betas"][1]))
        assert found == pytest.approx(ADAM[recipe], rel=1e-12)
        assert all(group["betas"][0] == 0 and group["eps"] == 1e-8 for group in groups)
        assert state.average.decay == pytest.approx(DECAY[recipe], rel=1e-12)
        assert state.config.lookup == {"paper": "exact", "official": "compat"}[recipe]
        assert state.config.mixing == 0 and state.config.noise and (state.config.r1, state.config.r1_every) == (10, 16)


def test_which_recipe_a_preset_takes_and_what_goes_before_it():
    def resolved(**options):
        return TrainConfig(device="cpu", **options).resolve()

    for name in PRESET_DEFAULTS:
        assert resolved(preset=name).recipe == ("official" if name in ("official", "small") else "paper")
    assert resolved(preset="paper", recipe="official").g_lazy_every == 4
    assert resolved(preset="official", recipe="paper").d_lazy is False
    # an option goes before everything, a preset's own value before the recipe it takes, an asked recipe before both
    assert resolved(preset="paper", lr=0.1, r1=0.0, g_lazy_every=7, d_lazy=True) == dataclasses.replace(
        resolved(preset="paper"), lr=0.1, r1=0.0, g_lazy_every=7, d_lazy=True
    )
    assert resolved(preset="small").ema_decay == 0.99 and resolved(preset="small").lookup == "exact"
    asked = resolved(preset="small", recipe="official")
    assert asked.ema_decay == 0.5 ** (32 / 10_000) and asked.lookup == "compat"
    assert resolved(preset="paper", batch=64).ema_decay == 0.5 ** (64 / 10_000)


def test_the_papers_fourier_features_have_no_bias():
    config = TrainConfig(device="cpu", size=8, width=8, n_layers=3, fourier_bias=False).resolve()
    g = TrainingState(config).generator
    assert "encoding.fourier.bias" not in g.state_dict() and not g.encoding.fourier.bias.any()
    with torch.no_grad():
        x = g.encoding(torch.zeros(1, 2))[0, 0, : g.config.fourier_features]
    assert not x.any(), "sin(B 0) is 0"
    with pytest.raises(ValueError, match="fourier_bias: the official classes have one, got False"):
        g.to_official()
