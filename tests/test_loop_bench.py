"""The benchmark of the whole training loop: what it runs, how its windows become rows, and that it says what cannot be."""

from __future__ import annotations

import json

import pytest

import benchmark_helpers  # noqa: F401 (puts benchmarks/ on the path)
from cips.training import TrainConfig

import loop_bench  # isort: skip


def test_rows_are_medians_of_all_windows_and_the_loop_is_told_in_shares_of_the_bare_iteration():
    def part(rates: list[float], memory: float) -> dict:
        return {"images_per_second": rates, "memory_gib": memory}

    found = {"bare": [part([100.0, 90.0], 4.0), part([110.0], 4.0)], "loop": [part([95.0], 4.4), part([97.0, 99.0], 4.2)]}
    head = {"device": "GPU", "torch": "2", "preset": "paper", "dtype": "bfloat16", "size": 256, "batch": 16}
    results = loop_bench.summary(found, [9.0, 7.5], head)
    assert results["rows"]["bare"] == {"images_per_second": 100.0, "memory_gib": 4.0, "windows": 3}
    assert results["rows"]["loop"] == {"images_per_second": 97.0, "memory_gib": 4.4, "windows": 3}
    assert results["loop_to_bare"] == {"images_per_second": 0.97, "memory_gib": pytest.approx(1.1)}
    said = loop_bench.table(results)
    assert "| loop to bare | 0.970 | 1.100 |" in said and "first step 7.5 s after the call" in said


def test_both_train_the_same_run(tmp_path, monkeypatch):
    monkeypatch.setattr(loop_bench, "WINDOW", 2)
    monkeypatch.setattr(loop_bench, "SKIPPED", 1)
    loop_bench.write_images(tmp_path / "images", 4, 8)
    options = {"data": str(tmp_path / "images"), "size": 8, "batch": 2, "preset": "small", "device": "cpu"}
    config = TrainConfig(**options, d_width=0.002, cache=str(tmp_path / "cache"), r1_every=16).resolve()
    bare = loop_bench.bare(config, 2)
    looped = loop_bench.looped(config, 2, tmp_path / "loop")
    for found in (bare, looped):
        assert len(found["images_per_second"]) == 2 and min(found["images_per_second"]) > 0 and found["memory_gib"] > 0
    lines = [json.loads(line) for line in (tmp_path / "loop" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6] and "r1" in lines[0]
    assert [path.name for path in (tmp_path / "loop" / "checkpoints").iterdir()] == ["step-00000006.pt"], "one, at the end"


def test_a_size_that_cannot_be_is_one_line(capsys):
    assert loop_bench.main(["--size=17", "--images=1", "--device=cpu"]) == 2
    assert capsys.readouterr().err == "loop_bench: error: size: expected a power of two of at least 8, got 17\n"
