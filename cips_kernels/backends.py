"""Which backend serves a call, and why another cannot.

`auto` takes the first that can serve the tensor's device and dtype: `cuda`, whose stack runs on chip, where 16-bit
colours alone are wanted, otherwise `triton`, `cuda`, `cpu`, `reference` in this order. The environment variable CIPS_KERNELS_BACKEND, `use_backend(...)` and a `backend=` argument override it, in rising order.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType, TracebackType

import torch

NAMES = ("reference", "cpu", "triton", "cuda")
# fastest first, as benchmarks/results has it: where `cuda` brings modulation alone it takes 1.03 times `triton`
_ORDER = {"cuda": ("triton", "cuda", "reference"), "cpu": ("cpu", "reference")}
_ORDER_ON_CHIP = ("cuda", "triton", "reference")
_HALF_AND_FLOAT = (torch.float16, torch.bfloat16, torch.float32)

_override: str | None = None
_warned: set[str] = set()


@dataclass(frozen=True)
class Status:
    """Whether a backend can serve on this machine, and if not, why not."""

    available: bool
    reason: str

    def __str__(self) -> str:
        return "available" if self.available else f"unavailable: {self.reason}"


def _reference_status() -> Status:
    return Status(True, "")


@lru_cache(maxsize=1)
def _triton_status() -> Status:
    try:
        import triton
    except Exception as error:  # a broken triton install raises more than ImportError
        return Status(False, f"triton does not import ({type(error).__name__}: {error})")
    if os.environ.get("TRITON_INTERPRET") == "1":
        return Status(True, "")
    if not torch.cuda.is_available():
        return Status(False, "no CUDA device (TRITON_INTERPRET=1 interprets the kernels on a CPU, for tests)")
    if torch.version.hip is None and torch.cuda.get_device_capability() < (8, 0):
        return Status(False, f"compute capability {torch.cuda.get_device_capability()} is below 8.0")
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < (3, 2):
        return Status(False, f"triton {triton.__version__} is older than 3.2")
    return Status(True, "")


@lru_cache(maxsize=1)
def _cuda_status() -> Status:
    if not _triton_status().available:
        return Status(False, f"its layers need triton: {_triton_status().reason}")
    return Status(*importlib.import_module(".cuda", __package__).available())


_STATUS: dict[str, Callable[[], Status]] = {
    "reference": _reference_status,
    "cpu": _reference_status,
    "triton": _triton_status,
    "cuda": _cuda_status,
}


def backends() -> dict[str, Status]:
    """The status of every backend on this machine."""
    return {name: _STATUS[name]() for name in NAMES}


def why_not(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """None if backend `name` serves tensors of `dtype` on `device`, otherwise the reason."""
    status = _STATUS[name]()
    if not status.available:
        return status.reason
    if name == "reference":
        return None
    if name == "cpu":
        return None if device.type == "cpu" else f"it serves tensors on the CPU, not on {device}"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type != "cuda" and not (interpreted and name == "triton"):
        return f"it serves tensors on a CUDA device, not on {device}"
    if dtype not in _HALF_AND_FLOAT:
        return f"it computes in float16, bfloat16 or float32, not in {dtype}"
    return None


# What torch.compiler.assume_constant_result does, without importing a compiler: a backend is probed by imports that
# cannot be traced, and the answer stays the same for the life of the process.
why_not._dynamo_marked_constant = True  # type: ignore[attr-defined]


def check_name(name: str, argument: str = "backend") -> str:
    """`name`, or ValueError where no backend is called so."""
    if name != "auto" and name not in NAMES:
        raise ValueError(f"{argument}: expected auto, {', '.join(NAMES)}, got {name!r}")
    return name


_from_environment = check_name(os.environ.get("CIPS_KERNELS_BACKEND", "auto"), "CIPS_KERNELS_BACKEND")


def warn_once(message: str) -> None:
    """Warn about a slower path the first time only; silent while a compiler traces."""
    if not torch.compiler.is_compiling() and message not in _warned:
        _warned.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=3)


def resolve(requested: str, device: torch.device, dtype: torch.dtype, on_chip: bool = False) -> str:
    """The backend that serves a call.

    Args:
        requested: a backend's name, or "auto".
        device, dtype: of the input.
        on_chip: the call is a stack with leaky ReLUs whose RGB sum alone is wanted, without gradients or such as training
            on chip serves.

    Raises:
        ValueError: unknown name.
        RuntimeError: a backend asked for by name cannot serve; the message says why.
    """
    check_name(requested)
    name = requested if requested != "auto" else (_override or _from_environment)
    if name != "auto":
        reason = why_not(name, device, dtype)
        if reason is not None:
            raise RuntimeError(f"backend {name!r} cannot serve this call: {reason}")
        return name
    refusals: list[str] = []
    on_chip = on_chip and device.type == "cuda" and dtype in (torch.float16, torch.bfloat16)
    for candidate in _ORDER_ON_CHIP if on_chip else _ORDER.get(device.type, ("reference",)):
        reason = why_not(candidate, device, dtype)
        if reason is None:
            break
        refusals.append(f"{candidate}: {reason}")
    if refusals and device.type == "cuda" and candidate == "reference":
        warn_once("cips_kernels falls back to the reference backend, which is slower. " + "; ".join(refusals))
    return candidate


class use_backend:  # noqa: N801  (reads as a function, like torch.no_grad)
    """Choose the backend of all calls that do not name one, from now on or within a `with` block.

    Args:
        name: "auto" or a backend's name.

    Example:
        >>> use_backend("triton")            # from now on
        >>> with use_backend("reference"):   # here only
        ...     ...
    """

    def __init__(self, name: str) -> None:
        global _override
        check_name(name, "name")
        self._previous = _override
        _override = name  # "auto" too, so that it overrides the environment

    def __enter__(self) -> use_backend:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _override
        _override = self._previous


def module(name: str) -> ModuleType:
    """The module with `forward` and `backward` of a backend."""
    where = {"reference": ".reference", "cpu": ".cpu", "triton": ".triton.stack", "cuda": ".cuda_stack"}
    return importlib.import_module(where[name], __package__)
