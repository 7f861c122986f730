"""What a generator consists of and costs, in a few lines for people."""

from __future__ import annotations

from .generator import Generator
from .stylegan2 import StyleGAN2

_ADAM = 4  # a parameter, its gradient and two moments


def summary(generator: Generator | StyleGAN2, title: str) -> str:
    """Layers, parameters, arithmetic and memory; nothing is computed, so the generator may be on the meta device."""
    if isinstance(generator, StyleGAN2):
        return _convolutional(generator, title)
    config, encoding, synthesis = generator.config, generator.encoding, generator.synthesis
    parts = {
        "mapping": generator.mapping,
        "Fourier features": encoding.fourier,
        "coordinate table": encoding.table,
        "modulated layers": synthesis.layers,
        "skips": synthesis.skips,
        "ToRGB": synthesis.to_rgbs,
    }
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items() if part is not None}
    height, width = config.size
    outputs = sum(config.layer_widths) * height * width
    lines = [
        f"{title}: {height}x{width}, style {config.style_dim}, {config.mapping_layers} mapping layers",
        f"  layers      {encoding.features} -> " + " -> ".join(str(n) for n in config.layer_widths),
        f"  ToRGB after {', '.join(str(n + 1) for n in config.rgb_layers)}",
    ]
    if config.activation != "lrelu":
        lines.append(f"  activation  {config.activation}, by the reference formulation: the fused kernels have leaky ReLU")
    if config.residual:
        lines.append(f"  blocks      {', '.join(f'{first + 1}-{last + 1}' for first, last in config.blocks)}, each with a skip")
    if encoding.table is not None and encoding.table.size != config.size:
        rows, columns = encoding.table.size
        lines.append(f"  table       {rows}x{columns}, interpolated")
    return "\n".join(lines + _costs(counts, config.flops(), outputs))


def _convolutional(generator: StyleGAN2, title: str) -> str:
    config = generator.config
    parts = {"mapping": generator.mapping, "convolutions": generator.convs, "ToRGB": generator.to_rgbs}
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    counts["constant"] = generator.constant.numel()
    outputs = sum(
        config.channels((height, width)) * height * width * (2 if k else 1) for k, (height, width) in enumerate(config.sizes)
    )
    lines = [
        f"{title}: {config.size[0]}x{config.size[1]}, style {config.style_dim}, {config.mapping_layers} mapping layers",
        "  3x3 layers  " + ", ".join(f"{config.channels(s)} at {s[0]}x{s[1]}" for s in config.sizes)
        + ": one at the first size, two at each other",
    ]
    return "\n".join(lines + _costs(counts, config.flops(), outputs))


def _costs(counts: dict[str, int], flops: int, outputs: int) -> list[str]:
    """Lines about parameters by part, operations and layer outputs (numbers) of one image."""
    total = sum(counts.values())
    return [
        *(f"  {name:17s} {count:>12,d} parameters" for name, count in counts.items() if count),
        f"  {'all':17s} {total:>12,d} parameters",
        f"  {flops / 1e9:.4g} GFLOP an image, forward",
        f"  {total * 4 / 1e6:.4g} MB of float32 parameters, {total * 4 * _ADAM / 1e6:.4g} MB with gradients and Adam's moments",
        f"  {outputs * 4 / 1e6:.4g} MB of layer outputs an image for a backward pass in float32, {outputs * 2 / 1e6:.4g} MB in bfloat16",
    ]
