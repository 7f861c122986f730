"""The benchmark of folders of samples: what it writes, and that a missed target is told."""

from __future__ import annotations

import json

import pytest

import benchmark_helpers  # noqa: F401 (puts benchmarks/ on the path)

import sample_bench  # isort: skip


def results(folder: float, *quarters: float) -> dict:
    options = {"count": 10, "size": 8, "preset": "paper", "dtype": "bfloat16", "batch": 2, "workers": 3, "level": 1}
    rows = {"synthesis_images_per_second": 100.0, "folder_images_per_second": folder, "ratio": folder / 100}
    rows |= {"start_seconds": 1.0, "bytes_an_image": 2000}
    quarter = [{"batch": k, "full_ms": 10.0, "quarter_ms": 10 * q, "ratio": q} for k, q in enumerate(quarters)]
    return {"device": "GPU", "options": options, "folder": rows, "quarter": quarter}


def test_targets_are_met_or_missed():
    assert sample_bench.report(results(50.0, 0.35, 0.3))[1]
    assert not sample_bench.report(results(49.0, 0.35, 0.3))[1]
    text, met = sample_bench.report(results(60.0, 0.3, 0.36))
    assert not met and "60.0 images/s, 3 workers" in text and "3.600 ms of 10.000 ms, 0.36" in text


def test_a_small_run_draws_every_file_and_writes_its_numbers(tmp_path, capsys):
    path = tmp_path / "deep" / "out.json"
    arguments = ["--device=cpu", "--preset=small", "--size=8", "--count=5", "--batch=2", "--workers=0", "--rounds=2"]
    assert sample_bench.main([*arguments, "--samples=3", f"--out={path}"]) in (0, 1)
    found = json.loads(path.read_text())
    rows = found["folder"]
    assert len(rows["seconds"]["folder"]) == 2 and rows["bytes_an_image"] > 50
    assert rows["ratio"] == rows["folder_images_per_second"] / rows["synthesis_images_per_second"]
    assert [row["batch"] for row in found["quarter"]] == [1, 2] and found["commit"]
    assert "synthesis alone" in capsys.readouterr().out


@pytest.mark.parametrize("option", ["--count=0", "--workers=-1", "--dtype=int8", "--level=10", "--samples=1"])
def test_bad_options_are_named(option, capsys):
    with pytest.raises(SystemExit) as left:
        sample_bench.main([option])
    assert left.value.code == 2 and f"{option.split('=')[0]}: expected" in capsys.readouterr().err
