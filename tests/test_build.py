"""csrc/: that nvcc compiles it, what the machine code holds, and that it refuses cleanly. Needs no GPU."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent
CSRC = ROOT / "csrc"
LAYERS = ["ptx", "tile", "epilogue", "kernels", "launch", "binding"]  # each includes only itself and what is before
FORWARD = ["modulate_fwd_kernel<float>", "modulate_fwd_kernel<__half>", "modulate_fwd_kernel<__nv_bfloat16>"]
WEIGHTS, STYLES = "modulate_bwd_kernel_weights", "modulate_bwd_kernel_styles"
HALVES = ("__nv_bfloat16", "__half")
STACK = [f"stack_{kind}fwd_kernel<{half}>" for half in HALVES for kind in ("", "train_")]
CHAIN = [f"stack_chain_kernel<{half}>" for half in HALVES]
WGRAD = [f"stack_wgrad_kernel<{half}>" for half in HALVES]
WGRAD_SUM = "stack_wgrad_sum_kernel"
MAPPING, AFFINE = [f"mapping_fwd_kernel<{blocks}, {dim}>" for blocks in (8, 16) for dim in (0, 512)], "affine_fwd_kernel"
BLEND = [f"stack_blend_fwd_kernel<{half}, 2>" for half in HALVES]
BLEND_PACK = [f"stack_blend_pack_kernel<{half}, 2>" for half in HALVES]
PACK = [f"stack_{kind}pack_kernel<{half}>" for half in HALVES for kind in ("", "chain_")]
LOOKUP = [f"table_lookup_kernel<{table}, {half}>" for half in HALVES for table in ("float", half)]


def sources() -> list[Path]:
    return sorted(path for path in CSRC.rglob("*") if path.suffix in {".h", ".cuh", ".cu", ".cpp"})


def tool(name: str, attribute: str) -> str | None:
    """A build tool from its Python package or from PATH."""
    if importlib.util.find_spec(name):
        path = Path(getattr(importlib.import_module(name), attribute)) / name
        if path.exists():
            return str(path)
    return shutil.which(name)


@pytest.fixture(scope="module")
def extension(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled extension: the installed one unless a source is newer, otherwise built here."""
    suffix = f".{sys.implementation.cache_tag}"
    newest = max(path.stat().st_mtime for path in [*sources(), ROOT / "CMakeLists.txt"])
    for path in (ROOT / "cips_kernels").glob(f"_cuda{suffix}*.so"):
        if path.stat().st_mtime > newest:
            return path
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    cmake, ninja = tool("cmake", "CMAKE_BIN_DIR"), tool("ninja", "BIN_DIR")
    for name, path in [("nvcc", nvcc), ("cmake", cmake), ("ninja", ninja)]:
        if path is None:
            pytest.skip(f"{name} was not found, and no up-to-date extension is installed")
    pybind11 = pytest.importorskip("pybind11", reason="building the extension needs pybind11")
    build = tmp_path_factory.mktemp("build")
    settings = {
        "CMAKE_CUDA_COMPILER": nvcc,
        "CMAKE_MAKE_PROGRAM": ninja,
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
    }
    configure = [cmake, "-G", "Ninja", "-S", ROOT, "-B", build, *(f"-D{k}={v}" for k, v in settings.items())]
    subprocess.run(configure, check=True)
    subprocess.run([cmake, "--build", build], check=True)
    return next(build.glob("_cuda*.so"))


@pytest.fixture(scope="module")
def module(extension: Path) -> ModuleType:
    installed = importlib.util.find_spec("cips_kernels._cuda")
    if installed is not None and Path(str(installed.origin)).resolve() == extension.resolve():
        return importlib.import_module("cips_kernels._cuda")  # one file cannot be loaded under two names
    spec = importlib.util.spec_from_file_location("_cuda", extension)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture(scope="module")
def cuobjdump() -> str:
    found = shutil.which("cuobjdump") or shutil.which("/usr/local/cuda/bin/cuobjdump")
    if found is None and (triton := importlib.util.find_spec("triton")) is not None:
        found = shutil.which(str(Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump"))
    if found is None:
        pytest.skip("no cuobjdump: neither in PATH nor in triton's package")
    return found


def demangle(names: list[str]) -> list[str]:
    """Readable kernel names without namespace and arguments."""
    text = subprocess.run(["c++filt", *names], capture_output=True, text=True, check=True).stdout
    return [re.sub(r"^(void )?cips::|\(.*", "", line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def machine_code(extension: Path, cuobjdump: str) -> dict[str, Counter[str]]:
    """Per kernel, how often each instruction occurs."""
    text = subprocess.run([cuobjdump, "-sass", extension], capture_output=True, text=True, check=True).stdout
    counts: list[tuple[str, Counter[str]]] = []
    for line in text.splitlines():
        if match := re.search(r"Function : (\S+)", line):
            counts.append((match[1], Counter()))
        elif match := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", line):
            counts[-1][1][match[1]] += 1
    return dict(zip(demangle([name for name, _ in counts]), (counter for _, counter in counts)))


@pytest.fixture(scope="module")
def resources(extension: Path, cuobjdump: str) -> dict[str, dict[str, int]]:
    """Per kernel, its registers (REG) and its memory of each kind in bytes (STACK, SHARED, LOCAL)."""
    run = subprocess.run([cuobjdump, "-res-usage", extension], capture_output=True, text=True, check=True)
    found = re.findall(r"Function (\S+):\n\s+(.*)", run.stdout + run.stderr)
    numbers = [{name: int(value) for name, value in re.findall(r"(\w+):(\d+)", line)} for _, line in found]
    return dict(zip(demangle([name for name, _ in found]), numbers))


def test_kernels_are_all_there(machine_code: dict[str, Counter[str]]) -> None:
    assert sorted(machine_code) == sorted(
        [*FORWARD, WEIGHTS, STYLES, *STACK, *CHAIN, *BLEND, *PACK, *BLEND_PACK, *LOOKUP, *WGRAD, WGRAD_SUM, *MAPPING, AFFINE]
    )


def test_no_local_memory(machine_code: dict, resources: dict) -> None:
    """A spilled register would be reloaded for every image."""
    for kernel, counter in machine_code.items():
        spills = {name: n for name, n in counter.items() if name.startswith(("LDL", "STL"))}
        assert not spills, f"{kernel} spills: {spills}"
        assert resources[kernel]["STACK"] == 0 and resources[kernel]["LOCAL"] == 0, kernel


def test_no_atomics(machine_code: dict[str, Counter[str]]) -> None:
    """Sums in a fixed order only: same bits every run. A chain's warp adds to numbers of its own, in its own order."""
    for kernel, counter in machine_code.items():
        atomics = {name for name in counter if re.match(r"(RED|ATOM)[GS]?(\.|$)", name)}
        allowed = {name for name in atomics if name.startswith("REDG.E.ADD.F32")} if kernel in CHAIN else set()
        assert atomics == allowed, f"{kernel}: {atomics}"


@pytest.mark.parametrize(
    ("kernel", "expected"),
    [(name, ["LDG.E.128", "STG.E.128"]) for name in FORWARD]
    + [
        (WEIGHTS, ["LDG.E.128", "STG.E.128", "LDGSTS.E.BYPASS.128", "LDS.128", "STS.128"]),
        (STYLES, ["LDG.E.128"]),
    ]
    + [(name, ["STG.E.128"]) for name in [*PACK, *LOOKUP]]
    + [(name, ["LDG.E.128", "STS.128", "LDS.128"]) for name in [*STACK, *BLEND]]
    + [(name, ["STS.128", "LDS.128", "LDS.64", "REDG.E.ADD.F32"]) for name in CHAIN]
    + [(kernel, ["LDG.E.128", "LDS.128"]) for kernel in MAPPING]
    + [(AFFINE, ["LDG.E.128", "CCTL"])],
)
def test_vector_accesses(machine_code: dict[str, Counter[str]], kernel: str, expected: list[str]) -> None:
    counter = machine_code[kernel]
    for instruction in expected:
        assert any(name.startswith(instruction) for name in counter), f"{instruction} is not among {counter}"


@pytest.mark.parametrize("kernel", [*(name for name in STACK if "train" in name), *CHAIN])
def test_rows_leave_by_the_copy_engine(machine_code: dict, kernel: str) -> None:
    """What training keeps goes from the parking area as boxes; threads themselves store signs and colours alone."""
    counter = machine_code[kernel]
    assert any(name.startswith("UTMASTG.3") for name in counter), counter
    wide = {name for name in counter if name.startswith("STG") and "128" in name}
    assert not wide, f"{kernel}: {wide}"


@pytest.mark.parametrize("kernel", [*STACK, *BLEND, *CHAIN, *BLEND_PACK, *(f"stack_pack_kernel<{half}>" for half in HALVES)])
def test_what_overlaps_with_the_kernel_before_waits_first(machine_code: dict, kernel: str) -> None:
    """No access to memory in front of griddepcontrol.wait, by its first place among the instructions."""
    names = list(machine_code[kernel])
    memory = ("LD.", "LDG", "ST.", "STG", "RED", "ATOM", "UBLKCP", "UTMALDG", "UTMASTG")
    assert not [name for name in names[: names.index("ACQBULK")] if name.startswith(memory)]


def test_registers_leave_room(resources: dict[str, dict[str, int]]) -> None:
    """Blocks of 256 threads: three a multiprocessor forward, two backward, eight for the style sums."""
    for kernel, blocks in [*((name, 3) for name in FORWARD), (WEIGHTS, 2), (STYLES, 8)]:
        assert resources[kernel]["REG"] * 256 * blocks <= 65536, kernel


@pytest.mark.parametrize("kernel", [*STACK, *CHAIN, *BLEND])
def test_the_stack_is_asynchronous_products(machine_code: dict, resources: dict, kernel: str) -> None:
    """wgmma fed from registers, weights and inputs by the copy engine, registers moved from producers to consumers; the
    compiler serialised no product, which would show as a wait beside each."""
    counter = machine_code[kernel]
    products = sum(n for name, n in counter.items() if name.startswith("HGMMA.64"))
    assert products >= 4 * 8 * 2 * 2, counter  # four a slab, eight positions, last chunk and others, layer 0 and others
    waits = sum(n for name, n in counter.items() if name.startswith("WARPGROUP.DEPBAR"))
    assert 0 < waits < 0.6 * products, counter
    for instruction in ("UBLKCP", "UTMALDG.3", "SYNCS", "USETMAXREG", "BAR.ARV"):
        assert any(name.startswith(instruction) for name in counter), f"{instruction} is not among {counter}"
    threads = 384
    assert resources[kernel]["REG"] * threads <= 65536, kernel


@pytest.mark.parametrize("kernel", WGRAD)
def test_weight_gradients_are_asynchronous_products(machine_code: dict, resources: dict, kernel: str) -> None:
    """Of both operands in shared memory, four of 256 columns a stage in each of three loops, and the colours' beside them."""
    counter = machine_code[kernel]
    products = sum(n for name, n in counter.items() if name.startswith("HGMMA.64"))
    waits = sum(n for name, n in counter.items() if name.startswith("WARPGROUP.DEPBAR"))
    assert products == 3 * 4 + 2 + 4 and waits == 3 * 2, counter
    for instruction in ("UTMALDG.3D.MULTICAST", "UTMALDG.3D", "UBLKCP", "USETMAXREG", "STG.E.128"):
        assert any(name.startswith(instruction) for name in counter), f"{instruction} is not among {counter}"
    assert resources[kernel]["REG"] * 384 <= 65536, kernel


def test_links_neither_torch_nor_driver(extension: Path) -> None:
    text = subprocess.run(["ldd", extension], capture_output=True, text=True, check=True).stdout
    needed = " ".join(line.split()[0] for line in text.splitlines())
    assert "libstdc++" in needed
    assert not re.search(r"libcuda|torch|libc10|libpython", needed), needed


def test_module_says_what_it_is(module: ModuleType) -> None:
    assert module.architectures == ("90a",)
    assert 12000 <= module.runtime_version() < 20000
    assert module.max_matrices == 64


def shape(**changes: int) -> tuple:
    fields = dict(out=32, width=64, weight=0, style=0, mod=0, stride=64, demodulate=True) | changes
    return tuple(fields.values())


@pytest.mark.parametrize(
    ("matrices", "batch", "words"),
    [
        ([], 1, "matrices: 0 came, expected 1 to 64"),
        ([shape()] * 65, 1, "matrices: 65 came, expected 1 to 64"),
        ([shape()], 0, "batch: 0 came"),
        ([shape(out=0)], 1, r"matrices\[0\].out_features: 0 came"),
        ([shape(), shape(width=-3)], 1, r"matrices\[1\].in_features: -3 came"),
        ([shape(stride=65)], 1, r"matrices\[0\].row_stride: 65 came, expected a multiple of 16"),
        ([shape(stride=48)], 1, "row_stride: 48 came.*in_features = 64"),
        ([shape(stride=80)], 1, "row_stride: 80 came.*rounded up"),
        ([shape(weight=-1)], 1, "weight_offset: -1 came"),
        ([shape(style=-1)], 1, "style_offset: -1 came"),
        ([shape(mod=8)], 1, "mod_offset: 8 came, expected a multiple of 16"),
        ([shape(out=2**31 - 1)], 2**20, "tiles: .* came, expected at most 2.31 - 1"),
    ],
)
def test_plan_refuses(module: ModuleType, matrices: list, batch: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        module.ModulatePlan(matrices, batch)


def test_scratch_is_one_partial_a_row_block(module: ModuleType) -> None:
    shapes = [shape(out=17, width=20, stride=32), shape(out=3, width=1030, stride=1040)]
    assert module.ModulatePlan(shapes, 5).scratch_numel == 3 * 5 * 32 + 1 * 5 * 1040
    wide = [shape(out=2**20, width=2**16, stride=2**16)]  # beyond 32 bits
    assert module.ModulatePlan(wide, 9).scratch_numel == 2**17 * 9 * 2**16


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"weights": 0}, "weights: a null address"),
        ({"weights": 1026}, "weights: address is not a multiple of 4"),
        ({"styles": 0}, "styles: a null address"),
        ({"style_stride": 63}, "style_stride: 63 came, expected at least 64"),
        ({"mods": 1032}, "mods: address is not a multiple of 16"),
        ({"dtype": "float64"}, "dtype: 'float64' came"),
    ],
)
def test_forward_refuses(module: ModuleType, changes: dict, words: str) -> None:
    """Bad arguments are named before any CUDA call, so that a machine without a GPU shows the same."""
    arguments = dict(weights=1024, styles=1024, style_stride=64, mods=1024, dtype="bfloat16", eps=1e-8)
    with pytest.raises(ValueError, match=words):
        module.modulate_forward(
            module.ModulatePlan([shape()], 2), **(arguments | changes), device=0, stream=0
        )


@pytest.mark.parametrize("name", ["grad_mods", "scratch"])
def test_backward_refuses(module: ModuleType, name: str) -> None:
    addresses = dict.fromkeys(
        ["grad_mods", "weights", "styles", "scratch", "grad_weights", "grad_styles"], 1024
    )
    rest = dict(style_stride=64, grad_style_stride=64, eps=1e-8, device=0, stream=0)
    with pytest.raises(ValueError, match=f"{name}: address is not a multiple of 16"):
        module.modulate_backward(module.ModulatePlan([shape()], 2), **(addresses | {name: 1028}), **rest)


def test_launch_without_a_gpu_raises(extension: Path) -> None:
    """In a process that sees no device, so that nobody touches the wild addresses: twice, and life goes on."""
    program = f"""
import importlib.util
spec = importlib.util.spec_from_file_location("_cuda", {str(extension)!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
plan = module.ModulatePlan([(32, 64, 0, 0, 0, 64, True)], 2)
for _ in range(2):
    try:
        module.modulate_forward(plan, weights=1024, styles=1024, style_stride=64, mods=1024, dtype="float32",
                                eps=1e-8, device=0, stream=0)
    except RuntimeError as error:
        print("raised", error)
"""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert len(re.findall(r"^raised cuda\w+: cudaError\w+: ", run.stdout, re.MULTILINE)) == 2, run.stdout


def test_includes_run_downwards() -> None:
    for path in sources():
        layer = LAYERS.index(path.relative_to(CSRC).parts[0])
        for name in re.findall(r'#include "([^"]+)"', path.read_text()):
            assert (CSRC / name).exists(), f"{path}: {name}"
            assert LAYERS.index(name.split("/")[0]) <= layer, f"{path} includes {name}"


def test_only_the_binding_knows_python_and_nobody_knows_torch() -> None:
    for path in sources():
        includes = " ".join(re.findall(r"#include <([^>]+)>", path.read_text()))
        assert not re.search(r"torch|ATen|c10", includes), path
        assert path.parent.name == "binding" or not re.search(r"pybind11|Python\.h", includes), path


def test_one_kernel_a_file() -> None:
    for path in sources():
        kernels = len(re.findall(r"^\s*__global__", path.read_text(), re.MULTILINE))
        assert kernels == (path.parent.name == "kernels"), f"{path}: {kernels} kernels"
