"""Launchers of csrc/: modulate, forward and backward, the mapping network and affines; checks, allocation, stream.

The extension `cips_kernels._cuda` knows no tensors: it takes addresses, shapes, a device index and a stream.
Whatever an address cannot show is checked here. Importing this module loads no extension and touches no CUDA.
"""

from __future__ import annotations

import importlib
from functools import cache, lru_cache
from operator import attrgetter
from types import ModuleType

import torch
from torch import Tensor

from .packing import Packing, zero_gaps

_DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
_SHAPE = ("out_features", "in_features")
_PLACE = ("weight_offset", "style_offset", "mod_offset", "row_stride")
_FIELDS = attrgetter(*_SHAPE, *_PLACE, "demodulate")  # of a Matrix, in the order that ModulatePlan takes


@cache
def _extension() -> tuple[ModuleType | None, str]:
    """The compiled module, or why it cannot be loaded."""
    try:
        return importlib.import_module("cips_kernels._cuda"), ""
    except ModuleNotFoundError:
        return None, "the extension cips_kernels._cuda is not built; installing where nvcc is found builds it"
    except ImportError as error:
        return None, f"cips_kernels._cuda does not load: {error}"


@cache
def _capability(device: int | None) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def available(device: int | None = None) -> tuple[bool, str]:
    """Whether the CUDA kernels can serve, and if not, why not.

    Args:
        device: index of a CUDA device; None is the current one.
    """
    extension, reason = _extension()
    if extension is None:
        return False, reason
    if not torch.cuda.is_available():
        return False, "torch sees no CUDA device: none is there, no driver, or a torch built without CUDA"
    major, minor = _capability(device)
    # 90a is machine code for 9.0 alone: an "a" architecture runs on no other, older or newer.
    if f"{major}{minor}" not in {name.rstrip("af") for name in extension.architectures}:
        built = ", ".join(extension.architectures)
        return False, f"the device has compute capability {major}.{minor}, the extension is built for {built}"
    return True, ""


def _check(name: str, tensor: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    """Raises unless `tensor` is float32, of this shape, on this device and contiguous."""
    if tensor.device != device or device.type != "cuda":
        expected = device if device.type == "cuda" else "a CUDA device"
        raise ValueError(f"{name}: expected a tensor on {expected}, got one on {tensor.device}")
    if tensor.dtype != torch.float32:
        raise TypeError(f"{name}: expected torch.float32, got {tensor.dtype}")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: expected the packing's shape {list(shape)}, got {list(tensor.shape)}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor, got strides {tensor.stride()}")


def _check_aligned(name: str, tensor: Tensor) -> None:
    if tensor.data_ptr() % 16 != 0:
        raise ValueError(f"{name}: expected an address that is a multiple of 16, got {tensor.data_ptr():#x}")


def _check_inputs(weights: Tensor, styles: Tensor, packing: Packing) -> None:
    _check("weights", weights, (packing.weight_numel,), weights.device)
    _check("styles", styles, (packing.batch, packing.style_width), weights.device)


def _load() -> ModuleType:
    extension, reason = _extension()
    if extension is None:
        raise RuntimeError(reason)
    return extension


@lru_cache(maxsize=256)
def _plan(packing: Packing):  # -> cips_kernels._cuda.ModulatePlan
    return _load().ModulatePlan([_FIELDS(matrix) for matrix in packing.matrices], packing.batch)


def modulate(weights: Tensor, styles: Tensor, packing: Packing, dtype: torch.dtype, eps: float) -> Tensor:
    """Modulated weights of every matrix of a stack, in one launch.

    M = d V with V = c s W, c = 1 / sqrt(I) and d_i = rsqrt(sum_j V_ij^2 + eps), or d = 1 where the matrix does
    not demodulate. The oracle is `reference.modulate`.

    Args:
        weights: float32 `[packing.weight_numel]`, contiguous.
        styles: float32 `[B, packing.style_width]`, contiguous, on the same device.
        packing: where each matrix lies; at most 64 matrices.
        dtype: of the result: float32, float16 or bfloat16. Computed in float32 and rounded once.
        eps: added to the sum of squares under the root.

    Returns:
        `[packing.mod_numel]` of `dtype`, padding columns zero.

    Raises:
        TypeError: a tensor's dtype, or `dtype`.
        ValueError: a tensor's device, shape or strides, or too many matrices; names the argument.
        RuntimeError: the extension is missing, or CUDA refused the launch.
    """
    if dtype not in _DTYPES:
        raise TypeError(f"dtype: expected float32, float16 or bfloat16, got {dtype}")
    _check_inputs(weights, styles, packing)
    mods = torch.empty(packing.mod_numel, dtype=dtype, device=weights.device)
    if packing.batch == 0 or not packing.matrices:
        return mods.zero_()
    zero_gaps(mods, packing)
    with torch.cuda.device(weights.device):
        _load().modulate_forward(
            _plan(packing),
            weights=weights.data_ptr(),
            styles=styles.data_ptr(),
            style_stride=packing.style_width,
            mods=mods.data_ptr(),
            dtype=_DTYPES[dtype],
            eps=eps,
            device=weights.device.index,
            stream=torch.cuda.current_stream().cuda_stream,
        )
    return mods


def modulate_backward(
    grad_mods: Tensor, weights: Tensor, styles: Tensor, packing: Packing, eps: float
) -> tuple[Tensor, Tensor]:
    """Gradients of `modulate`, all in float32, the same bits from run to run.

    V and d are computed again from the float32 weights and styles, not read from the rounded mods:
    dV = d (N - M sum_j N M), dW = c sum_b s dV, ds = c sum_i W dV, with c = 1 / sqrt(I).

    Args:
        grad_mods: float32 `[packing.mod_numel]`, N in the packing of the mods; padding may hold anything.
        weights, styles, packing, eps: as given to `modulate`.

    Returns:
        Gradients of the weights `[packing.weight_numel]` and of the styles `[B, packing.style_width]`.

    Raises:
        TypeError, ValueError, RuntimeError: as in `modulate`.
    """
    _check_inputs(weights, styles, packing)
    _check("grad_mods", grad_mods, (packing.mod_numel,), weights.device)
    if packing.batch == 0 or not packing.matrices:
        return torch.zeros_like(weights), torch.zeros_like(styles)
    _check_aligned("grad_mods", grad_mods)
    plan = _plan(packing)
    grad_weights = torch.empty(weights.shape, dtype=torch.float32, device=weights.device)
    grad_styles = torch.empty(styles.shape, dtype=torch.float32, device=weights.device)
    with torch.cuda.device(weights.device):
        scratch = torch.empty(plan.scratch_numel, dtype=torch.float32, device=weights.device)
        _load().modulate_backward(
            plan,
            grad_mods=grad_mods.data_ptr(),
            weights=weights.data_ptr(),
            styles=styles.data_ptr(),
            style_stride=packing.style_width,
            scratch=scratch.data_ptr(),
            grad_weights=grad_weights.data_ptr(),
            grad_styles=grad_styles.data_ptr(),
            grad_style_stride=packing.style_width,
            eps=eps,
            device=weights.device.index,
            stream=torch.cuda.current_stream().cuda_stream,
        )
    return grad_weights, grad_styles


def why_not_mapping(z: Tensor) -> str | None:
    """None if the mapping kernel serves vectors like `z` `[N, D]`, otherwise the reason."""
    if z.dtype != torch.float32:
        return f"it computes in float32, not in {z.dtype}"
    if z.shape[1] % 32 != 0 or not 32 <= z.shape[1] <= 512:
        return f"{z.shape[1]} is not a multiple of 32 up to 512"
    return None


def mapping(z: Tensor, weights: Tensor, biases: Tensor, negative_slope: float) -> Tensor:
    """The mapping network in one launch: see `reference.mapping`.

    Args:
        z: float32 `[N, D]`; D a multiple of 32 up to 512.
        weights, biases: `[L, D, D]` and `[L, D]`, contiguous.

    Raises:
        ValueError, TypeError: as `modulate`.
    """
    reason = why_not_mapping(z)
    if reason is not None:
        raise ValueError(f"z: the mapping kernel cannot serve it, {reason}")
    count, dim = z.shape
    layers = weights.shape[0]
    _check("z", z, (count, dim), weights.device)
    _check("weights", weights, (layers, dim, dim), weights.device)
    _check("biases", biases, (layers, dim), weights.device)
    w = torch.empty_like(z)
    _load().mapping_forward(
        z=z.data_ptr(),
        weights=weights.data_ptr(),
        biases=biases.data_ptr(),
        w=w.data_ptr(),
        vectors=count,
        layers=layers,
        dim=dim,
        negative_slope=negative_slope,
        device=z.device.index,
        stream=torch.cuda.current_stream(z.device).cuda_stream,
    )
    return w


def affine(x: Tensor, weight: Tensor, bias: Tensor, upcoming: Tensor, current: Tensor | None = None) -> Tensor:
    """`x W^T + b` of a few vectors in one launch.

    Args:
        x: float32 `[N, D]`; D a multiple of 32 up to 512, as `why_not_mapping` says.
        weight, bias: `[R, D]` and `[R]`.
        upcoming: what the kernel behind reads; brought to L2 on the way.
        current: what the kernel before it reads, likewise: it may then begin while that kernel, which must not write
            `weight` or `bias`, still runs. None: it begins when that has ended.

    Raises:
        ValueError, TypeError: as `modulate`.
    """
    reason = why_not_mapping(x)
    if reason is not None:
        raise ValueError(f"x: the affines' kernel cannot serve it, {reason}")
    count, dim = x.shape
    rows = weight.shape[0]
    _check("x", x, (count, dim), weight.device)
    _check("weight", weight, (rows, dim), weight.device)
    _check("bias", bias, (rows,), weight.device)
    y = x.new_empty((count, rows))
    _load().affine_forward(
        x=x.data_ptr(),
        weight=weight.data_ptr(),
        bias=bias.data_ptr(),
        y=y.data_ptr(),
        vectors=count,
        rows=rows,
        dim=dim,
        current=0 if current is None else current.data_ptr(),
        current_bytes=0 if current is None else current.nbytes,
        upcoming=upcoming.data_ptr(),
        upcoming_bytes=upcoming.nbytes,
        overlaps=current is not None,
        device=x.device.index,
        stream=torch.cuda.current_stream(x.device).cuda_stream,
    )
    return y
