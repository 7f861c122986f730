"""The specification of `filters`, in plain PyTorch: a low-pass filter before a stride, and the leaky ReLU around it.

    F        [1,3,3,1] x [1,3,3,1] / 64, zeros outside the image, then every `stride`-th pixel (StyleGAN2, Karras et al. 2020,
             after Zhang 2019)
    F^T      its transpose: zeros between the pixels, the same filter
    D        diag(1 where x + b > 0, the negative slope elsewhere), so that lrelu(x + b) = D (x + b)

    y = F lrelu(x + b)        dx = D F^T dy        d(dy) = F D d(dx)

Both lines on the right are linear, and each is the other's transpose: derivatives of every order are made of these two.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

TAPS = 4


def blurred_size(size: int, padding: int, stride: int) -> int:
    """Pixels that `size` padded pixels leave."""
    return (size + 2 * padding - TAPS) // stride + 1


def empty_plane(like: Tensor, height: int, width: int) -> Tensor:
    """Uninitialised `[B, C, height, width]` in the dtype and the memory format of `like`."""
    channels_last = like.is_contiguous(memory_format=torch.channels_last)
    form = torch.channels_last if channels_last else torch.contiguous_format
    shape = (like.shape[0], like.shape[1], height, width)
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=form)


def _kernel(x: Tensor) -> Tensor:
    """The filter for every channel, `[C, 1, 4, 4]`; made on the device, since a copy from the host would stop the stream."""
    kernel = x.new_full((TAPS, TAPS), 1 / 64)
    kernel[1:3] *= 3
    kernel[:, 1:3] *= 3
    return kernel.expand(x.shape[1], 1, -1, -1)


def blur(x: Tensor, padding: int, stride: int) -> Tensor:
    """F: `[B, C, H, W]` -> `[B, C, H', W']`."""
    return F.conv2d(x, _kernel(x), stride=stride, padding=padding, groups=x.shape[1])


def blur_transposed(grad: Tensor, height: int, width: int, padding: int, stride: int) -> Tensor:
    """F^T: `[B, C, H', W']` -> `[B, C, height, width]`."""
    sizes = (height, width)
    # rows and columns that a stride never reached, beyond what the transpose of the convolution makes by itself
    rest = [n + 2 * padding - TAPS - stride * (m - 1) for n, m in zip(sizes, grad.shape[2:])]
    spread = F.conv_transpose2d(grad, _kernel(grad), stride=stride, groups=grad.shape[1])
    spread = F.pad(spread, (0, rest[1], 0, rest[0]))
    return spread[:, :, padding : padding + height, padding : padding + width]


def add_bias(x: Tensor, bias: Tensor | None) -> Tensor:
    """`x + bias` in the wider of the two dtypes, `bias` `[C]`."""
    return x if bias is None else x + bias[:, None, None]


def lrelu_slope(x: Tensor, bias: Tensor | None, negative_slope: float) -> Tensor:
    """D, in the dtype of the sum; as PyTorch's derivative has it, a zero counts as negative."""
    y = add_bias(x, bias)
    return torch.where(y > 0, 1.0, negative_slope).to(y.dtype)
