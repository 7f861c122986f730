"""What is installed here, what can serve, and why not: `python -m cips_kernels.env`.

The report to put into an issue. It starts no kernel and compiles nothing.
"""

from __future__ import annotations

import importlib
import os
import platform
import sys
from importlib import metadata

import torch

from . import __version__
from .backends import backends, resolve

# every environment variable that this package reads, and what it does
VARIABLES = {
    "CIPS_KERNELS_BACKEND": "backend of calls that name none: auto, reference, cpu, triton or cuda",
    "CIPS_KERNELS_CHECK": "1: look for NaN in styles on a GPU too, which waits for the GPU in every call",
    "CIPS_KERNELS_CUDA": "at install: 0 leaves csrc out, 1 fails where it cannot be built",
    "TRITON_INTERPRET": "1: interpret Triton kernels on the CPU, for tests",
}

Rows = list[tuple[str, str]]


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _extension() -> str:
    try:
        extension = importlib.import_module("cips_kernels._cuda")
    except ImportError as error:
        return f"no ({error})"
    architectures = ", ".join(getattr(extension, "architectures", ())) or "unknown architectures"
    return f"built for {architectures}"


def versions() -> Rows:
    """Name and version of everything that decides what runs."""
    cuda = torch.version.cuda or (
        f"ROCm {torch.version.hip}" if torch.version.hip else "torch is built without it"
    )
    return [
        ("cips_kernels", __version__),
        ("cips_kernels._cuda", _extension()),
        ("torch", torch.__version__),
        ("cuda", cuda),
        ("triton", _version("triton")),
        ("numpy", _version("numpy")),
        ("python", f"{platform.python_version()} on {platform.platform()}"),
    ]


def devices() -> Rows:
    """Each CUDA device with its compute capability and memory, and the CPU's threads."""
    cpu = platform.processor() or platform.machine()
    rows = [
        ("device cpu", f"{cpu}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    ]
    if not torch.cuda.is_available():
        return [*rows, ("device cuda", "none")]
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        memory = found.total_memory / 2**30
        capability = f"compute capability {found.major}.{found.minor}"
        rows.append((f"device cuda:{index}", f"{found.name}, {capability}, {memory:.0f} GiB"))
    return rows


def statuses() -> Rows:
    """Each backend with its status, and what `auto` takes on each kind of device."""
    rows = [(name, str(status)) for name, status in backends().items()]
    for kind in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        try:
            rows.append((f"auto, {kind}", resolve("auto", torch.device(kind), torch.float32)))
        except RuntimeError as error:  # the environment asks for what cannot serve
            rows.append((f"auto, {kind}", str(error)))
    return rows


def variables() -> Rows:
    """Each environment variable with its value and meaning."""
    return [
        (name, f"{os.environ.get(name, '(unset)'):<10}  {meaning}") for name, meaning in VARIABLES.items()
    ]


def report() -> str:
    """The whole report, as text."""
    sections = {
        "versions": versions(),
        "devices": devices(),
        "backends": statuses(),
        "environment variables": variables(),
    }
    width = max(len(name) for rows in sections.values() for name, _ in rows) + 2
    blocks = [
        "\n".join([title, *(f"  {name:<{width}}{text}" for name, text in rows)])
        for title, rows in sections.items()
    ]
    return "\n\n".join(blocks)


if __name__ == "__main__":
    sys.stdout.write(report() + "\n")
