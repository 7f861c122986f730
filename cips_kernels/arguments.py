"""From what a user passes to a checked call: every error is raised here, before anything is launched.

Messages name the argument, what came and what was expected. Shapes in messages use the letters of the documentation:
B images, P pixels, I and O channels.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from .activations import resolve_activation
from .packing import flatten
from .spec import StackInputs, StackSpec, accumulation_dtype

LAYOUTS = ("bpc", "bcp", "bchw")
COMPUTE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
Noise = int | Tensor | None
_ONE = {"weights": "weight", "styles": "style", "biases": "bias", "noise_strengths": "noise_strength"}


def describe(value: object) -> str:
    """A short description of what came: dtype, shape and device of a tensor, or the value itself."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)} on {value.device}"
    return f"{type(value).__name__} {value!r}"


def expect_shape(name: str, tensor: Tensor, shape: Sequence[int | None], letters: str) -> None:
    """Raise ValueError unless `tensor` has `shape` (None matches any size)."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor {letters}, got {describe(tensor)}")
    ok = tensor.dim() == len(shape) and all(want is None or got == want for got, want in zip(tensor.shape, shape))
    if not ok:
        sizes = ", ".join("any" if want is None else str(want) for want in shape)
        raise ValueError(f"{name}: expected {letters} = [{sizes}], got {describe(tensor)}")


def expect_device(name: str, tensor: Tensor, x: Tensor, of: str = "x") -> None:
    """Raise ValueError unless `tensor` is where `x` (called `of` in the message) is."""
    if tensor.device != x.device:
        raise ValueError(f"{name}: is on {tensor.device} but {of} is on {x.device}; move both to one device")


def expect_parameter(name: str, tensor: Tensor, x: Tensor, of: str = "x") -> None:
    """Raise unless a parameter can go with `x`: same device; the dtype of `x` or float32 (float64 with float64)."""
    expect_device(name, tensor, x, of)
    wide = accumulation_dtype(x.dtype)
    allowed = {wide} if x.dtype in (torch.float32, torch.float64) else {wide, x.dtype}
    if tensor.dtype not in allowed:
        names = " or ".join(sorted(str(dtype).removeprefix("torch.") for dtype in allowed))
        raise TypeError(f"{name}: expected {names} to go with {of} of {x.dtype}, got {describe(tensor)}")


def expect_scalar(name: str, tensor: Tensor, x: Tensor) -> None:
    """Raise unless `tensor` is a parameter of one value that can go with `x`."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor of one value, got {describe(tensor)}")
    if tensor.numel() != 1:
        raise ValueError(f"{name}: expected one value, got {describe(tensor)}")
    expect_parameter(name, tensor, x)


def expect_finite(name: str, tensor: Tensor) -> None:
    """Raise ValueError where `tensor` holds NaN or infinity.

    Always on for tensors on the CPU. On a GPU a check would stop the stream, so there it runs only with
    CIPS_KERNELS_CHECK=1; without it a NaN style gives NaN in its own image alone.
    """
    if torch.compiler.is_compiling() or torch._C._functorch.maybe_current_level() is not None:
        return
    if tensor.device.type != "cpu" and os.environ.get("CIPS_KERNELS_CHECK") != "1":
        return
    if tensor.is_meta or torch._subclasses.fake_tensor.is_fake(tensor):
        return
    if not bool(torch.isfinite(tensor.detach()).all()):
        where = torch.nonzero(~torch.isfinite(tensor.detach()))[0].tolist()
        raise ValueError(f"{name}: expected finite values, got {tensor[tuple(where)].item()} at index {where}")


def autocast_on(device: torch.device) -> bool:
    """Whether autocast is on for tensors of `device`."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def as_compute(x: Tensor, name: str = "x") -> Tensor:
    """`x` in its compute dtype: autocast's where autocast is on, its own otherwise."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a floating-point tensor, got {describe(x)}")
    if x.dtype not in COMPUTE_DTYPES:
        raise TypeError(f"{name}: expected float16, bfloat16, float32 or float64, got {describe(x)}")
    if x.dtype != torch.float64 and autocast_on(x.device):
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x


def infer_layout(x: Tensor, channels: int, layout: str | None) -> str:
    """The layout of `x`: the given one, or the only one that `channels` allows.

    Raises:
        ValueError: unknown layout, wrong rank, no dimension of `channels`, or both dimensions of that size.
    """
    if layout is not None and layout not in LAYOUTS:
        raise ValueError(f"layout: expected one of {', '.join(LAYOUTS)}, got {layout!r}")
    if x.dim() == 4:
        layout = layout or "bchw"
    if layout is None and x.dim() == 3:
        fits = [name for name, dim in (("bpc", 2), ("bcp", 1)) if x.shape[dim] == channels]
        if len(fits) == 2:
            raise ValueError(
                f"layout: x {list(x.shape)} reads as [B, P, {channels}] and as [B, {channels}, P]; "
                "pass layout='bpc' or layout='bcp'"
            )
        layout = fits[0] if fits else None
    rank, dim = (4, 1) if layout == "bchw" else (3, 1 if layout == "bcp" else 2)
    if x.dim() != rank or x.shape[dim] != channels:
        wanted = {"bchw": f"[B, {channels}, H, W]", "bcp": f"[B, {channels}, P]", "bpc": f"[B, P, {channels}]"}
        expected = wanted[layout] if layout else f"{wanted['bpc']}, {wanted['bcp']} or {wanted['bchw']}"
        raise ValueError(f"x: expected {expected}, got {describe(x)}")
    return str(layout)


def to_pixels(x: Tensor, layout: str) -> Tensor:
    """A view `[B, P, C]` of `x`; copies only a `[B, C, H, W]` whose rows and columns are not evenly spaced."""
    if layout == "bchw":
        if x.is_contiguous(memory_format=torch.channels_last):
            return x.permute(0, 2, 3, 1).flatten(1, 2)
        return x.flatten(2).transpose(1, 2)
    return x.transpose(1, 2) if layout == "bcp" else x


def from_pixels(y: Tensor, layout: str, like: Tensor) -> Tensor:
    """The inverse view, with the height and width of `like`."""
    if layout == "bchw":
        return y.transpose(1, 2).unflatten(2, like.shape[2:])
    return y.transpose(1, 2) if layout == "bcp" else y


def skip_to_pixels(skip: Tensor | None, layout: str, x: Tensor) -> Tensor | None:
    """A skip `[B, P, C]` from the layout of `x`; its number of pixels and channels is checked by `stack_call`."""
    if skip is None:
        return None
    letters = {"bchw": "[B, C, H, W]", "bcp": "[B, C, P]", "bpc": "[B, P, C]"}[layout]
    expect_shape("skip", skip, (None, None, *x.shape[2:]) if layout == "bchw" else (None, None, None), letters)
    return to_pixels(skip, layout)


def as_seed(value: int, device: torch.device) -> Tensor:
    """An int64 scalar made on `device` by a fill: no copy from the host, so it can be captured in a CUDA graph."""
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"noise: expected a seed in [-2**63, 2**63), got {value}")
    return torch.full((), value, dtype=torch.int64, device=device)


def split_noise(noise: Noise, depth: int, batch: int, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """`noise` as `(seed, given)`: int or int64 scalar is a seed, `[L, B, P]` (or `[B, P]` for one layer) is given."""
    if noise is None:
        return None, None
    if isinstance(noise, bool) or not isinstance(noise, int | Tensor):
        raise TypeError(f"noise: expected None, an int seed or a tensor, got {describe(noise)}")
    if isinstance(noise, int):
        return as_seed(noise, x.device), None
    expect_device("noise", noise, x)
    if noise.dtype == torch.int64 and noise.dim() == 0:
        return noise, None
    if not noise.is_floating_point():
        raise TypeError(f"noise: expected a floating-point tensor or an int64 scalar seed, got {describe(noise)}")
    given = noise.unsqueeze(0) if depth == 1 and noise.dim() == 2 else noise
    expect_shape("noise", given, (depth, batch, x.shape[1]), "[L, B, P]" if depth != 1 else "[B, P]")
    return None, given.to(accumulation_dtype(x.dtype))


def check_save(save: str) -> str:
    """`save`, or ValueError where nothing is called so."""
    if save not in ("all", "some", "none"):
        raise ValueError(f"save: expected 'all', 'some' or 'none', got {save!r}")
    return save


def check_scalars(negative_slope: float, gain: float, eps: float) -> None:
    """The ranges for which the sign of a leaky ReLU's output tells the sign before it."""
    for name, value, strict in (("negative_slope", negative_slope, False), ("gain", gain, True), ("eps", eps, False)):
        # plain comparisons, which a compiler can trace; NaN fails them
        if not (isinstance(value, (int, float)) and 0 <= value < math.inf) or (strict and value == 0):
            raise ValueError(f"{name}: expected a finite number {'above 0' if strict else 'of at least 0'}, got {value!r}")


def check_blocks(blocks: Sequence[Sequence[int]], depth: int) -> tuple[tuple[int, int], ...]:
    """Residual blocks as a tuple of (first, last) layers, in order and apart.

    Raises:
        TypeError: not pairs of ints.
        ValueError: a layer that is not there, or blocks that overlap or stand in another order.
    """
    found: list[tuple[int, int]] = []
    after = -1
    for k, block in enumerate(blocks):
        pair = tuple(block) if isinstance(block, Sequence) else ()
        if len(pair) != 2 or not all(isinstance(n, int) and not isinstance(n, bool) for n in pair):
            raise TypeError(f"blocks[{k}]: expected (first, last) layer, got {block!r}")
        first, last = pair
        if not after < first <= last < depth:
            order = "" if after < 0 else f", behind layer {after} of the block before"
            raise ValueError(f"blocks[{k}]: expected 0 <= first <= last < {depth}{order}, got ({first}, {last})")
        found.append((first, last))
        after = last
    return tuple(found)


def check_skip_weights(
    skip_weights: Sequence[Tensor | None], blocks: tuple[tuple[int, int], ...], widths: Sequence[int], x: Tensor
) -> list[Tensor]:
    """The matrices of the blocks' skips, those that there are, of `skip_weights`: one entry a block, None where the
    skip is the identity; or none at all where every one is."""
    entries = list(skip_weights) or [None] * len(blocks)
    if len(entries) != len(blocks):
        raise ValueError(f"skip_weights: expected {len(blocks)} entries, one for each block, got {len(entries)}")
    for k, (weight, (first, last)) in enumerate(zip(entries, blocks)):
        name, in_features, out_features = f"skip_weights[{k}]", widths[first], widths[last + 1]
        if in_features == out_features:
            if weight is not None:
                kept = f"since the block keeps {in_features} channels"
                raise ValueError(f"{name}: expected None, {kept}, got {describe(weight)}")
            continue
        expect_shape(name, weight, (out_features, in_features), "[O, I]")
        expect_parameter(name, weight, x)
    return [weight for weight in entries if weight is not None]


def check_blend(blend: Tensor, batch: int, count: int, x: Tensor) -> Tensor:
    """Weights `[P, K]` or `[B, P, K]` of `count` styles at each pixel of `x`, in the dtype of the parameters."""
    if not isinstance(blend, Tensor) or not blend.is_floating_point():
        raise TypeError(f"blend: expected a floating-point tensor [P, K] or [B, P, K], got {describe(blend)}")
    expect_device("blend", blend, x)
    shape = (x.shape[1], count) if blend.dim() == 2 else (batch, x.shape[1], count)
    expect_shape("blend", blend, shape, "[P, K]" if blend.dim() == 2 else "[B, P, K]")
    expect_finite("blend", blend)
    return blend.to(accumulation_dtype(x.dtype))


def check_coords(coords: Tensor | None, batch: int, x: Tensor) -> Tensor | None:
    """Coordinates as float32 `[P, 2]` or `[B, P, 2]` on the device of `x`, or None."""
    if coords is None:
        return None
    if not isinstance(coords, Tensor) or not coords.is_floating_point():
        raise TypeError(f"coords: expected a floating-point tensor [P, 2] or [B, P, 2], got {describe(coords)}")
    expect_device("coords", coords, x)
    shape = (x.shape[1], 2) if coords.dim() == 2 else (batch, x.shape[1], 2)
    expect_shape("coords", coords, shape, "[P, 2] or [B, P, 2]")
    return coords.detach().float()


def stack_call(
    x: Tensor,
    weights: Sequence[Tensor],
    styles: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    noise_strengths: Sequence[Tensor | None],
    rgb_weights: Sequence[Tensor] = (),
    rgb_styles: Sequence[Tensor] = (),
    rgb_biases: Sequence[Tensor | None] = (),
    rgb_after: Sequence[int] = (),
    skip: Tensor | None = None,
    *,
    noise: Noise = None,
    coords: Tensor | None = None,
    demodulate: bool = True,
    negative_slope: float = 0.2,
    gain: float | None = None,
    eps: float = 1e-8,
    activation: str = "lrelu",
    first_layer: int = 0,
    blocks: Sequence[Sequence[int]] = (),
    skip_weights: Sequence[Tensor | None] = (),
    blend: Tensor | None = None,
    single: bool = False,
) -> tuple[StackInputs, StackSpec]:
    """Check a stack's arguments (`x` and `skip` pixel-major already) and gather them as flat tensors.

    `single`: the call is one layer or one ToRGB, whose arguments messages call `weight`, `style`, `bias`, `noise_strength`.
    """

    def label(prefix: str, kind: str, k: int) -> str:
        return _ONE[kind] if single else f"{prefix}{kind}[{k}]"

    kind, negative_slope, gain = resolve_activation(activation, negative_slope, gain)
    check_scalars(negative_slope, gain, eps)
    if not 0 <= first_layer < 2**31:
        raise ValueError(f"layer: expected a number in [0, 2**31), got {first_layer!r}")
    counts = {"styles": (styles, weights), "biases": (biases, weights), "noise_strengths": (noise_strengths, weights),
              "rgb_styles": (rgb_styles, rgb_weights), "rgb_biases": (rgb_biases, rgb_weights),
              "rgb_after": (rgb_after, rgb_weights)}  # fmt: skip
    for name, (got, want) in counts.items():
        if len(got) != len(want):
            raise ValueError(f"{name}: expected {len(want)} entries, one for each weight, got {len(got)}")
    if not weights and not rgb_weights:
        raise ValueError("weights: expected at least one layer or ToRGB, got none")
    every_weight, every_style = [*weights, *rgb_weights], [*styles, *rgb_styles]
    first_style = label("" if styles else "rgb_", "styles", 0)
    style_letters = "[B, I]" if blend is None else "[B, K, I]"
    expect_shape(first_style, every_style[0], (None,) * (2 if blend is None else 3), style_letters)
    batch = every_style[0].shape[0]
    if x.shape[0] not in (1, batch) or (x.shape[0] == 1 and batch == 0):
        raise ValueError(f"{first_style}: expected the batch size of x, {x.shape[0]}, got {describe(every_style[0])}")
    wide = accumulation_dtype(x.dtype)
    styles_of_image = () if blend is None else (every_style[0].shape[1],)
    if styles_of_image == (0,):
        raise ValueError(f"{first_style}: expected at least one style to blend, got {describe(every_style[0])}")

    def parameters(prefix: str, group: Sequence[Tensor], group_styles: Sequence[Tensor], inputs: Sequence[int]) -> None:
        for k, (weight, style, width) in enumerate(zip(group, group_styles, inputs)):
            expect_shape(label(prefix, "weights", k), weight, (None, width), "[O, I]")
            expect_parameter(label(prefix, "weights", k), weight, x)
            expect_shape(label(prefix, "styles", k), style, (batch, *styles_of_image, width), style_letters)
            expect_parameter(label(prefix, "styles", k), style, x)
            expect_finite(label(prefix, "styles", k), style)

    widths = [x.shape[2]]
    for k, weight in enumerate(weights):
        expect_shape(label("", "weights", k), weight, (None, None), "[O, I]")
        widths.append(weight.shape[0])
    parameters("", weights, styles, widths[:-1])
    for k, after in enumerate(rgb_after):
        if not -1 <= after < len(weights):
            raise ValueError(f"rgb_after[{k}]: expected a layer from -1 (the input) to {len(weights) - 1}, got {after}")
    parameters("rgb_", rgb_weights, rgb_styles, [widths[after + 1] for after in rgb_after])
    channels = rgb_weights[0].shape[0] if rgb_weights else 0
    flat_biases = []
    for prefix, group, group_weights in (("", biases, weights), ("rgb_", rgb_biases, rgb_weights)):
        for k, (bias, weight) in enumerate(zip(group, group_weights)):
            if prefix and weight.shape[0] != channels:
                raise ValueError(f"rgb_weights[{k}]: expected {channels} output channels as the first, got {describe(weight)}")
            if bias is not None:
                expect_shape(label(prefix, "biases", k), bias, (weight.shape[0],), "[O]")
                expect_parameter(label(prefix, "biases", k), bias, x)
            flat_biases.append(x.new_zeros(weight.shape[0], dtype=wide) if bias is None else bias.to(wide))
    strengths = []
    for k, strength in enumerate(noise_strengths):
        if strength is not None:
            expect_scalar(label("", "noise_strengths", k), strength, x)
        strengths.append(x.new_ones(1, dtype=wide) if strength is None else strength.reshape(1).to(wide))
    if skip is not None:
        if not rgb_weights:
            raise ValueError("skip: expected None without a ToRGB, got " + describe(skip))
        expect_shape("skip", skip, (batch, x.shape[1], channels), "[B, P, C]")
        expect_device("skip", skip, x)
        if not skip.is_floating_point():
            raise TypeError(f"skip: expected a floating-point tensor, got {describe(skip)}")
    seed, given = split_noise(noise, len(weights), batch, x)
    pairs = check_blocks(blocks, len(weights))
    every_weight += check_skip_weights(skip_weights, pairs, widths, x)
    spec = StackSpec(
        tuple(widths), tuple(rgb_after), max(channels, 1), demodulate, float(negative_slope), float(gain), float(eps),
        first_layer, pairs, kind,
    )  # fmt: skip
    inputs = StackInputs(
        x,
        flatten(every_weight, wide),
        flatten(every_style, wide, dim=-1).contiguous(),
        flatten(flat_biases, wide),
        flatten(strengths, wide) if strengths else x.new_zeros(0, dtype=wide),
        skip,
        seed,
        given,
        check_coords(coords, batch, x),
        None if blend is None else check_blend(blend, batch, styles_of_image[0], x),
    )
    return inputs, spec
