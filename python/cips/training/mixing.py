"""Style mixing regularisation (Karras et al. 2019, section 3.1). CIPS trains without it, and so does a run by default."""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import GeneratorConfig


class StyleMixing:
    """Gives the layers of some images, from a random one on, the style of a second latent.

    Args:
        config: of the generator, of at least two layers.
        probability: with which an image is mixed, each on its own. (StyleGAN2's code draws once for a batch.)
        device: that trains; random numbers come from torch's global generator of it.
    """

    def __init__(self, config: GeneratorConfig, probability: float, device: torch.device | str) -> None:
        self.layers, self.probability = len(config.layer_widths), probability
        # a ToRGB goes with the layer that it follows
        depths = [*range(self.layers), *config.rgb_layers]
        self.depths = torch.tensor(depths, device=device)

    def __call__(self, w: Tensor, other: Tensor) -> Tensor:
        """W+ `[B, n_styles, style_dim]` from two `[B, style_dim]`.

        The first layer that takes `other` is uniform over all but layer 0.
        """
        count, device = len(w), w.device
        cut = torch.randint(1, self.layers, (count, 1), device=device)
        mixed = torch.rand(count, 1, device=device) < self.probability
        return torch.where((mixed & (self.depths >= cut))[:, :, None], other[:, None], w[:, None])
