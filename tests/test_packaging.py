"""Installing: in a fresh environment, with and without nvcc, editable and as a wheel; what an import does.

The environments see this one's packages (torch above all) through a .pth file; nothing but build tools is
downloaded, and those only where build isolation asks for them.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
BUILD_TOOLS = ["setuptools", "cmake", "ninja", "pybind11"]
IGNORED = shutil.ignore_patterns(".*", "__pycache__", "*.so", "*.egg-info", "build", "dist", "runs", "venv")


def copy_tree(target: Path) -> Path:
    """The source tree as a fresh clone has it: nothing built."""
    shutil.copytree(ROOT, target, ignore=IGNORED)
    return target


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return copy_tree(tmp_path / "tree")


def make_environment(folder: Path) -> Path:
    """A new virtual environment that sees this one's packages, but nothing installed here in editable mode."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    parents = {
        sysconfig.get_path("purelib"),
        sysconfig.get_path("platlib"),
        Path(torch.__file__).parent.parent,
    }
    for site in (folder / "lib").glob("python*/site-packages"):
        (site / "parent.pth").write_text("\n".join(map(str, parents)))
    return folder


class NoPackageIndex(Exception):  # noqa: N818
    """Build isolation downloads the build tools, and there is nowhere to download them from."""


def install(environment: Path, tree: Path, *options: str, **variables: str) -> str:
    """`pip install -e tree` into `environment`; its output."""
    pip = [sys.executable, "-m", "pip", "--python", environment / "bin/python"]
    command = [*pip, "install", "-v", "--no-deps", "--no-input", *options, "-e", tree]
    run = subprocess.run(
        command, env=os.environ | variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if re.search(r"No matching distribution found for (setuptools|cmake|ninja|pybind11)", run.stdout):
        raise NoPackageIndex
    assert run.returncode == 0, run.stdout[-5000:]
    return run.stdout


def run_python(environment: Path, program: str, **variables: str) -> str:
    """Standard output of `program` in `environment`, run outside the source tree."""
    clean = {
        name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "TRITON_INTERPRET")
    }
    command = [environment / "bin/python", "-c", program]
    run = subprocess.run(command, cwd=environment, env=clean | variables, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-5000:]
    return run.stdout


def backend(tree: Path, call: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """One call of the build backend, as a packager makes it, without isolation."""
    program = f"from setuptools import build_meta; print(build_meta.{call})"
    clean = {k: v for k, v in os.environ.items() if k not in ("CIPS_KERNELS_CUDA", "CUDACXX")}
    command = [sys.executable, "-c", program]
    return subprocess.run(command, cwd=tree, env=clean | variables, capture_output=True, text=True)


def snapshot(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if "__pycache__" not in path.parts}


# After torch, which may do as it likes: what the import of ours starts, loads and touches.
WATCHED_IMPORT = """
import sys
import torch

started = []
events = {"subprocess.Popen", "os.system", "os.posix_spawn", "os.fork", "os.exec", "socket.connect"}
sys.addaudithook(lambda event, args: started.append(event) if event in events else None)
import cips
import cips_kernels
import cips_kernels.cuda
import cips_kernels.functional

assert not started, started
assert "cips_kernels._cuda" not in sys.modules, "the import loads the extension"
assert not torch.cuda.is_initialized(), "the import initialises CUDA"
print(cips_kernels.__file__, cips.__file__, sep="\\n")
"""

# Under a finder that knows no triton, as on a machine that has none.
WITHOUT_TRITON = """
import sys

class NoTriton:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NoTriton())
import cips
import cips_kernels
import torch

status = cips_kernels.backends()
assert not status["triton"].available and "triton" in status["triton"].reason, status
assert not status["cuda"].available and status["cuda"].reason, status
layer = cips_kernels.FusedModFC(5, 7, 8)
x, style = torch.randn(2, 3, 5), torch.randn(2, 8)
y = layer(x, style, "off")
with cips_kernels.use_backend("reference"):
    torch.testing.assert_close(y, layer(x, style, "off"))
y.square().sum().backward()
assert torch.isfinite(layer.weight.grad).all() and layer.weight.grad.abs().sum() > 0
"""


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """Environment, tree and pip's words of an editable install without CUDA, isolated where that can be."""
    folder = tmp_path_factory.mktemp("plain")
    tree, environment = copy_tree(folder / "tree"), make_environment(folder / "venv")
    try:
        words = install(environment, tree, "--retries", "1", CIPS_KERNELS_CUDA="0")
    except NoPackageIndex:
        words = install(environment, tree, "--no-build-isolation", CIPS_KERNELS_CUDA="0")
    return environment, tree, words


def test_build_isolation(plain: tuple[Path, Path, str]) -> None:
    if "Installing build dependencies" not in plain[2]:
        pytest.skip("no package index is reached: installed without build isolation")
    assert "Installing build dependencies: finished with status 'done'" in plain[2]


def test_editable_without_cuda(plain: tuple[Path, Path, str]) -> None:
    environment, tree, words = plain
    assert "cips_kernels: installing without the CUDA extension (CIPS_KERNELS_CUDA=0)." in words
    assert not list(tree.rglob("*.so"))
    program = "import cips_kernels.cuda as c; print(c.available())"
    assert "(False, 'the extension cips_kernels._cuda is not built" in run_python(environment, program)


def test_import_is_light(plain: tuple[Path, Path, str], tmp_path: Path) -> None:
    environment, tree, _ = plain
    before = snapshot(tree)
    files = run_python(environment, WATCHED_IMPORT, TRITON_CACHE_DIR=str(tmp_path / "triton")).split()
    assert files == [str(tree / "cips_kernels/__init__.py"), str(tree / "python/cips/__init__.py")]
    assert snapshot(tree) == before, "the import writes files"
    assert not (tmp_path / "triton").exists(), "the import compiles Triton kernels"


def test_import_without_triton(plain: tuple[Path, Path, str]) -> None:
    run_python(plain[0], WITHOUT_TRITON)


def test_command(plain: tuple[Path, Path, str]) -> None:
    pytest.importorskip("jsonargparse", reason="the command line is part of the extra [train]")
    command = [plain[0] / "bin/cips", "--help"]
    run = subprocess.run(command, cwd=plain[0], capture_output=True, text=True)
    assert run.returncode == 0 and "train" in run.stdout, run.stdout + run.stderr


def test_metadata(plain: tuple[Path, Path, str]) -> None:
    program = "import importlib.metadata as m; print(m.metadata('cips-kernels'))"
    text = run_python(plain[0], program)
    for line in ["Version: 0.1.0", "License: MIT", "Requires-Python: >=3.10", "Requires-Dist: torch>=2.6"]:
        assert line in text
    assert re.search(r"Requires-Dist: triton>=3.2; sys_platform == .linux.", text)
    assert {"train", "test", "bench"} <= set(re.findall(r"Provides-Extra: (\w+)", text))
    assert run_python(plain[0], "import cips_kernels; print(cips_kernels.__version__)").strip() == "0.1.0"


def test_editable_with_cuda(tmp_path: Path, tree: Path) -> None:
    """As on an offline GPU machine: no isolation, the tools that are there."""
    if not (shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")):
        pytest.skip("no nvcc")
    for name in BUILD_TOOLS:
        pytest.importorskip(name, reason=f"building without isolation needs {name}")
    environment = make_environment(tmp_path / "venv")
    words = install(environment, tree, "--no-build-isolation", CIPS_KERNELS_CUDA="1")
    assert "without the CUDA extension" not in words
    assert len(list((tree / "cips_kernels").glob("_cuda.*.so"))) == 1
    run_python(environment, WATCHED_IMPORT)
    program = """
import cips_kernels._cuda as extension, cips_kernels.cuda as cuda, torch
print(extension.__file__, extension.architectures)
print(cuda.available()[1])
"""
    where, reason = run_python(environment, program, CUDA_VISIBLE_DEVICES="").splitlines()
    assert where == f"{next((tree / 'cips_kernels').glob('_cuda.*.so'))} ('90a',)"
    assert reason.startswith("torch sees no CUDA device")


def fake_nvcc(folder: Path, release: str) -> str:
    path = folder / "nvcc"
    path.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.0'\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@pytest.mark.parametrize(
    ("choice", "release", "fails", "words"),
    [
        (
            "",
            "11.8",
            False,
            "installing without the CUDA extension .* is release 11.8, 12.1 or newer is needed",
        ),
        ("1", "11.8", True, "CIPS_KERNELS_CUDA=1, but .* is release 11.8, 12.1 or newer is needed"),
        ("0", "12.4", False, "installing without the CUDA extension .CIPS_KERNELS_CUDA=0."),
        ("yes", "12.4", True, "CIPS_KERNELS_CUDA: 'yes' came, expected 0, 1 or nothing"),
    ],
)
def test_choice_of_cuda(
    tmp_path: Path, tree: Path, choice: str, release: str, fails: bool, words: str
) -> None:
    nvcc = fake_nvcc(tmp_path, release)
    run = backend(tree, f"build_wheel({str(tmp_path)!r})", CIPS_KERNELS_CUDA=choice, CUDACXX=nvcc)
    assert (run.returncode != 0) == fails, run.stderr[-3000:]
    assert re.search(words, run.stderr), run.stderr[-3000:]


def test_failing_build_says_how_to_go_on(tmp_path: Path, tree: Path) -> None:
    for name in BUILD_TOOLS:
        pytest.importorskip(name, reason=f"building without isolation needs {name}")
    nvcc = fake_nvcc(tmp_path, "12.4")  # new enough, but no compiler
    run = backend(tree, f"build_wheel({str(tmp_path)!r})", CUDACXX=nvcc)
    assert run.returncode != 0
    assert f"building cips_kernels._cuda with {nvcc} failed" in run.stderr
    assert "CIPS_KERNELS_CUDA=0 installs without it" in run.stderr


def test_sdist_and_wheel(tmp_path: Path, tree: Path) -> None:
    """The sdist holds what builds the extension; a wheel made from it without CUDA holds the packages alone."""
    run = backend(tree, f"build_sdist({str(tmp_path)!r})")
    assert run.returncode == 0, run.stderr[-3000:]
    with tarfile.open(tmp_path / run.stdout.split()[-1]) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
        archive.extractall(
            tmp_path / "unpacked", **({"filter": "data"} if hasattr(tarfile, "data_filter") else {})
        )
    wanted = {"CMakeLists.txt", "LICENSE", "pyproject.toml", "setup.py"}
    for folder in ("csrc", "cips_kernels", "python/cips", "tests"):
        wanted |= {str(path.relative_to(tree)) for path in (tree / folder).rglob("*") if path.is_file()}
    assert wanted <= inside, f"not in the sdist: {sorted(wanted - inside)}"

    unpacked = next((tmp_path / "unpacked").iterdir())
    run = backend(unpacked, f"build_wheel({str(tmp_path)!r})", CIPS_KERNELS_CUDA="0")
    assert run.returncode == 0, run.stderr[-3000:]
    name = run.stdout.split()[-1]
    assert name == "cips_kernels-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(tmp_path / name) as archive:
        inside = set(archive.namelist())
    modules = {str(path.relative_to(tree)) for path in (tree / "cips_kernels").rglob("*.py")}
    modules |= {str(path.relative_to(tree / "python")) for path in (tree / "python/cips").rglob("*.py")}
    assert modules <= inside, f"not in the wheel: {sorted(modules - inside)}"
    assert not [file for file in inside if file.endswith((".cu", ".cuh", ".so")) or file.startswith("tests")]
