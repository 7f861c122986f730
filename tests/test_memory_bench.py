"""The benchmark of what training keeps: its targets on made-up rows, and one call of it on a CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import benchmark_helpers  # noqa: F401 (puts benchmarks/ on the path)

import memory_bench  # isort: skip


def row(batch: int, save: str, ms: float | None, peak: float, size: int = 256) -> dict:
    return {"size": size, "batch": batch, "save": save, "ms": ms, "peak_bytes": int(peak * 1e9), "reason": None}


def test_what_misses_a_target_is_said() -> None:
    fine = [row(16, "all", 50.0, 19.0), row(16, "none", 69.0, 2.3), row(1, "all", 5.0, 2.4), row(1, "none", 6.9, 2.4)]
    assert memory_bench.missed(fine) == []
    slow = [row(16, "all", 50.0, 19.0), row(16, "none", 71.0, 2.5), row(1, "all", None, 90.0, 1024), row(1, "none", 9.0, 2.5, 1024)]
    assert memory_bench.missed(slow) == [
        "256x256, 16 images, none: 1.42 times the time of all, at most 1.4",
        "256x256, 16 images, none: 0.16 GB an image, at most 0.15",
        "1024x1024, 1 images, none: 2.50 GB an image, at most 2.4",
    ]


def test_a_call(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "memory.json"
    options = "--device cpu --dtype float32 --preset small --cases 8x2 16x1 --table 16 --samples 1"
    assert memory_bench.main([*options.split(), f"--out={out}"]) in (0, 1)
    results = json.loads(out.read_text())
    assert [(r["size"], r["batch"], r["save"]) for r in results["rows"]] == [
        *((8, 2, save) for save in memory_bench.SAVES), *((16, 1, save) for save in (*memory_bench.SAVES, "penalty")),
    ]  # fmt: skip
    assert all(r["ms"] > 0 and r["reason"] is None for r in results["rows"]) and len(results["source_digest"]) == 64
    assert "| 1 of 16x16 | penalty |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "words"),
    [("--cases 256", "--cases: expected SIZExIMAGES"), ("--samples 0", "--samples: expected at least 1"), ("--preset none", "--preset: expected one of")],
)
def test_bad_options_are_named(options: str, words: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as left:
        memory_bench.main(options.split())
    assert left.value.code == 2 and words in capsys.readouterr().err
