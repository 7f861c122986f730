"""Builds the extension cips_kernels/_cuda with CMake and ninja where nvcc is found. Metadata: pyproject.toml.

CIPS_KERNELS_CUDA=0 leaves the extension out, =1 makes a missing nvcc an error. No GPU, driver or torch is needed.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
OLDEST_NVCC = (12, 1)  # the first whose kernels take more than 4 KB of arguments


def find_nvcc() -> tuple[str | None, str]:
    """Path of a usable nvcc, or None and the reason."""
    choice = os.environ.get("CIPS_KERNELS_CUDA", "")
    if choice not in ("", "0", "1"):
        raise SystemExit(f"CIPS_KERNELS_CUDA: {choice!r} came, expected 0, 1 or nothing")
    if choice == "0":
        return None, "CIPS_KERNELS_CUDA=0"
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    places = [os.environ.get("CUDACXX"), *(f"{home}/bin/nvcc" for home in homes if home), "nvcc"]
    found = (shutil.which(place) for place in [*places, "/usr/local/cuda/bin/nvcc"] if place)
    nvcc = next((path for path in found if path), None)
    if sys.platform != "linux":
        nvcc, reason = None, f"the CUDA kernels are built on Linux, not on {sys.platform}"
    elif nvcc is None:
        reason = "nvcc was not found: not in CUDACXX, CUDA_HOME, CUDA_PATH, PATH or /usr/local/cuda"
    else:
        text = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
        release = re.search(r"release (\d+)\.(\d+)", text)
        version = tuple(map(int, release.groups())) if release else (0, 0)
        reason = f"{nvcc} is release {version[0]}.{version[1]}, 12.1 or newer is needed"
        if version >= OLDEST_NVCC:
            return nvcc, ""
    if choice == "1":
        raise SystemExit(f"CIPS_KERNELS_CUDA=1, but {reason}")
    return None, reason


def find_tool(name: str, attribute: str) -> str:
    """A tool from its Python package, which may lie outside PATH, or else from PATH."""
    if importlib.util.find_spec(name):
        folder = Path(getattr(importlib.import_module(name), attribute))
        if (folder / name).exists():
            return str(folder / name)
    path = shutil.which(name)
    if path is None:
        raise SystemExit(f"{name} was not found: pip install {name}")
    return path


class CMakeBuild(build_ext):
    """Builds in build/cmake-<python>, which is kept, so that a changed kernel is rebuilt in seconds."""

    def build_extension(self, extension: Extension) -> None:
        try:
            import pybind11
        except ModuleNotFoundError as error:
            raise SystemExit(f"pybind11 was not found by {sys.executable}: pip install pybind11") from error

        target = Path(self.get_ext_fullpath(extension.name)).resolve()
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        cmake = find_tool("cmake", "CMAKE_BIN_DIR")
        # Under build isolation all these paths are new each time, and CMake's cache holds the old ones.
        settings = {
            "CMAKE_BUILD_TYPE": "Debug" if self.debug else "Release",
            "CMAKE_CUDA_COMPILER": NVCC,
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": target.parent,
            "CMAKE_MAKE_PROGRAM": find_tool("ninja", "BIN_DIR"),
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
        }
        definitions = [f"-D{name}={value}" for name, value in settings.items()]
        configure = [cmake, "-G", "Ninja", "-S", str(ROOT), "-B", str(build), *definitions]
        try:
            subprocess.run(configure, check=True)
            subprocess.run([cmake, "--build", str(build)], check=True)
        except subprocess.CalledProcessError as error:
            hint = "see above; CIPS_KERNELS_CUDA=0 installs without it"
            raise SystemExit(f"building {extension.name} with {NVCC} failed ({hint})") from error


NVCC, REASON = find_nvcc()
if NVCC is None and {"build_ext", "bdist_wheel", "editable_wheel"} & set(sys.argv):
    print(f"cips_kernels: installing without the CUDA extension ({REASON}).", file=sys.stderr)

setup(
    license="MIT",
    ext_modules=[Extension("cips_kernels._cuda", sources=[])] if NVCC else [],
    cmdclass={"build_ext": CMakeBuild},
)
