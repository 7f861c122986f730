"""Generators of the official code, `CIPSskip` and `CIPSres`: their state dicts and checkpoints, read and written.

Everything is told by the keys' names and shapes: the class, the widths, the table, the mapping network's depth. A
parameter here is the official one in another shape, except that the table has its channels last.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import grids
from .config import GeneratorConfig, layer_fields
from .errors import UsageError
from .states import check_state, read_torch_file

GENERATORS = ("g_ema", "g")  # of a training checkpoint, the one to prefer first
SINES = ("sin", "sinrelu")  # `activation` of the official classes, whose keys are the same
_SINE_BIAS = re.compile(r"(conv1|linears\.\d+(\.conv[12])?)\.bias")
_RESIDUAL = re.compile(r"to_rgb_last\.|linears\.\d+\.conv[12]\.")
_NUMBERED = re.compile(r"(linears|to_rgbs|style)\.(\d+)\.")


class Entry(NamedTuple):
    """A tensor of an official state dict and the parameter that it is."""

    key: str
    shape: tuple[int, ...]
    parameter: str
    parameter_shape: tuple[int, ...]

    def to_parameter(self, value: Tensor) -> Tensor:
        """The parameter, a view of the official tensor where that is possible."""
        if self.key == "emb.input":
            return value[0].permute(1, 2, 0)
        return value.reshape(self.parameter_shape)

    def to_official(self, parameter: Tensor) -> Tensor:
        """The inverse, in memory of its own."""
        if self.key == "emb.input":
            parameter = parameter.permute(2, 0, 1)
        return parameter.reshape(self.shape).clone(memory_format=torch.contiguous_format)


def read_official(
    source: str | os.PathLike[str] | Mapping[str, Any], which: str | None, wanted: tuple[str, ...]
) -> tuple[str, dict[str, Tensor]]:
    """The state dict in an official file or mapping, checked to be nothing but named floating-point tensors.

    Args:
        source: a path, a bare state dict, or a checkpoint of several (`g`, `d`, `g_ema`, ...); keys may all begin with
            `module.`, as `DistributedDataParallel` leaves them.
        which: the checkpoint's state dict to take; None: the first of `wanted` that is there.
        wanted: names of suitable state dicts.

    Returns:
        What to call it in a message, and the state dict, all of one dtype: float64, or else float32, to which shorter
        ones are widened.

    Raises:
        UsageError: no such file, a file that is not whole, no such state dict in it, a value that is not a tensor.
        TypeError: `source` is neither a path nor a mapping.
    """
    if isinstance(source, Mapping):
        name, state = "state dict", source
    elif isinstance(source, (str, os.PathLike)):
        name, state = str(Path(source)), read_torch_file(source, "checkpoint of the official code")
    else:
        raise TypeError(f"state_dict_or_path: expected a path or a state dict, got {type(source).__name__}")
    if not isinstance(state, Mapping):
        raise UsageError(f"{name}: expected a state dict or a dict of several, got {type(state).__name__}")
    held = [key for key, value in state.items() if isinstance(value, Mapping)]
    if held or not state:
        chosen = which if which is not None else next((key for key in wanted if key in held), None)
        if chosen not in held:
            expected = " or ".join(wanted) if which is None else which
            raise UsageError(f"{name}: expected a state dict {expected}, holds {', '.join(map(str, held)) or 'nothing'}")
        name, state = f"{name}: {chosen}", state[chosen]
    elif which is not None:
        raise UsageError(f"{name}: holds one state dict and no {which!r}; leave out which")
    return name, named_tensors(name, state)


def named_tensors(name: str, state: Mapping[str, Any]) -> dict[str, Tensor]:
    """A state dict without the `module.` of its keys, in its order, checked and of one dtype as `read_official` says.

    Raises:
        UsageError: a value that is not a floating-point tensor; float64 beside others.
    """
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor) or not value.is_floating_point():
            came = f"a tensor of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
            raise UsageError(f"{name}: key {key!r}: expected a floating-point tensor, got {came}")
    if all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    double = [key for key, value in state.items() if value.dtype == torch.float64]
    if double and len(double) < len(state):
        other = next(key for key in state if key not in double)
        raise UsageError(f"{name}: expected tensors of one dtype, but {double[0]!r} is float64 and {other!r} {state[other].dtype}")
    return {key: value.to(torch.float64 if double else torch.float32) for key, value in state.items()}


def official_generator_config(
    name: str,
    state: Mapping[str, Tensor],
    size: int | tuple[int, int] | None = None,
    mapping_lr_mul: float = 0.01,
    activation: str | None = None,
) -> GeneratorConfig:
    """The architecture of an official generator's state dict, all of whose keys and shapes agree with it.

    Args:
        name: what to call the state dict in a message.
        state: as `read_official` returns it.
        size: (height, width) of the image; None: of the table.
        mapping_lr_mul: the factor of the mapping network, which no shape tells.
        activation: "sin" or "sinrelu" where layers have a sine; None where they have leaky ReLUs.

    Raises:
        UsageError: another kind of state dict, an activation that the keys contradict or do not settle, a key missing,
            extra or misshapen.
        ValueError: an activation that the official classes do not have.
    """
    if not {"emb.input", "lff.ffm.conv.weight"} & set(state):
        some = ", ".join(list(state)[:3]) or "none"
        raise UsageError(
            f"{name}: not a generator of the official CIPS code: expected keys emb.input and lff.ffm.conv.weight, got {some}"
        )
    if activation not in (None, *SINES):
        raise ValueError(f"activation: expected None, {' or '.join(map(repr, SINES))}, got {activation!r}")
    sine = sine_key(state)
    if sine is not None and activation is None:
        raise UsageError(
            f"{name}: key {sine!r} belongs to a layer with a sine, and no key tells whether its activation is"
            f" {' or '.join(map(repr, SINES))}: give activation= (from the shell: cips convert --activation)"
        )
    if sine is None and activation is not None:
        raise UsageError(f"{name}: expected layers with a sine (keys like conv1.bias) for activation {activation!r}, got leaky ReLUs")
    (fourier,) = _shape(name, state, "lff.ffm.conv.weight", "[F, 2, 1, 1]")
    table, *table_size = _shape(name, state, "emb.input", "[1, T, S, S]")
    style_dim, _ = _shape(name, state, "style.1.weight", "[D, D]")
    counts = {"linears": 0, "to_rgbs": 0, "style": 0}
    for match in filter(None, map(_NUMBERED.match, state)):
        # no more than there are keys, lest a number from a damaged file become a loop
        counts[match[1]] = max(counts[match[1]], min(int(match[2]), len(state)) + 1)
    residual = any(map(_RESIDUAL.match, state))
    blocks = counts["linears"] - 1 if residual else max((counts["linears"] + 1) // 2, counts["to_rgbs"])
    prefixes = _prefixes(max(blocks, 1), residual)
    widths = tuple(_shape(name, state, f"{prefix}.conv.weight", "[1, O, I, 1, 1]")[0] for prefix in prefixes)
    size = tuple(table_size) if size is None else grids.as_size(size)
    config = GeneratorConfig(
        size=size,
        style_dim=style_dim,
        mapping_layers=counts["style"] - 1,
        mapping_lr_mul=mapping_lr_mul,
        fourier_features=fourier,
        table_features=table,
        table_size=None if size == tuple(table_size) else tuple(table_size),
        residual=residual,
        activation=activation or "lrelu",
        **layer_fields(widths),
    )
    expected = {entry.key: torch.empty(entry.shape, device="meta") for entry in entries(config)}
    check_state(name, state, expected)
    return config


def sine_key(state: Mapping[str, Tensor]) -> str | None:
    """A key that only the classes with a sine have; None where layers have leaky ReLUs."""
    return next((key for key in state if _SINE_BIAS.fullmatch(key)), None)


def _shape(name: str, state: Mapping[str, Tensor], key: str, form: str) -> tuple[int, ...]:
    """The sizes that `form` has letters for, of the tensor `key`."""
    if key not in state:
        raise UsageError(f"{name}: key {key!r} is missing")
    shape, letters = tuple(state[key].shape), form.strip("[]").split(", ")
    fits = len(shape) == len(letters) and all(a.isalpha() or int(a) == n for a, n in zip(letters, shape))
    if not fits or 0 in shape:
        raise UsageError(f"{name}: key {key!r}: expected shape {form}, got {list(shape)}")
    return tuple(n for a, n in zip(letters, shape) if a.isalpha())


def _prefixes(blocks: int, residual: bool) -> list[str]:
    """Where each modulated layer stands, in the order of computation."""
    if residual:
        return ["linears.0", *(f"linears.{b}.conv{k}" for b in range(1, blocks + 1) for k in (1, 2))]
    return ["conv1", *(f"linears.{k}" for k in range(2 * blocks))]


def entries(config: GeneratorConfig) -> list[Entry]:
    """Every tensor of the official state dict, in its order, and the parameter of `Generator` that it is.

    Raises:
        ValueError: the official classes have no such architecture.
    """
    widths = config.layer_widths
    last, blocks = len(widths) - 1, (len(widths) - 1) // 2
    colours = (last,) if config.residual else tuple(range(2, last + 1, 2))
    for field, value, expected, ok in (
        ("fourier_features", config.fourier_features, "at least 1", config.fourier_features > 0),
        ("fourier_bias", config.fourier_bias, "one", config.fourier_bias),
        ("table_features", config.table_features, "at least 1", config.table_features > 0),
        ("n_layers", len(widths), "one layer and then pairs, at least 3", len(widths) % 2 == 1 and blocks > 0),
        ("rgb_after", config.rgb_layers, f"{colours}", config.rgb_layers == colours),
    ):
        if not ok:
            raise ValueError(f"{field}: the official classes have {expected}, got {value}")
    rows, columns = config.table_size or config.size
    fourier, table, dim = config.fourier_features, config.table_features, config.style_dim
    found = [
        Entry("lff.ffm.conv.weight", (fourier, 2, 1, 1), "encoding.fourier.weight", (fourier, 2)),
        Entry("lff.ffm.conv.bias", (fourier,), "encoding.fourier.bias", (fourier,)),
        Entry("emb.input", (1, table, rows, columns), "encoding.table.weight", (rows, columns, table)),
    ]
    inputs = (fourier + table, *widths)
    for layer, prefix in enumerate(_prefixes(blocks, config.residual)):
        i, o = inputs[layer], inputs[layer + 1]
        parameter = f"synthesis.layers.{layer}"
        parts = _modulated(f"{prefix}.conv", parameter, i, o, dim)
        parts.append(Entry(f"{prefix}.noise.weight", (1,), f"{parameter}.noise_strength", ()))
        if config.activation == "lrelu":
            found += [*parts, Entry(f"{prefix}.activate.bias", (o,), f"{parameter}.bias", (o,))]
        else:
            # a module's own parameters stand before those of its parts
            found += [Entry(f"{prefix}.bias", (1, o, 1, 1), f"{parameter}.bias", (o,)), *parts]
        if config.residual and prefix.endswith("conv2") and inputs[layer - 1] != o:
            block, entered = layer // 2, inputs[layer - 1]
            skip = (o, entered)
            found.append(Entry(f"linears.{block}.skip.0.weight", (*skip, 1, 1), f"synthesis.skips.{block - 1}", skip))
    for k, layer in enumerate(colours):
        prefix, parameter = "to_rgb_last" if config.residual else f"to_rgbs.{k}", f"synthesis.to_rgbs.{k}"
        found.append(Entry(f"{prefix}.bias", (1, 3, 1, 1), f"{parameter}.bias", (3,)))
        found += _modulated(f"{prefix}.conv", parameter, widths[layer], 3, dim)
    for k in range(1, config.mapping_layers + 1):
        found += [
            Entry(f"style.{k}.weight", (dim, dim), f"mapping.{k}.weight", (dim, dim)),
            Entry(f"style.{k}.bias", (dim,), f"mapping.{k}.bias", (dim,)),
        ]
    return found


def _modulated(prefix: str, parameter: str, i: int, o: int, dim: int) -> list[Entry]:
    return [
        Entry(f"{prefix}.weight", (1, o, i, 1, 1), f"{parameter}.weight", (o, i)),
        Entry(f"{prefix}.modulation.weight", (i, dim), f"{parameter}.affine.weight", (i, dim)),
        Entry(f"{prefix}.modulation.bias", (i,), f"{parameter}.affine.bias", (i,)),
    ]
