"""Launcher of the on-chip stack (csrc/kernels/stack_fwd.cuh): forward only, activations never in memory.

It serves calls that want colours and no gradients, in bfloat16 and float16. The first layer's input is a tensor, or an
`Encoding`: then Fourier features are made on chip from the coordinates, and only the table's embeddings are read.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .cuda import _DTYPES, _load
from .encoding import OWN, Encoding, cut_noise, tiles
from .spec import StackInputs, StackSaved, StackSpec

MAX_WIDTH = 512  # channels that the registers of a warpgroup hold for 64 pixels
MAX_INPUT = 1024
MAX_LAYERS = 64
MAX_RGBS = 24
MAX_CHANNELS = 3
_COPY_PIXELS = 65536  # of a copy of the input, where its layout needs one: 128 MB at 1,024 channels
LAUNCH_PIXELS = 1 << 22  # of a launch, at most: 34 MB of coordinates or of a blend's weights, where they have to be converted
_TILE_WAVES = 4  # waves of all multiprocessors in a tile of embeddings: 69 MB at 512 channels on 132 of them


class Prepared(NamedTuple):
    """A call's weights as the kernel reads them: modulated, folded, tiled."""

    plan: object  # cips_kernels._cuda.StackPlan
    slabs: Tensor
    records: Tensor
    fourier: Tensor | None
    rgb_bias: Tensor
    kept: Tensor | None  # memory for the inputs of residual blocks, 17 MB on 132 multiprocessors


class Made(NamedTuple):
    """Rows of the first layer's streamed input that the kernel makes itself, a multiprocessor's next ones while it works."""

    source: Tensor  # of blends the rows, `[1 or B, P, T]` of 16-bit values; otherwise a float32 table `[S_h, S_w, T]`
    styles: Tensor | None = None  # of blends, which a pixel's row is multiplied with: `[B, 2, T]`, rows of whole 8 channels
    exact: bool = False  # of a table, whether -1 and +1 are the centres of its border entries


class Places(NamedTuple):
    """Where the pixels of a launch lie: points (float32 `[P, 2]` or `[B, P, 2]`), or the full grid (rows, columns); and the
    number of the first in the grid and in the noise's counter."""

    coords: Tensor | None
    grid: tuple[int, int]
    first_pixel: int


def why_not(spec: StackSpec, dtype: torch.dtype) -> str | None:
    """None if the kernel can serve such a stack, otherwise the reason."""
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it computes in bfloat16 and float16, not in {dtype}"
    if spec.activation != "lrelu":
        return f"the activation is {spec.activation!r}, not a leaky ReLU"
    if any(first == 0 for first, _ in spec.blocks):
        return "a residual block begins at the input"
    if min(spec.rgb_after) < 0:
        return "a ToRGB reads the input"
    if spec.rgb_channels > MAX_CHANNELS:
        return f"ToRGBs have {spec.rgb_channels} channels, more than {MAX_CHANNELS}"
    if len(spec.rgb_after) > MAX_RGBS or spec.depth > MAX_LAYERS:
        return f"{spec.depth} layers and {len(spec.rgb_after)} ToRGBs are more than {MAX_LAYERS} and {MAX_RGBS}"
    if spec.widths[0] > MAX_INPUT or max(spec.widths[1:]) > MAX_WIDTH:
        return f"widths {spec.widths} exceed {MAX_INPUT} for the input or {MAX_WIDTH} for a layer"
    if not 0 <= spec.negative_slope < 0.9:
        return f"the leaky ReLU's slope {spec.negative_slope} is not in [0, 0.9)"
    return None


def why_not_encoding(e: Encoding) -> str | None:
    """None if the kernel can make such an encoding, otherwise the reason."""
    if not 1 <= e.fourier_weight.shape[0] <= MAX_WIDTH:
        return f"{e.fourier_weight.shape[0]} Fourier features are not 1 to {MAX_WIDTH}"
    if e.table is not None and e.table.shape[2] > MAX_WIDTH:
        return f"the table has {e.table.shape[2]} channels, more than {MAX_WIDTH}"
    if e.pixels >= 2**62:
        return f"{e.pixels} pixels are too many"
    return None


@lru_cache(maxsize=256)
def make_plan(spec: StackSpec, batch: int, held: int, styles: int = 0):  # -> cips_kernels._cuda.StackPlan
    packing = spec.packing(batch)
    depth = max(spec.rgb_after) + 1  # what no ToRGB reads is not computed

    def row(m):
        return (m.out_features, m.in_features, m.weight_offset, m.style_offset, m.bias_offset)

    layers, rgbs = [row(m) for m in packing.layers[:depth]], [row(m) for m in packing.rgbs]
    blocks = [
        (first, last, -1 if skip is None else skip.weight_offset)
        for (first, last), skip in zip(spec.blocks, packing.skips)
        if last < depth
    ]
    return _load().StackPlan(layers, rgbs, list(spec.rgb_after), blocks, held, batch, styles)


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def prepare(inputs: StackInputs, spec: StackSpec, dtype: torch.dtype, e: Encoding | None = None) -> Prepared:
    """Modulate and tile every weight of a call, in one launch."""
    batch, device = inputs.batch, inputs.weights.device
    held = min(spec.widths[0], MAX_WIDTH) if e is None else e.fourier_weight.shape[0]
    plan = make_plan(spec, batch, held)
    slabs = torch.empty((batch, plan.slab_bytes), dtype=torch.uint8, device=device)
    records = torch.empty((batch, plan.record_bytes), dtype=torch.uint8, device=device)
    rgb_bias = torch.empty(MAX_CHANNELS, dtype=torch.float32, device=device)
    fourier = None if e is None else torch.empty((-(-held // 64), 48, 4), dtype=torch.float32, device=device)
    weight = None if e is None else e.fourier_weight.float().contiguous()
    bias = None if e is None else e.fourier_bias.float().contiguous()
    _load().stack_pack(
        plan,
        weights=inputs.weights.data_ptr(),
        styles=inputs.styles.data_ptr(),
        style_stride=inputs.styles.stride(0),
        kind_stride=0,
        biases=inputs.biases.data_ptr(),
        strengths=inputs.noise_strengths.data_ptr(),
        fourier_weight=_address(weight),
        fourier_bias=_address(bias),
        slabs=slabs.data_ptr(),
        records=records.data_ptr(),
        fourier=_address(fourier),
        rgb_bias=rgb_bias.data_ptr(),
        dtype=_DTYPES[dtype],
        eps=spec.eps,
        gain=spec.gain,
        negative_slope=spec.negative_slope,
        demodulate=spec.demodulate,
        device=device.index,
        stream=_stream(device),
    )
    kept = None
    if spec.blocks:
        kept = torch.empty(_load().stack_kept_bytes(_DTYPES[dtype], device.index), dtype=torch.uint8, device=device)
    return Prepared(plan, slabs, records, fourier, rgb_bias, kept)


def _noise_mode(inputs: StackInputs, encoded: bool) -> str:
    if inputs.noise is not None:
        return "given"
    if inputs.seed is None:
        return "off"
    return "coords" if encoded or inputs.coords is not None else "index"


def launch(
    prepared: Prepared,
    inputs: StackInputs,
    spec: StackSpec,
    dtype: torch.dtype,
    held: Tensor | None,
    streamed: Tensor | None,
    places: Places,
    rgb: Tensor,
    blend: Tensor | None = None,
    saved: StackSaved | None = None,
    made: Made | None = None,
) -> None:
    """The RGB sums `[B, P, C]` (float32, any strides) of the pixels of `rgb`.

    `held`: `[B or 1, P, I]`, of which the first 512 channels go to registers, or None for Fourier features; `streamed`:
    `[B or 1, P, T]`, the channels after those, or `made`. Given noise is of the same pixels. `blend`: contiguous float32
    `[P, 2]` or `[B, P, 2]`; then `held` comes times the pixel's style. `saved`: what training keeps of these pixels, to be
    filled.
    """
    memory = None if made is None else _made_memory(made, dtype, rgb.device)
    noise, coords = inputs.noise, places.coords
    mode = _noise_mode(inputs, held is None)
    outputs = saved and saved.features
    last = 0 if saved is None else saved.features.itemsize * rgb.shape[0] * rgb.shape[1] * sum(spec.widths[1:-1])
    _load().stack_forward(
        prepared.plan,
        slabs=prepared.slabs.data_ptr(),
        records=prepared.records.data_ptr(),
        fourier=_address(prepared.fourier),
        rgb_bias=prepared.rgb_bias.data_ptr(),
        blend=_address(blend),
        blend_batch_stride=blend.stride(0) if blend is not None and blend.dim() == 3 else 0,
        x=_address(held),
        x_strides=_strides(held),
        streamed=_address(streamed),
        streamed_strides=_strides(streamed),
        made=_made_values(made, memory),
        coords=_address(coords),
        coords_batch_stride=coords.stride(0) if coords is not None and coords.dim() == 3 else 0,
        grid=places.grid,
        first_pixel=places.first_pixel,
        noise_mode=mode,
        seed=_address(inputs.seed if mode in ("coords", "index") else None),
        noise=_address(noise),
        noise_strides=(noise.stride(0), noise.stride(1)) if noise is not None else (0, 0),
        first_image=0,
        first_layer=spec.first_layer,
        kept=_address(prepared.kept),
        activations=_address(outputs),
        features=_address(outputs) + last,
        signs=_address(saved and saved.mods),
        rgb=rgb.data_ptr(),
        rgb_strides=rgb.stride(),
        pixels=rgb.shape[1],
        dtype=_DTYPES[dtype],
        negative_slope=spec.negative_slope,
        device=rgb.device.index,
        stream=_stream(rgb.device),
    )


def _made_memory(made: Made, dtype: torch.dtype, device: torch.device) -> Tensor:
    size = _load().stack_made_bytes(made.source.shape[2], _DTYPES[dtype], device.index)
    return torch.empty(size, dtype=torch.uint8, device=device)


def _made_values(made: Made | None, memory: Tensor | None) -> tuple:
    if made is None:
        return 0, 0, 0, 0, 0, 0, 0, False
    source, addresses = made.source, (memory.data_ptr(), made.source.data_ptr())
    if made.styles is None:
        return *addresses, 0, source.stride(1) * source.itemsize, 0, source.shape[0], source.shape[1], made.exact
    return *addresses, *_strides(source), made.styles.data_ptr(), 0, 0, False


def _strides(t: Tensor | None) -> tuple[int, int]:
    """(batch, row) strides in bytes; batch 0 where one input serves all images."""
    if t is None:
        return 0, 0
    return (t.stride(0) * t.itemsize if t.shape[0] > 1 else 0), t.stride(1) * t.itemsize


def _readable(x: Tensor) -> bool:
    """Whether the kernel can read `x` `[B or 1, P, I]` as it lies: rows of whole 64 channels on 16 bytes."""
    rows = x.stride(2) == 1 and x.stride(1) % 8 == 0 and (x.shape[0] == 1 or x.stride(0) % 8 == 0)
    return rows and x.data_ptr() % 16 == 0 and (x.shape[2] % 64 == 0 or x.shape[2] > MAX_WIDTH)


def adjacent(noise: Tensor | None) -> Tensor | None:
    """Given noise with neighbouring pixels side by side."""
    return noise if noise is None or noise.stride(2) == 1 else noise.contiguous()


def forward(inputs: StackInputs, spec: StackSpec, rgb: Tensor, saved: StackSaved | None = None) -> None:
    """The RGB sum of a stack over `inputs.x`, into `rgb` `[B, P, C]`; a skip is added. `saved`: see `cuda_training`."""
    x, pixels = inputs.x, inputs.pixels
    prepared = prepare(inputs, spec, x.dtype)
    direct = _readable(x)
    copied = max(256, _COPY_PIXELS // x.shape[0])
    for first, count in tiles(pixels, pixels if direct or saved is not None else copied):
        part = x.narrow(1, first, count)
        if not direct:
            padded = x.new_zeros((x.shape[0], count, -(-x.shape[2] // 64) * 64))
            padded[:, :, : x.shape[2]] = part
            part = padded[:, :, : x.shape[2]] if x.shape[2] > MAX_WIDTH else padded
        coords = None if inputs.coords is None else inputs.coords.narrow(-2, first, count).contiguous()
        cut = inputs._replace(noise=adjacent(cut_noise(inputs.noise, first, count)))
        streamed = part[:, :, MAX_WIDTH:] if part.shape[2] > MAX_WIDTH else None
        launch(prepared, cut, spec, x.dtype, part, streamed, Places(coords, (0, 0), first), rgb.narrow(1, first, count), None, saved)
    if inputs.skip is not None:
        rgb += inputs.skip


def lookup(e: Encoding, dtype: torch.dtype, places: Places, count: int) -> Tensor:
    """Embeddings `[1 or B, count, T]` of `dtype`, rows on 16 bytes: `encoding.table_lookup` in one launch."""
    table = e.table.contiguous()
    rows, columns, features = table.shape
    out = torch.empty((e.images, count, -(-features // 8) * 8), dtype=dtype, device=table.device)
    coords = places.coords
    _load().table_lookup(
        table=table.data_ptr(),
        table_dtype=_DTYPES[table.dtype],
        rows=rows,
        columns=columns,
        features=features,
        coords=_address(coords),
        coords_batch_stride=coords.stride(0) if coords is not None and coords.dim() == 3 else 0,
        grid=places.grid,
        first_pixel=places.first_pixel,
        exact=e.lookup == "exact",
        out=out.data_ptr(),
        out_dtype=_DTYPES[dtype],
        row_stride=out.stride(1),
        images=e.images,
        pixels=count,
        device=table.device.index,
        stream=_stream(table.device),
    )
    return out[:, :, :features]


def as_it_lies(e: Encoding, dtype: torch.dtype) -> bool:
    """Whether the table's own entries are those of the pixels, as the kernel can read them."""
    table = e.table
    aligned = table.is_contiguous() and table.shape[2] % 8 == 0 and table.data_ptr() % 16 == 0
    return e.on_table_grid and aligned and table.dtype == dtype


def _looks_up(e: Encoding) -> bool:
    """Whether the kernel can interpolate the table itself, see stack_forward."""
    table, sides = e.table, (*e.table.shape[:2], *(e.size or ()))
    aligned = table.is_contiguous() and table.shape[2] % 64 == 0 and table.data_ptr() % 16 == 0
    small = max(sides) <= 2**23 and sides[0] * sides[1] < 2**30 and (e.size is None or e.pixels <= 2**31)
    return not e.on_table_grid and table.dtype == torch.float32 and aligned and small


def embeddings(e: Encoding, dtype: torch.dtype, places: Places, first: int, count: int) -> Tensor | None:
    """The table's part of the encoding of some pixels, `[1 or B, count, T]` of `dtype`, rows on 16 bytes."""
    if e.table is None:
        return None
    if e.on_table_grid and e.table.is_contiguous() and e.table.shape[2] % 8 == 0:
        rows = e.table.flatten(0, 1).narrow(0, first, count).to(dtype)  # a view where it has that dtype
        if rows.data_ptr() % 16 == 0:
            return rows.unsqueeze(0)
    if e.lookup == OWN:  # rows on 16 bytes
        features = e.table.shape[2]
        out = e.table.new_zeros((1, count, -(-features // 8) * 8), dtype=dtype)
        out[0, :, :features] = e.table.flatten(0, 1).narrow(0, first, count)
        return out[:, :, :features]
    return lookup(e, dtype, places, count)


def synthesis(e: Encoding, dtype: torch.dtype, inputs: StackInputs, spec: StackSpec, rgb: Tensor) -> None:
    """The RGB sums of every point of an encoding, into `rgb` `[B, P, C]`.

    What the kernel does not look up itself is made a tile at a time: memory beyond the result does not grow with the number
    of pixels.
    """
    prepared = prepare(inputs, spec, dtype, e)
    made = Made(e.table, None, e.lookup == "exact") if e.table is not None and _looks_up(e) else None
    whole = e.table is None or made is not None or as_it_lies(e, dtype)
    tile = LAUNCH_PIXELS if whole else max(256, _TILE_WAVES * wave(rgb.device.index) // e.images)
    for first, count in tiles(e.pixels, tile):
        coords = None if e.coords is None else e.coords.narrow(-2, first, count).float().contiguous()
        grid = (0, 0) if e.size is None else e.size
        # points come cut to the tile; a grid's pixels are told apart by their number
        places = Places(coords, grid, first)
        streamed = embeddings(e, dtype, places, first, count) if made is None else None
        cut = inputs._replace(noise=adjacent(cut_noise(inputs.noise, first, count)))
        launch(prepared, cut, spec, dtype, None, streamed, places, rgb.narrow(1, first, count), made=made)
        del streamed  # before the next is made


@lru_cache(maxsize=16)
def wave(device: int) -> int:
    """Pixels that the multiprocessors of a device work on at once, two each 256."""
    return torch.cuda.get_device_properties(device).multi_processor_count // 2 * 256
