"""The losses of CIPS and StyleGAN2, in float32: non-saturating logistic, and R1 on real images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """mean softplus(-D(real)) + mean softplus(D(fake))."""
    return F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()


def generator_loss(fake_logits: Tensor) -> Tensor:
    """mean softplus(-D(fake))."""
    return F.softplus(-fake_logits).mean()


def every_parameter(module: nn.Module) -> Tensor:
    """0, with a gradient of zero in every parameter.

    R1 does not depend on biases. Added to it, this makes the optimiser see a zero there instead of nothing, so that their
    second moments decay and their steps are counted, as in the official code.
    """
    return 0 * torch.stack([p[(0,) * p.dim()] for p in module.parameters() if p.requires_grad]).sum()


def r1_penalty(real_logits: Tensor, real_images: Tensor) -> Tensor:
    """Mean over images of |d D(x) / d x|^2 (Mescheder et al. 2018), itself differentiable.

    Args:
        real_logits: `[B]`, computed from `real_images`.
        real_images: `[B, C, H, W]`, requiring gradients.
    """
    (gradient,) = torch.autograd.grad(real_logits.sum(), real_images, create_graph=True)
    wide = torch.promote_types(gradient.dtype, torch.float32)
    return gradient.to(wide).square().sum((1, 2, 3)).mean()
