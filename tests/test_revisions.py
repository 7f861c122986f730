"""The benchmark of two checkouts: each is timed by its own code, and what cannot be timed is said."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SMALL = ["--device=cpu", "--backend=cpu", "--dtype=float32", "--channels=16", "--layers=3", "--size=8", "--seconds=0.2", "--turn=2"]


def run(*folders: Path, calls: str = "forward:1,forward+backward:2") -> subprocess.CompletedProcess:
    # a folder as a shell completes it
    command = [sys.executable, ROOT / "benchmarks/revisions.py", *(f"{folder}/" for folder in folders), *SMALL, f"--calls={calls}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """A checkout that says so when its stacks are first asked for."""
    for part in ("cips_kernels", "python"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    page = tmp_path / "cips_kernels" / "functional.py"
    page.write_text(page.read_text() + '\nimport sys\n\nprint("the other code", file=sys.stderr)\n')
    return tmp_path


def test_each_checkout_runs_its_own_code(other: Path) -> None:
    done = run(ROOT, other)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("the other code") == 1
    lines = done.stdout.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["forward:1"] * 2 + ["forward+backward:2"] * 2
    for first, second in (lines[:2], lines[2:]):
        assert f"{ROOT}: " in first and "1.0000 of the first" in first and f"{other}: " in second
        assert float(second.split(" ms, ")[0].split()[-1]) > 0


def test_a_folder_without_the_package_is_refused(tmp_path: Path) -> None:
    done = run(ROOT, tmp_path)
    assert done.returncode != 0
    assert f"{tmp_path} holds no package cips_kernels" in done.stderr
