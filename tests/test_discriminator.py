"""The discriminator against the official formulas written out, filter against scipy, penalty against
differences."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import scipy.signal
import torch
import torch.nn.functional as F

from cips import Discriminator, DiscriminatorConfig
from cips.discriminator import Blur, minibatch_stddev
from cips.training.losses import r1_penalty
from cips_kernels import use_backend
from cips_kernels.testing import poisoned_empty, relative_error


def make(size: int | tuple[int, int] = 16, width: float = 1 / 512, seed: int = 0, channels: int = 3) -> Discriminator:
    """A float64 discriminator none of whose biases is zero."""
    torch.manual_seed(seed)
    d = Discriminator(DiscriminatorConfig(size=size, width=width, in_channels=channels)).double()
    with torch.no_grad():
        for name, parameter in d.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    return d


def official_blur(x: torch.Tensor, pad: int) -> torch.Tensor:
    kernel = np.outer([1, 3, 3, 1], [1, 3, 3, 1]) / 64
    padded = np.pad(x.numpy(), ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    planes = [[scipy.signal.convolve2d(plane, kernel, mode="valid") for plane in image] for image in padded]
    return torch.from_numpy(np.array(planes))


def official_stddev(x: np.ndarray, group: int) -> np.ndarray:
    batch = len(x)
    channel = np.empty((batch, 1, *x.shape[2:]))
    for m in range(batch // group):
        members = [m + k * (batch // group) for k in range(group)]
        channel[members] = np.sqrt(x[members].var(axis=0) + 1e-8).mean()
    return np.concatenate((x, channel), 1)


def official_discriminator(d: Discriminator, images: torch.Tensor) -> torch.Tensor:
    """StyleGAN2's residual discriminator, no factor folded anywhere."""

    def conv(x, layer, stride=1, padding=0):
        weight = layer.weight / math.sqrt(layer.weight[0].numel())
        return F.conv2d(x, weight, stride=stride, padding=padding)

    def activate(x, bias):
        return F.leaky_relu(x + bias[:, None, None], 0.2) * 2**0.5

    def linear(x, layer):
        return F.linear(x, layer.weight / math.sqrt(layer.weight.shape[1]), layer.bias)

    x = activate(conv(images, d.from_rgb), d.from_rgb.bias)
    for block in d.blocks:
        y = activate(conv(x, block.conv1, padding=1), block.conv1.bias)
        y = activate(conv(official_blur(y, 2), block.conv2, stride=2), block.conv2.bias)
        skip = conv(official_blur(x, 1), block.skip, stride=2)
        x = (y + skip) / math.sqrt(2)
    x = torch.from_numpy(official_stddev(x.numpy(), min(len(x), 4)))
    x = activate(conv(x, d.final_conv, padding=1), d.final_conv.bias)
    x = F.leaky_relu(linear(x.flatten(1), d.final_linear[0]), 0.2) * 2**0.5
    return linear(x, d.final_linear[1])[:, 0]


@pytest.mark.parametrize("batch", [1, 4, 8])
@pytest.mark.parametrize("size", [8, 32])
def test_logits_are_those_of_the_official_formulas(size, batch):
    d = make(size)
    images = torch.randn(batch, 3, size, size, dtype=torch.float64)
    with torch.no_grad():
        ours, theirs = d(images), official_discriminator(d, images)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    assert batch == 1 or theirs.std() > 1e-3


@pytest.mark.parametrize(
    "size, parameters",
    [(64, 26_488_833), (128, 28_389_121), (256, 28_864_129), (512, 28_982_849), (1024, 29_012_513)],
)
def test_number_of_parameters(size, parameters):
    with torch.device("meta"):
        assert sum(p.numel() for p in Discriminator(size).parameters()) == parameters


@pytest.mark.parametrize("padding, stride", [(2, 1), (1, 2), (1, 1)])
def test_blur_is_the_filter_by_brute_force(padding, stride):
    x = torch.randn(2, 3, 10, 8, dtype=torch.float64)
    ours = Blur(padding, stride).double()(x)
    torch.testing.assert_close(ours, official_blur(x, padding)[:, :, ::stride, ::stride])


def test_blur_keeps_a_constant_and_kills_the_highest_frequency():
    blur = Blur(0)
    ones = torch.ones(1, 1, 8, 8)
    checker = (-1.0) ** (torch.arange(8)[:, None] + torch.arange(8)).expand(1, 1, 8, 8)
    torch.testing.assert_close(blur(ones), torch.ones(1, 1, 5, 5))
    torch.testing.assert_close(blur(checker), torch.zeros(1, 1, 5, 5), rtol=0, atol=1e-6)


def test_blur_is_twice_differentiable():
    x = torch.randn(1, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    blur = Blur(1, 2).double()
    assert torch.autograd.gradgradcheck(lambda t: blur(t).square(), (x,), fast_mode=True)


@pytest.mark.parametrize("batch, group", [(8, 4), (4, 4), (2, 2), (1, 1), (12, 4), (6, 3), (5, 1)])
def test_minibatch_deviation(batch, group):
    # 6 and 5 images: not divisible by 4, where the official code stops
    x = torch.randn(batch, 3, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(minibatch_stddev(x), torch.from_numpy(official_stddev(x.numpy(), group)))


def test_r1_is_the_squared_slope_found_by_differences():
    d = make(8, channels=1)
    images = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    step = 1e-7
    changes = step * torch.eye(images.numel(), dtype=torch.float64).view(-1, *images.shape)
    # vmap keeps each changed batch a batch of its own, as the minibatch deviation needs
    logits = torch.func.vmap(lambda change: d(images + change).sum())
    with torch.no_grad():
        slopes = (logits(changes) - logits(-changes)) / (2 * step)
    inputs = images.clone().requires_grad_(True)
    assert r1_penalty(d(inputs), inputs).item() == pytest.approx(slopes.square().sum().item() / 2, rel=1e-5)


def test_gradient_of_r1_by_differences():
    d = make(8)
    images = torch.randn(4, 3, 8, 8, dtype=torch.float64).requires_grad_(True)

    def penalty() -> torch.Tensor:
        return r1_penalty(d(images), images)

    parameters = list(d.parameters())
    gradients = torch.autograd.grad(penalty(), parameters, allow_unused=True)
    directions = [torch.randn_like(p) for p in parameters]
    slope = sum((g * v).sum() for g, v in zip(gradients, directions) if g is not None).item()
    values, step = [], 1e-6
    for sign in (1, -1):
        with torch.no_grad():
            for p, v in zip(parameters, directions):
                p.add_(sign * step * v)
        values.append(penalty().item())
        with torch.no_grad():
            for p, v in zip(parameters, directions):
                p.sub_(sign * step * v)
    assert slope == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-4)


def test_channels_last_stays_and_changes_nothing():
    d = make().float().to(memory_format=torch.channels_last)
    images = torch.randn(4, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    formats = []
    for block in d.blocks:
        block.register_forward_hook(
            lambda _m, _i, out: formats.append(out.is_contiguous(memory_format=torch.channels_last))
        )
    logits = d(images)
    assert formats == [True, True]
    torch.testing.assert_close(logits, make().float()(images.contiguous()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", ["argument", "autocast"])
def test_bfloat16_is_close_and_ends_in_float32(how):
    d = make(32, 1 / 64).float()
    images = torch.randn(8, 3, 32, 32)
    exact = d(images)
    d.dtype = torch.bfloat16 if how == "argument" else None
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        narrow = d(images)
    assert narrow.dtype == torch.float32
    error = ((narrow - exact).square().mean() / exact.square().mean()).sqrt().item()
    assert 1e-5 < error < 0.03


# Triton's interpreter cuts bfloat16 instead of rounding it
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16 if torch.cuda.is_available() else torch.float16], ids=str
)
def test_fused_tails_and_filters_change_nothing(dtype):
    """Logits, gradients of the parameters and of R1, with the kernels (interpreted without a GPU) and in float64."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    d = make(8, 1 / 128, seed=2)  # images that differ: the deviation of near equal ones has no derivative to speak of
    images = torch.randn(2, 3, 8, 8).contiguous(memory_format=torch.channels_last)

    def everything(d, images):
        """Logits, gradients of the logistic loss, and of R1: those of every parameter, in one vector each."""
        images = images.detach().requires_grad_(True)
        logits = d(images)
        first = torch.autograd.grad(F.softplus(logits).sum(), list(d.parameters()), retain_graph=True)
        second = torch.autograd.grad(r1_penalty(logits, images), list(d.parameters()), allow_unused=True)
        flat = [torch.cat([g.double().flatten() for g in gs if g is not None]) for gs in (first, second)]
        return [logits.double(), *flat]

    exact = everything(d, images.double())
    narrow = copy.deepcopy(d).float().to(device, memory_format=torch.channels_last)
    narrow.dtype = dtype
    images = images.to(device)
    with use_backend("reference"):
        eager = everything(narrow, images)
    with use_backend("triton"), poisoned_empty():
        fused, again = everything(narrow, images), everything(narrow, images)
    for name, value, same, theirs, truth in zip(("logits", "first", "second"), fused, again, eager, exact):
        assert torch.equal(value, same), f"{name}: two runs differ"
        # Two logits are few to take a mean over; and one activation near zero whose sign is another in float32 changes
        # a derivative by more than all roundings.
        luck = max(8 * torch.finfo(dtype).eps, 1e-3)
        error, allowed = relative_error(value, truth), max(2 * relative_error(theirs, truth), luck)
        assert 0 < error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


@pytest.mark.parametrize("size", [0, 4, 48, 100])
def test_size_must_be_a_power_of_two(size):
    with pytest.raises(ValueError, match=f"size: expected a power of two .* got {size}"):
        DiscriminatorConfig(size=size)


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match=r"images: expected \[B, 3, 16, 16\], got \[1, 3, 16, 8\]"):
        make()(torch.zeros(1, 3, 16, 8, dtype=torch.float64))
    with pytest.raises(ValueError, match="width: expected a factor above 0"):
        DiscriminatorConfig(width=0)
    with pytest.raises(ValueError, match="unknown fields depth"):
        DiscriminatorConfig.from_dict({"depth": 3})


@pytest.mark.parametrize("size, last", [((8, 16), 32), ((32, 16), 32), ((16, 20), 20), ((24, 16), 24)])
def test_images_need_not_be_square(size, last):
    d = make(size)
    assert d.config.last_pixels == last and d.config.resolutions[-1] == 4
    assert len(d.blocks) == int(math.log2(min(size))) - 2
    images = torch.randn(4, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        ours, theirs = d(images), official_discriminator(d, images)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    assert theirs.std() > 1e-3
    assert DiscriminatorConfig.from_dict(d.config.to_dict()) == d.config
    with pytest.raises(ValueError, match="takes square images"):
        d.to_official()
    with pytest.raises(ValueError, match=rf"images: expected \[B, 3, {size[0]}, {size[1]}\]"):
        d(images.transpose(2, 3))


def test_sizes_that_cannot_be_halved_are_refused():
    assert DiscriminatorConfig((64, 64)) == DiscriminatorConfig(64)
    for size, message in (
        ((24, 32), "a power of two of at least 8 as the shorter side"),
        ((16, 18), "a multiple of 4, a quarter of the shorter one"),
        (48, "a power of two of at least 8, got 48"),
    ):
        with pytest.raises(ValueError, match=message):
            DiscriminatorConfig(size)
