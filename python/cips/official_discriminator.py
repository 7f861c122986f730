"""The official discriminator's state dict (that of StyleGAN2, residual), read and written.

Every parameter here is the official one as it is; besides there are the blurs' kernels, which are checked and not kept.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from .config import DiscriminatorConfig
from .errors import UsageError
from .states import check_state

DISCRIMINATORS = ("d",)  # of a training checkpoint
_BLOCK = re.compile(r"convs\.(\d+)\.conv1\.")


def blur_kernel(dtype: torch.dtype = torch.float32) -> Tensor:
    """`[1, 3, 3, 1] x [1, 3, 3, 1] / 64`, `[4, 4]`, exact in every dtype."""
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=dtype)
    return taps[:, None] * taps / 64


def official_discriminator_config(name: str, state: Mapping[str, Tensor]) -> DiscriminatorConfig:
    """The architecture of an official discriminator's state dict, all of whose keys and shapes agree with it.

    Args:
        name: what to call the state dict in a message.
        state: as `official.read_official` returns it.

    Raises:
        UsageError: another kind of state dict, another blur, a key missing, extra or misshapen.
    """
    first = state.get("convs.0.0.weight")
    if first is None or first.dim() != 4 or 0 in first.shape:
        came = ", ".join(list(state)[:3]) or "none" if first is None else f"shape {list(first.shape)} of it"
        raise UsageError(
            f"{name}: not a discriminator of the official CIPS code: expected key convs.0.0.weight [C, channels, 1, 1], got {came}"
        )
    blocks = max((int(match[1]) for match in filter(None, map(_BLOCK.match, state))), default=0)
    if not 1 <= blocks <= 16:
        raise UsageError(f"{name}: expected 1 to 16 blocks convs.N.conv1, got {blocks}")
    size, (channels, in_channels) = 4 << blocks, first.shape[:2]
    # the full width wherever it fits: where 512 is the most, several multipliers mean the same
    config = DiscriminatorConfig(size=size, in_channels=in_channels)
    if config.channels(size) != channels:
        config = DiscriminatorConfig(size=size, in_channels=in_channels, width=channels * size / 32768)
    check_state(name, state, {key: torch.empty(shape, device="meta") for key, shape, _ in entries(config)})
    for key, _, parameter in entries(config):
        if parameter is None and not torch.allclose(state[key].cpu(), blur_kernel(state[key].dtype), atol=1e-6):
            raise UsageError(f"{name}: key {key!r}: expected the blur [1, 3, 3, 1] x [1, 3, 3, 1] / 64, got {state[key].tolist()}")
    return config


def entries(config: DiscriminatorConfig) -> list[tuple[str, tuple[int, ...], str | None]]:
    """(official key, shape, parameter of `Discriminator`) in the official order; a blur's kernel is no parameter.

    Raises:
        ValueError: the images are not square.
    """
    if not isinstance(config.size, int):
        raise ValueError(f"size: the official discriminator takes square images, got {config.size}")
    widths = [config.channels(size) for size in config.resolutions]
    found: list[tuple[str, tuple[int, ...], str | None]] = [
        ("convs.0.0.weight", (widths[0], config.in_channels, 1, 1), "from_rgb.weight"),
        ("convs.0.1.bias", (widths[0],), "from_rgb.bias"),
    ]
    for block, (i, o) in enumerate(zip(widths, widths[1:])):
        key, parameter = f"convs.{block + 1}", f"blocks.{block}"
        found += [
            (f"{key}.conv1.0.weight", (i, i, 3, 3), f"{parameter}.conv1.weight"),
            (f"{key}.conv1.1.bias", (i,), f"{parameter}.conv1.bias"),
            (f"{key}.conv2.0.kernel", (4, 4), None),
            (f"{key}.conv2.1.weight", (o, i, 3, 3), f"{parameter}.conv2.weight"),
            (f"{key}.conv2.2.bias", (o,), f"{parameter}.conv2.bias"),
            (f"{key}.skip.0.kernel", (4, 4), None),
            (f"{key}.skip.1.weight", (o, i, 1, 1), f"{parameter}.skip.weight"),
        ]
    last = widths[-1]
    found += [
        ("final_conv.0.weight", (last, last + 1, 3, 3), "final_conv.weight"),
        ("final_conv.1.bias", (last,), "final_conv.bias"),
        ("final_linear.0.weight", (last, last * 16), "final_linear.0.weight"),
        ("final_linear.0.bias", (last,), "final_linear.0.bias"),
        ("final_linear.1.weight", (1, last), "final_linear.1.weight"),
        ("final_linear.1.bias", (1,), "final_linear.1.bias"),
    ]
    return found
