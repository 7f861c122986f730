"""StyleGAN2's generator, config F (Karras et al. 2020): the convolutional one that the paper compares with.

    w = mapping(z)                                       as in CIPS
    x = conv(constant); rgb = to_rgb(x)                  4x4 pixels
    every doubling: x = conv(up_conv(x)); rgb = up(rgb) + to_rgb(x)

Its 3x3 convolutions are PyTorch's (`stylegan2_layers`), its ToRGBs, modulated 1x1 layers, are `cips_kernels.FusedToRGB`. It has
no coordinates: it draws whole images of its own size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cips_kernels import FusedToRGB
from cips_kernels.noise import normal

from . import grids
from .config import presets
from .mapping import MappedGenerator
from .stylegan2_config import StyleGAN2Config
from .stylegan2_layers import ModulatedConv, Upsample


class StyleGAN2(MappedGenerator):
    """Images from latent vectors, by convolutions.

    Args:
        config: the architecture, or the name of a preset that is a `StyleGAN2Config`.
        dtype: of the convolutions (torch.bfloat16); None: autocast's where it is on, otherwise the parameters'.
            Parameters, the mapping network, styles and the RGB sum stay float32.
        backend: of the ToRGBs, see `cips_kernels.backends()`.

    Raises:
        ValueError, TypeError: another `config`.
    """

    def __init__(
        self,
        config: StyleGAN2Config | str = "stylegan2",
        *,
        dtype: torch.dtype | None = None,
        backend: str = "auto",
    ) -> None:
        config = presets.get(config) if isinstance(config, str) else config
        if not isinstance(config, StyleGAN2Config):
            raise TypeError(f"config: expected a StyleGAN2Config or 'stylegan2', got {type(config).__name__}")
        widths, dim = config.layer_widths, config.style_dim
        # styles in W+: one for every convolution, then one for every ToRGB
        n_styles = len(widths) + len(config.rgb_layers)
        super().__init__(dim, config.mapping_layers, config.mapping_lr_mul, n_styles, dtype)
        self.config = config
        self.constant = nn.Parameter(torch.randn(widths[0], *config.sizes[0]))
        inputs = (widths[0], *widths)
        self.convs = nn.ModuleList(
            ModulatedConv(i, o, dim, up=k % 2 == 1) for k, (i, o) in enumerate(zip(inputs, widths))
        )
        self.to_rgbs = nn.ModuleList(FusedToRGB(widths[k], dim, backend=backend) for k in config.rgb_layers)
        self.upsample = Upsample()
        # and with them activations: what the matrix units' convolutions read without turning it
        self.convs.to(memory_format=torch.channels_last)

    def forward(
        self,
        z: Tensor,
        coords: None = None,
        *,
        size: int | tuple[int, int] | None = None,
        input_is_w: bool = False,
        truncation: float = 1.0,
        noise: str | int = "fresh",
        lookup: str = "exact",
    ) -> Tensor:
        """Synthesise images.

        Args:
            z: `[B, style_dim]` ~ N(0, 1); with `input_is_w` w `[B, style_dim]`, or W+ `[B, n_styles, style_dim]`.
            coords, size: None, or the config's size: as in `Generator.forward`, but there is no choice.
            truncation: w becomes w_mean + truncation * (w - w_mean); 1 leaves it.
            noise: "fresh" (drawn from torch's generator of the device), "off", or an int seed.
            lookup: of no table: it does nothing.

        Returns:
            `[B, 3, height, width]`, float32 (float64 for float64 parameters), nominally in [-1, 1] and not clipped.

        Raises:
            ValueError, TypeError: naming the argument; coordinates, or another size.
        """
        if coords is not None:
            raise ValueError("coords: expected None, since convolutions draw whole images of their own size")
        if size is not None and grids.as_size(size) != self.config.size:
            height, width = self.config.size
            raise ValueError(f"size: expected {height}x{width}, the only size of this StyleGAN2, got {size!r}")
        w = self.styles(z, input_is_w=input_is_w, truncation=truncation)
        device = w.device.type if torch.amp.is_autocast_available(w.device.type) else "cpu"
        dtype = self.compute_dtype(device)
        convs = len(self.convs)
        of_conv, of_rgb = (
            (w[:, :convs].unbind(1), w[:, convs:].unbind(1)) if w.dim() == 3 else ([w] * convs, [w] * len(self.to_rgbs))
        )
        with torch.autocast(device, enabled=False):
            x, rgb = self.constant.to(dtype).expand(len(w), -1, -1, -1), None
            for k, conv in enumerate(self.convs):
                height, width = self.config.sizes[(k + 1) // 2]
                x = conv(x, of_conv[k], self._noise(noise, k, len(w), height, width))
                if k % 2 == 0:
                    skip = None if rgb is None else self.upsample(rgb)
                    rgb = self.to_rgbs[k // 2](x, of_rgb[k // 2], skip, layout="bchw")
        return rgb

    def _noise(self, noise: str | int, layer: int, batch: int, height: int, width: int) -> Tensor | None:
        """`[B, 1, height, width]` ~ N(0, 1) of one layer, or None."""
        like = self.w_mean
        if isinstance(noise, str) and noise == "off":
            return None
        if isinstance(noise, str) and noise == "fresh":
            return torch.randn(batch, 1, height, width, dtype=like.dtype, device=like.device)
        if not isinstance(noise, int) or isinstance(noise, bool):
            raise ValueError(f"noise: expected 'fresh', 'off' or an int seed, got {noise!r}")
        seed = torch.full((), noise, dtype=torch.int64, device=like.device)
        return normal(seed, layer, batch, height * width).to(like.dtype).view(batch, 1, height, width)
