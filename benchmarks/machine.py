"""What was measured, on what: the head of a results file."""

from __future__ import annotations

import datetime
import hashlib
import json
import platform
import re
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
ITERATION = "-iteration"  # ends the name of what iteration_bench.py measured, which has rows of another kind
_SOURCES = {".py", ".cu", ".cuh", ".h", ".hpp", ".cpp", ".txt"}
_BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16", "svebf16"}


def _cpuinfo(key: str) -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    return next((line.split(":", 1)[1].strip() for line in lines if line.split(":")[0].strip() == key), None)


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's model."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    brand = _output("sysctl", "-n", "machdep.cpu.brand_string") if platform.system() == "Darwin" else None
    return _cpuinfo("model name") or brand or platform.processor() or platform.machine() or "cpu"


def slug(name: str) -> str:
    """A file name: `NVIDIA H100 80GB HBM3` becomes `nvidia-h100-80gb-hbm3`."""
    plain = re.sub(r"\((r|tm|c)\)", " ", name.lower())
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-") or "device"


def has_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices in hardware."""
    if device.type == "cuda":
        return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
    flags = _cpuinfo("flags") or _cpuinfo("Features") or ""
    return bool(_BF16_FLAGS & set(flags.split()))


def replace(path: Path, text: str) -> None:
    """Write a file under a temporary name, then rename it: whoever reads it meanwhile finds it whole."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def write(results: dict, kind: str, out: Path | None = None) -> Path:
    """Write results to `out`, or to the device's file in the folder of their kind: the tables of the kernels are made of every
    file beside that folder. Returns where."""
    path = out or RESULTS / kind / f"{slug(str(results['device']))}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    replace(path, json.dumps(results, indent=1) + "\n")
    return path


def stack_results(folder: Path = RESULTS) -> list[Path]:
    """The results files of modfc_bench.py in a folder."""
    return sorted(path for path in folder.glob("*.json") if not path.stem.endswith(ITERATION))


def cache_bytes(device: torch.device) -> int:
    """Size of a GPU's last cache, 0 on a CPU (whose cache the runs are not kept out of)."""
    if device.type != "cuda":
        return 0
    return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 64 * 2**20))


def source_digest(root: Path = ROOT) -> str:
    """SHA-256 over names and contents of the sources that decide a measurement."""
    found = [
        p for folder in ("cips_kernels", "csrc") for p in (root / folder).rglob("*") if p.suffix in _SOURCES
    ]
    found += [*(root / "python" / "cips").glob("*.py"), *(root / "benchmarks").glob("*.py")]
    digest = hashlib.sha256()
    for path in sorted(found, key=lambda p: p.relative_to(root).as_posix()):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def commit(root: Path = ROOT) -> str:
    """The commit checked out, `+changes` where tracked files differ, `unknown` outside git."""
    if not (root / ".git").exists():
        return "unknown"
    head = _output("git", "-C", str(root), "rev-parse", "--verify", "HEAD")
    if head is None:
        return "unknown"
    changed = _output("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no")
    return head + ("+changes" if changed else "")


def _driver(device: torch.device) -> str | None:
    if device.type != "cuda":
        return None
    answer = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return answer.splitlines()[0].strip() if answer else None


def describe(device: torch.device) -> dict[str, object]:
    """Everything of a results file but `ceilings` and `rows`."""
    try:
        import triton

        triton_version = triton.__version__
    except Exception:  # absent, or broken: either way it served nothing
        triton_version = None
    return {
        "device": device_name(device),
        "driver": _driver(device),
        "torch": torch.__version__,
        "triton": triton_version,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "tf32": bool(torch.backends.cuda.matmul.allow_tf32) if device.type == "cuda" else None,
        "commit": commit(),
        "source_digest": source_digest(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
