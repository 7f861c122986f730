"""The whole generator written with PyTorch's own operators: what a user has without this package.

The two formulations of `rivals.py`, from latents to images. `grouped_conv` follows the published generator: planes
`[B, C, H, W]`, every scale applied where the published code applies it, `sin` of a 1x1 convolution of the
coordinates beside the table (or `grid_sample` of it), and the grouped convolutions. `bmm` is what a careful author
would prepare for sampling: pixels first, scales multiplied in beforehand, all style affines in one product.

The same treatment for everyone, ours included: what depends on parameters alone may be made ready before the
clock starts, in memory that the peak counts. So the table is rounded to the compute dtype once wherever it is read as
it is, and lies as each likes it; what depends on coordinates is computed in every call. Coordinates, Fourier
features and interpolation are float32, rounded once: in half precision a grid of 256 has no exact coordinates.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import rivals
from generator_cases import GeneratorCase, GeneratorProblem
from rivals import GAIN, SLOPE, Noise


class Layers(NamedTuple):
    """The stack's parameters as `rivals.py` takes them, styles left out."""

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]
    strengths: tuple[Tensor, ...]
    rgb_weights: tuple[Tensor, ...]
    rgb_biases: tuple[Tensor, ...]


class Network(NamedTuple):
    """A generator's parameters in one formulation's form.

    Attributes:
        mapping: weight and bias of each layer.
        affines: weight and bias for each layer, then each ToRGB; `bmm`: a single pair for all of them.
        fourier: weight `[F, 2]` and bias `[F]`.
        table: `[1, C, S_h, S_w]`, or for `bmm` `[S_h, S_w, C]`.
        coords: every point drawn: `[1, 2, H, W]`, or for `bmm` `[P, 2]`.
        layers: of the stack.
    """

    mapping: tuple[tuple[Tensor, Tensor], ...]
    affines: tuple[tuple[Tensor, Tensor], ...]
    fourier: tuple[Tensor, Tensor]
    table: Tensor
    coords: Tensor
    layers: Layers


def _pairs(state: dict[str, Tensor], names: list[str]) -> tuple[tuple[Tensor, Tensor], ...]:
    return tuple((state[f"{name}.weight"], state[f"{name}.bias"]) for name in names)


def _gathered(problem: GeneratorProblem, table: Tensor, coords: Tensor) -> Network:
    """Every parameter as it is; `Layers` refers to the very tensors of the problem."""
    state, config = problem.state, problem.case.config
    layers = [f"synthesis.layers.{k}" for k in range(problem.case.layers)]
    rgbs = [f"synthesis.to_rgbs.{k}" for k in range(len(config.rgb_layers))]
    stack = Layers(
        tuple(state[f"{name}.weight"] for name in layers),
        tuple(state[f"{name}.bias"] for name in layers),
        tuple(state[f"{name}.noise_strength"] for name in layers),
        tuple(state[f"{name}.weight"] for name in rgbs),
        tuple(state[f"{name}.bias"] for name in rgbs),
    )
    return Network(
        _pairs(state, [f"mapping.{k + 1}" for k in range(config.mapping_layers)]),
        _pairs(state, [f"{name}.affine" for name in (*layers, *rgbs)]),
        (state["encoding.fourier.weight"], state["encoding.fourier.bias"]),
        table,
        coords,
        stack,
    )


# --- as published -------------------------------------------------------------------------------------------


def plane_shape(case: GeneratorCase) -> tuple[int, int]:
    """Rows and columns in which planes hold the pixels drawn: points make a picture, too, where they can."""
    half = case.height // 2, case.width // 2
    if case.pixels == case.height * case.width:
        return case.height, case.width
    return half if half[0] * half[1] == case.pixels else (1, case.pixels)


def prepare_planes(problem: GeneratorProblem, channels_last: bool) -> Network:
    """Table and coordinates in planes; the table in float32 where it is sampled, as `grid_sample` wants it."""
    case = problem.case
    table = problem.state["encoding.table.weight"].permute(2, 0, 1)[None]
    coords = problem.points().to(table.dtype).t().reshape(1, 2, *plane_shape(case))
    form = torch.channels_last if channels_last else torch.contiguous_format
    dtype = case.dtype if case.on_table_grid else table.dtype
    # sampling reads single planes whatever the convolutions like
    table_form = form if case.on_table_grid else torch.contiguous_format
    table = table.to(dtype, memory_format=table_form, copy=True)
    return _gathered(problem, table, coords.contiguous(memory_format=form))


def grouped_conv(
    net: Network,
    z: Tensor,
    dtype: torch.dtype,
    rgb_after: tuple[int, ...],
    lr_mul: float,
    on_table_grid: bool,
    channels_last: bool,
    noise: Noise,
) -> Tensor:
    """`z [B, D]` -> image `[B, 3, H, W]`, float32, as the published generator computes it."""
    w = z * torch.rsqrt(z.square().mean(1, keepdim=True) + 1e-8)
    for weight, bias in net.mapping:
        w = F.linear(w, weight * (lr_mul / math.sqrt(weight.shape[1])))
        w = F.leaky_relu(w + bias * lr_mul, SLOPE) * GAIN
    styles = [F.linear(w, weight * (1 / math.sqrt(weight.shape[1])), bias) for weight, bias in net.affines]
    weight, bias = net.fourier
    features = torch.sin(F.conv2d(net.coords, weight[:, :, None, None], bias)).to(dtype)
    table = net.table
    if not on_table_grid:
        where = net.coords.permute(0, 2, 3, 1)
        table = F.grid_sample(table, where, padding_mode="border", align_corners=True).to(dtype)
    x = torch.cat((features, table), 1)
    if channels_last and len(z) > 1:
        # a grouped convolution sees all images as channels of one: channels-last is [1, H, W, B * C]
        x = x.permute(2, 3, 0, 1).expand(-1, -1, len(z), -1).contiguous().permute(2, 3, 0, 1)
    depth, at = len(net.layers.weights), net.layers
    layers = (at.weights, styles[:depth], at.biases, at.strengths)
    rgb = rivals.grouped_conv(
        x.expand(len(z), -1, -1, -1), *layers, at.rgb_weights, styles[depth:], at.rgb_biases, rgb_after, noise
    )[1]
    assert rgb is not None
    return rgb


# --- pixels first -------------------------------------------------------------------------------------------


def prepare_pixels(problem: GeneratorProblem) -> Network:
    """Scales multiplied in, affines joined, the table in the compute dtype."""
    table = problem.state["encoding.table.weight"]
    net = _gathered(problem, table.to(problem.case.dtype, copy=True), problem.points().to(table.dtype))
    gain = GAIN * problem.case.config.mapping_lr_mul
    mapping = tuple((w * (gain / math.sqrt(w.shape[1])), b * gain) for w, b in net.mapping)
    joined = torch.cat([w for w, _ in net.affines]) * (1 / math.sqrt(problem.case.config.style_dim))
    return net._replace(mapping=mapping, affines=((joined, torch.cat([b for _, b in net.affines])),))


def bilinear(table: Tensor, coords: Tensor) -> Tensor:
    """`table [S_h, S_w, C]` at `coords [P, 2]` -> `[P, C]` in the dtype of `coords`: -1 and +1 are border entries."""
    rows, columns, _ = table.shape
    entries = table.flatten(0, 1)
    x = ((coords[:, 0] + 1) * ((columns - 1) / 2)).clamp(0, columns - 1)
    y = ((coords[:, 1] + 1) * ((rows - 1) / 2)).clamp(0, rows - 1)
    left, top = x.floor().clamp(max=max(columns - 2, 0)), y.floor().clamp(max=max(rows - 2, 0))
    right, bottom = (left + 1).clamp(max=columns - 1), (top + 1).clamp(max=rows - 1)
    along, down = (x - left)[:, None], (y - top)[:, None]

    def entry(row: Tensor, column: Tensor) -> Tensor:
        return F.embedding((row * columns + column).long(), entries).to(coords.dtype)

    upper = torch.lerp(entry(top, left), entry(top, right), along)
    return torch.lerp(upper, torch.lerp(entry(bottom, left), entry(bottom, right), along), down)


def bmm(
    net: Network,
    z: Tensor,
    dtype: torch.dtype,
    rgb_after: tuple[int, ...],
    on_table_grid: bool,
    noise: Noise,
    for_compiler: bool = False,
) -> Tensor:
    """`z [B, D]` -> image `[B, P, 3]`, float32.

    Eager code takes the angles from a thin matrix product, which is one pass; `for_compiler` leaves them to the one
    generated kernel that writes the first layer's input.
    """
    w = z * torch.rsqrt(z.square().mean(1, keepdim=True) + 1e-8)
    for weight, bias in net.mapping:
        w = F.leaky_relu(torch.addmm(bias, w, weight.t()), SLOPE)
    at, depth = net.layers, len(net.layers.weights)
    ((weight, bias),) = net.affines
    sizes = [weight.shape[1] for weight in (*at.weights, *at.rgb_weights)]
    styles = torch.addmm(bias, w, weight.t()).split(sizes, 1)
    weight, bias = net.fourier
    if for_compiler:
        angle = torch.addcmul(bias, net.coords[:, 0:1], weight[:, 0])
        features = torch.sin(torch.addcmul(angle, net.coords[:, 1:2], weight[:, 1])).to(dtype)
    else:
        features = torch.addmm(bias, net.coords, weight.t()).sin_().to(dtype)
    table = net.table.flatten(0, 1) if on_table_grid else bilinear(net.table, net.coords).to(dtype)
    x = torch.cat((features, table), 1)[None]
    layers = (at.weights, styles[:depth], at.biases, at.strengths)
    colours = (at.rgb_weights, styles[depth:], at.rgb_biases, rgb_after)
    rgb = rivals.bmm(x, *layers, *colours, noise, for_compiler=for_compiler)[1]
    assert rgb is not None
    return rgb


# --- the measure --------------------------------------------------------------------------------------------


def plain(problem: GeneratorProblem, chosen: Tensor, noise: Tensor | None) -> Tensor:
    """The formulas as they stand at the pixels `chosen [P]`, one eager operation after the other: `[B, P, 3]`.

    Nobody's way to be fast: its error is the measure for all others. Noise is `[L, B, P]`.
    """
    case, dtype = problem.case, problem.case.dtype
    table = problem.state["encoding.table.weight"]
    net = _gathered(problem, table, problem.points()[chosen].to(table.dtype))
    z, lr_mul = problem.z, case.config.mapping_lr_mul
    w = z * torch.rsqrt(z.square().mean(1, keepdim=True) + 1e-8)
    for weight, bias in net.mapping:
        w = F.linear(w, weight * (lr_mul / math.sqrt(weight.shape[1])), bias * lr_mul)
        w = F.leaky_relu(w, SLOPE) * GAIN
    styles = [F.linear(w, weight * (1 / math.sqrt(weight.shape[1])), bias) for weight, bias in net.affines]
    weight, bias = net.fourier
    features = torch.sin(net.coords @ weight.t() + bias)
    if case.on_table_grid:
        entries = table.flatten(0, 1)[chosen]
    else:
        planes, where = table.permute(2, 0, 1)[None], net.coords[None, None]
        entries = F.grid_sample(planes, where, padding_mode="border", align_corners=True)[0, :, 0].t()
    x = torch.cat((features, entries), 1)[None].to(dtype)
    at, depth = net.layers, case.layers
    layers = (at.weights, styles[:depth], at.biases, at.strengths)
    given = None if noise is None else noise.to(dtype)
    colours = (at.rgb_weights, styles[depth:], at.rgb_biases, case.config.rgb_layers)
    rgb = rivals.plain(x, *layers, *colours, given)[1]
    assert rgb is not None
    return rgb
