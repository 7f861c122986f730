"""The official discriminator's state dicts: bit for bit there and back, and the logits of its formulas."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cips import Discriminator, DiscriminatorConfig, UsageError

KERNEL = torch.tensor([[1.0, 3, 3, 1], [3, 9, 9, 3], [3, 9, 9, 3], [1, 3, 3, 1]]) / 64


def make(widths: tuple[int, ...] = (4, 8, 16), channels: int = 3, seed: int = 0) -> dict[str, Tensor]:
    """A state dict with random values; `widths` from the images' resolution down to 4x4."""
    torch.manual_seed(seed)
    state = {"convs.0.0.weight": torch.randn(widths[0], channels, 1, 1), "convs.0.1.bias": torch.randn(widths[0])}
    for k, (i, o) in enumerate(zip(widths, widths[1:]), 1):
        state |= {
            f"convs.{k}.conv1.0.weight": torch.randn(i, i, 3, 3),
            f"convs.{k}.conv1.1.bias": torch.randn(i),
            f"convs.{k}.conv2.0.kernel": KERNEL.clone(),
            f"convs.{k}.conv2.1.weight": torch.randn(o, i, 3, 3),
            f"convs.{k}.conv2.2.bias": torch.randn(o),
            f"convs.{k}.skip.0.kernel": KERNEL.clone(),
            f"convs.{k}.skip.1.weight": torch.randn(o, i, 1, 1),
        }
    last = widths[-1]
    return state | {
        "final_conv.0.weight": torch.randn(last, last + 1, 3, 3),
        "final_conv.1.bias": torch.randn(last),
        "final_linear.0.weight": torch.randn(last, 16 * last),
        "final_linear.0.bias": torch.randn(last),
        "final_linear.1.weight": torch.randn(1, last),
        "final_linear.1.bias": torch.randn(1),
    }


def official_logits(state: dict[str, Tensor], images: Tensor) -> Tensor:
    """The formulas, no factor folded; `images` no more than a group of four."""

    def conv(x: Tensor, name: str, **options) -> Tensor:
        weight = state[f"{name}.weight"]
        return F.conv2d(x, weight / math.sqrt(weight[0].numel()), **options)

    def active(x: Tensor, name: str) -> Tensor:
        return F.leaky_relu(x + state[f"{name}.bias"].view(1, -1, 1, 1), 0.2) * math.sqrt(2)

    def blur(x: Tensor, name: str, pad: int) -> Tensor:
        kernel = state[f"{name}.kernel"].flip(0, 1)[None, None]
        return F.conv2d(F.pad(x, (pad, pad, pad, pad)).flatten(0, 1)[:, None], kernel)[:, 0].unflatten(0, x.shape[:2])

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ state[f"{name}.weight"].T / math.sqrt(x.shape[1]) + state[f"{name}.bias"]

    x, k = active(conv(images, "convs.0.0"), "convs.0.1"), 1
    while f"convs.{k}.skip.1.weight" in state:
        name = f"convs.{k}"
        y = active(conv(x, f"{name}.conv1.0", padding=1), f"{name}.conv1.1")
        y = active(conv(blur(y, f"{name}.conv2.0", 2), f"{name}.conv2.1", stride=2), f"{name}.conv2.2")
        x = (y + conv(blur(x, f"{name}.skip.0", 1), f"{name}.skip.1", stride=2)) / math.sqrt(2)
        k += 1
    deviation = (x.var(0, correction=0) + 1e-8).sqrt().mean()
    x = torch.cat((x, deviation.expand(len(x), 1, 4, 4)), 1)
    x = active(conv(x, "final_conv.0", padding=1), "final_conv.1").flatten(1)
    x = F.leaky_relu(linear(x, "final_linear.0"), 0.2) * math.sqrt(2)
    return linear(x, "final_linear.1")[:, 0]


@pytest.mark.parametrize("channels", [3, 5])
def test_logits_and_gradients_are_the_official_ones(channels):
    # min(512, width 32768 / resolution) at 16, 8 and 4 pixels
    state = {key: value.double().requires_grad_("kernel" not in key) for key, value in make(channels=channels).items()}
    d = Discriminator.from_official({key: value.detach() for key, value in state.items()})
    assert d.config == DiscriminatorConfig(size=16, in_channels=channels, width=4 * 16 / 32768)
    images = torch.randn(4, channels, 16, 16, dtype=torch.float64)
    ours, theirs = d(images), official_logits(state, images)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    assert theirs.std() > 1e-3
    sent = torch.randn(4, dtype=torch.float64)
    ours.backward(sent)
    theirs.backward(sent)
    with torch.no_grad():
        for parameter in d.parameters():
            parameter.copy_(parameter.grad)
    for key, gradient in d.to_official().items():
        if "kernel" not in key:
            torch.testing.assert_close(gradient, state[key].grad, rtol=1e-9, atol=1e-10, msg=key)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_state_dict_comes_back_bit_for_bit(tmp_path, dtype):
    state = {key: value.to(dtype) for key, value in make().items()}
    checkpoint = {"g": {"x": torch.zeros(1)}, "d": {f"module.{key}": value for key, value in state.items()}}
    torch.save(checkpoint, tmp_path / "000100.pt")
    torch.manual_seed(1)
    expected = torch.randn(2)
    torch.manual_seed(1)
    for source in (state, checkpoint, tmp_path / "000100.pt"):
        d = Discriminator.from_official(source).to(memory_format=torch.channels_last)
        found = d.to_official()
        assert list(found) == list(state)
        for key, value in state.items():
            assert found[key].dtype == dtype and torch.equal(found[key], value) and found[key].is_contiguous(), key
    assert torch.equal(torch.randn(2), expected), "nothing was drawn from the global generator"


@pytest.mark.parametrize(
    "size, parameters",
    [(64, 26_488_833), (128, 28_389_121), (256, 28_864_129), (512, 28_982_849), (1024, 29_012_513)],
)
def test_the_released_architectures(size, parameters):
    with torch.device("meta"):
        official = make(tuple(min(512, 2**15 // (size >> n)) for n in range(int(math.log2(size)) - 1)))
    shapes = {key: value.shape for key, value in official.items()}
    assert sum(shape.numel() for key, shape in shapes.items() if "kernel" not in key) == parameters
    from cips.official_discriminator import entries

    assert {key: tuple(shape) for key, shape in shapes.items()} == {k: s for k, s, _ in entries(DiscriminatorConfig(size))}


def test_the_full_width_is_told_from_a_small_one():
    assert Discriminator.from_official(make((512, 512))).config == DiscriminatorConfig(size=8)


CHANGES = {
    "missing": (lambda s: s.pop("convs.2.skip.1.weight"), "key 'convs.2.skip.1.weight' is missing"),
    "extra": (lambda s: s.update(extra=torch.zeros(1)), "key 'extra' is not expected"),
    "shape": (lambda s: s.update({"final_linear.1.weight": torch.zeros(2, 16)}), r"key 'final_linear.1.weight': expected shape \[1, 16\], got \[2, 16\]"),
    "another taper": (lambda s: s.update({"convs.0.0.weight": torch.zeros(5, 3, 1, 1)}), r"key 'convs.0.1.bias': expected shape \[5\], got \[4\]"),
    "another blur": (lambda s: s["convs.1.skip.0.kernel"].mul_(4), r"key 'convs.1.skip.0.kernel': expected the blur"),
    "no blocks": (lambda s: [s.pop(key) for key in list(s) if ".conv1." in key], "expected 1 to 16 blocks convs.N.conv1, got 0"),
    "far away": (lambda s: s.update({"convs.99999.conv1.0.weight": torch.zeros(1)}), "expected 1 to 16 blocks convs.N.conv1, got 99999"),
    "a generator": (lambda s: s.pop("convs.0.0.weight"), "not a discriminator of the official CIPS code: expected key convs.0.0.weight"),
    "flat": (lambda s: s.update({"convs.0.0.weight": torch.zeros(4, 3)}), r"not a discriminator .* got shape \[4, 3\] of it"),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_state_dict_is_refused_naming_the_key(change):
    edit, message = CHANGES[change]
    state = make()
    edit(state)
    with pytest.raises(UsageError, match=f"^state dict: d: .*{message}"):
        Discriminator.from_official({"d": state})


def test_a_checkpoint_without_one():
    with pytest.raises(UsageError, match="expected a state dict d, holds g_ema"):
        Discriminator.from_official({"g_ema": make()})
    with pytest.raises(TypeError, match="state_dict_or_path: expected a path or a state dict, got NoneType"):
        Discriminator.from_official(None)
