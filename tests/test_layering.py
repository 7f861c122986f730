"""The house stays in order: imports and includes run downwards, files stay short, importing costs nothing."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("cips_kernels", "python", "csrc", "benchmarks", "tests")
MOST_LINES = 450

# each may import those before it
ORDER = (
    "activations", "packing", "spec", "noise", "arguments", "encoding", "formulas", "reference", "backends", "blended",
    "filter_formulas", "sines", "recompute", "triton", "cuda", "cuda_onchip", "cuda_saved", "wgrad_plan", "cuda_wgrad", "cuda_training", "cuda_blend",
    "cuda_stack", "cpu_plan", "cpu", "encoded", "ops", "vectors", "filters",
    "functional", "modules", "prepared", "patch", "__init__", "env", "testing",
)  # fmt: skip
CSRC_ORDER = ("ptx", "tile", "epilogue", "kernels", "launch", "binding")


def files(*suffixes: str) -> list[Path]:
    """Every source file with one of the suffixes, hidden folders and build output left out."""
    found = [path for folder in SOURCES for path in (ROOT / folder).rglob("*") if path.suffix in suffixes]
    found += [path for path in ROOT.glob("*.py") if ".py" in suffixes]
    hidden = re.compile(r"/(\.|build|__pycache__|[^/]*\.egg-info)")
    return sorted(path for path in found if not hidden.search(f"/{path.relative_to(ROOT).as_posix()}"))


def module_name(path: Path) -> str:
    """`cips_kernels/triton/noise.py` is `cips_kernels.triton.noise`; a package bears its folder's name."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[1:] if parts[0] == "python" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules() -> dict[str, Path]:
    packages = ("cips_kernels", "python")
    return {module_name(path): path for path in files(".py") if path.relative_to(ROOT).parts[0] in packages}


def imports(source: str, name: str, is_package: bool, known: set[str]) -> set[str]:
    """Modules that `source`, the module `name`, imports anywhere, inside functions too; `known` ones in full."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = name.split(".") if is_package else name.split(".")[:-1]
                parts = parts[: len(parts) - node.level + 1]
                base = ".".join([*parts, base] if base else parts)
            for alias in node.names:
                found.add(f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base)
    return found - {name}


def graph() -> dict[str, set[str]]:
    found = modules()
    return {
        name: imports(path.read_text(encoding="utf-8"), name, path.name == "__init__.py", set(found))
        for name, path in found.items()
    }


def layer(name: str) -> str:
    """The entry of ORDER to which a module of cips_kernels belongs."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def test_imports_are_read_right():
    known = {"a", "a.b", "a.c", "a.c.d"}
    source = "from . import b\nfrom .c import d, thing\nimport os.path\ndef f():\n    from ..a.b import x\n"
    assert imports(source, "a.e", False, known) == {"a.b", "a.c.d", "a.c", "os.path"} | {"a.b"}
    assert imports("from .. import b", "a.c.d", False, known) == {"a.b"}
    assert imports("from .d import x", "a.c", True, known) == {"a.c.d"}
    assert imports("from a import version", "a.b", False, known) == {"a"}


def test_every_module_has_its_place():
    found = {layer(name) for name in modules() if name.split(".")[0] == "cips_kernels"}
    assert found <= set(ORDER), f"not in the order: {sorted(found - set(ORDER))}"
    assert len(found) > 10


def test_imports_run_downwards():
    wrong = []
    for name, targets in graph().items():
        if name.split(".")[0] != "cips_kernels":
            continue
        for target in targets:
            if target.split(".")[0] != "cips_kernels" or layer(target) == layer(name):
                continue
            if ORDER.index(layer(target)) > ORDER.index(layer(name)):
                wrong.append(f"{name} imports {target}")
    assert not wrong, wrong


def test_no_import_runs_in_a_circle():
    edges = graph()
    # a package's __init__ gathers its modules, so a module may not import its own package's names from there
    TopologicalSorter({name: targets & set(edges) for name, targets in edges.items()}).prepare()


def test_the_application_stands_on_the_kernels_and_nothing_on_the_benchmarks():
    for name, targets in graph().items():
        for target in targets:
            top = target.split(".")[0]
            assert top not in ("benchmarks", "tests", "modfc_bench", "rivals"), f"{name} imports {target}"
            if name.split(".")[0] == "cips_kernels":
                assert top != "cips", f"{name} imports {target}"


def test_includes_run_downwards():
    sources = [
        path
        for path in files(".cu", ".cuh", ".cpp", ".h", ".hpp")
        if path.relative_to(ROOT).parts[0] == "csrc"
    ]
    if not sources:
        pytest.skip("no csrc here")
    for path in sources:
        here = CSRC_ORDER.index(path.relative_to(ROOT / "csrc").parts[0])
        for include in re.findall(
            r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(encoding="utf-8"), re.M
        ):
            where = f"{path.relative_to(ROOT)} includes {include}"
            assert not include.startswith(("torch/", "ATen/", "c10/")), where
            assert here == CSRC_ORDER.index("binding") or not include.startswith(("pybind11/", "Python.h")), (
                where
            )
            folder = next((part for part in include.split("/")[:-1] if part in CSRC_ORDER), None)
            if folder:
                assert CSRC_ORDER.index(folder) <= here, where


@pytest.mark.parametrize(
    "suffixes", [(".py",), (".cu", ".cuh", ".cpp", ".h", ".hpp")], ids=["python", "csrc"]
)
def test_files_are_short(suffixes):
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in files(*suffixes)}
    long = {str(path.relative_to(ROOT)): lines for path, lines in lengths.items() if lines > MOST_LINES}
    assert not long


def test_nothing_is_left_for_later():
    words = re.compile("|".join(("TO" + "DO", "FIX" + "ME", "XX" + "X")))
    found = [
        str(p.relative_to(ROOT))
        for p in files(".py", ".cu", ".cuh", ".cpp", ".h")
        if words.search(p.read_text(encoding="utf-8"))
    ]
    assert not found


IMPORT = """
import sys
import torch
before = set(sys.modules)
import cips_kernels
new = {name.split(".")[0] for name in set(sys.modules) - before}
assert "triton" not in new, "triton was imported"
late = [name for name in ("torch._dynamo", "torch._inductor", "cips_kernels._cuda", "cips_kernels.triton.stack")
        if name in sys.modules and name not in before]
assert not late, late
assert not torch.cuda.is_initialized(), "CUDA was initialised"
cips_kernels.FusedModFCStack([4, 4], 3)(torch.randn(2, 5, 4), torch.randn(2, 3))
print("fine")
"""


@pytest.mark.parametrize("without_triton", [False, True])
def test_importing_the_package_costs_nothing(tmp_path, without_triton):
    code = ("import sys; sys.modules['triton'] = None\n" if without_triton else "") + IMPORT
    variables = {
        key: value for key, value in os.environ.items() if not key.startswith(("TRITON_", "CIPS_", "CUDA"))
    }
    variables |= {
        "PATH": "",
        "HOME": str(tmp_path),
        "TRITON_CACHE_DIR": str(tmp_path),
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.strip() == "fine", done.stderr
    assert not list(tmp_path.iterdir()), "something was compiled or cached"
