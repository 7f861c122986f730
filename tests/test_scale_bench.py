"""The benchmark of one and several GPUs: how windows become rows, and that it says what it cannot do."""

from __future__ import annotations

import argparse

import pytest
import torch

import benchmark_helpers  # noqa: F401 (puts benchmarks/ on the path)

import scale_bench  # isort: skip


def part(gpus: int, rates: list[float], ok: bool = True, graphs: bool = False) -> dict:
    row = {"gpus": gpus, "graphs": graphs, "images_per_second": rates, "sum_ms": 2.0, "peak_bytes": None, "ok": ok}
    head = {"device": "GPU", "torch": "2", "preset": "paper", "dtype": "bfloat16"}
    return {"head": head, "rows": [row]}


def merged(parts: list[dict]) -> dict:
    options = argparse.Namespace(gpus=[1, 2], batch=16, size=256, rounds=2)
    return scale_bench.merged(parts, options)


def test_rows_are_medians_of_all_windows_against_the_first_count():
    parts = [part(1, [100.0, 90.0]), part(2, [190.0, 170.0]), part(1, [110.0]), part(2, [210.0])]
    rows = merged(parts)["rows"]
    assert [(row["gpus"], row["images_per_second"], row["windows"]) for row in rows] == [(1, 100.0, 3), (2, 190.0, 3)]
    assert [row["speedup"] for row in rows] == [1.0, 1.9]
    graphed = merged([*parts, part(1, [200.0], graphs=True), part(2, [300.0], graphs=True)])["rows"]
    assert [(row["graphs"], row["speedup"]) for row in graphed] == [(False, 1.0), (False, 1.9), (True, 1.0), (True, 1.5)]


def test_one_wrong_round_makes_a_row_wrong():
    results = merged([part(1, [1.0]), part(2, [2.0]), part(1, [1.0]), part(2, [2.0], ok=False)])
    assert [row["ok"] for row in results["rows"]] == [True, False]
    assert scale_bench.table(results).splitlines()[-1].endswith("| NO |")


@pytest.mark.skipif(torch.cuda.device_count() > 63, reason="has them all")
def test_too_few_gpus_are_said(capsys):
    assert scale_bench.main(["--gpus", "1", "64"]) == 2
    assert "gpus: 64 asked for" in capsys.readouterr().err


def test_random_images_stand_in_for_the_built_in_ones(monkeypatch):
    monkeypatch.setattr(scale_bench.earth, "available", lambda: False)
    source = scale_bench.source_of(16)
    assert len(source) == scale_bench.RANDOM_IMAGES and source.images(scale_bench.np.arange(3)).shape == (3, 16, 16, 3)
