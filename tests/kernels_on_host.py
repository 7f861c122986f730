"""Kernels of csrc/ compiled as C++ for the tests that run them without a GPU: see csrc_host/."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent


def bfloat16(raw: np.ndarray) -> np.ndarray:
    """Bytes as bfloat16, in float64."""
    return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def compiled(folder: Path, name: str, plan: str) -> ctypes.CDLL:
    """`csrc_host/NAME.cpp` with `csrc/launch/PLAN.cpp` as a library in `folder`; skips the test where there is no nvcc."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc, whose headers the kernels include")
    library = folder / f"{name}.so"
    sources = [ROOT / f"tests/csrc_host/{name}.cpp", ROOT / f"csrc/launch/{plan}.cpp"]
    includes = [f"-I{ROOT / 'tests/csrc_host'}", f"-I{ROOT / 'csrc'}"]
    flags = ["-x", "c++", "-std=c++17", "-O1", "-Xcompiler", "-fPIC,-Wall,-Wno-unknown-pragmas", "-shared"]
    subprocess.run([nvcc, *flags, *includes, "-o", library, *sources], check=True)
    return ctypes.CDLL(str(library))
