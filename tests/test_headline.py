"""The README's short table, from made-up results."""

from __future__ import annotations

import json
from pathlib import Path

import benchmark_helpers  # noqa: F401 (puts benchmarks/ on the path)

import headline  # isort: skip

HEAD = {"device": "Tester", "torch": "2.99", "cuda": None, "date": "2030-01-02T03:04", "file": "tester.json"}
CEILINGS = {"matmul_bfloat16": {"median": 800.0, "unit": "TFLOP/s"}}


def row(case: str, mode: str, provider: str, batch: int, ms: float | None, size: int = 256) -> dict:
    return {
        "case": case, "mode": mode, "provider": provider, "batch": batch, "ms": ms, "ok": ms is not None, "height": size,
        "width": size, "dtype": "bfloat16", "layers": 15, "of_ceiling": 0.9, "tflops": 600.0, "ceiling": "matmul_bfloat16",
    }  # fmt: skip


def test_lines(tmp_path: Path) -> None:
    training, forward = "forward+backward", "forward"
    rows = [
        row("stack", forward, "cuda", 16, 1.0),
        *(row("stack", training, name, 16, ms) for name, ms in {"grouped_conv": 320.0, "bmm": 160.0, "bmm_compiled": 80.0, "triton": 64.0, "cuda": 48.0}.items()),
        *(row("stack", training, name, 1, ms) for name, ms in {"grouped_conv": 20.0, "bmm": 10.0, "reference": 1.0, "cuda": None, "cuda+graph": 4.0}.items()),
        *(row("generator", forward, name, 1, ms, 1024) for name, ms in {"bmm_compiled": 40.0, "bmm_compiled+graph": 30.0, "sampler": 10.0}.items()),
        *(row("generator-own-table", forward, name, 1, ms, 1024) for name, ms in {"bmm": 40.0, "sampler": 8.0}.items()),
    ]  # fmt: skip
    summary = {"published": {"ms": 800.0, "images_per_second": 20.0}, "ours": {"ms": 120.0, "images_per_second": 133.0}, "ours+graph": {"ms": 100.0, "images_per_second": 160.0}}
    (tmp_path / "tester-iteration.json").write_text(json.dumps({"summary": summary, "options": {"batch": 16, "size": 256}}))
    lines = headline.markdown({**HEAD, "ceilings": CEILINGS, "rows": rows}, tmp_path).splitlines()
    assert lines[0].startswith("**Tester**") and lines[4:] == [
        "| generator, 1 image of 1024x1024 | - | 30.0 (hand-written `bmm`, `torch.compile`, graph) | **10.0** (`sampler`) | - | **3.0x** | 90% | 75% |",
        "| generator with a table of that size, 1 image of 1024x1024 | - | - | **8** (`sampler`) | - | - | 90% | 75% |",
        # no rival at its best, and the reference formulation is not a provider to boast of
        "| stack of 15, forward+backward, 1 image of 256x256 | 20.0 | - | **4** (`cuda`, graph) | **5.0x** | - | 90% | 75% |",
        "| stack of 15, forward+backward, 16 images of 256x256 | 20.0 | 5 (hand-written `bmm`, `torch.compile`) | **3** (`cuda`) | **6.7x** | **1.7x** | 90% | 75% |",
        "| training iteration, R1 every 16th, 16 images of 256x256 | 50.0 | - | **6.25** (160 images/s) | **8.0x** | - | - | - |",
    ]


def test_nothing_of_ours_no_table(tmp_path: Path) -> None:
    rows = [row("stack", "forward+backward", "bmm", 1, 2.0), row("stack", "forward+backward", "cuda", 1, None)]
    assert headline.markdown({**HEAD, "ceilings": CEILINGS, "rows": rows}, tmp_path) == ""
