"""The benchmark of agreement: how runs become a verdict, and one call of it on a CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import benchmark_helpers  # noqa: F401 (puts benchmarks/ on the path)

import agreement_bench  # isort: skip


def run(backend: str, seed: int, shift: float, distance: float) -> dict:
    losses = [1.0 + shift, 2.0 + shift]
    return {"backend": backend, "seed": seed, "d_loss": losses, "g_loss": losses, "distance": distance}


RUNS = [run("a", 0, 0.0, 10.0), run("a", 1, 0.4, 12.0), run("b", 0, 0.1, 13.0), run("b", 1, 0.5, 15.5)]


def test_means_are_nearer_than_seeds_or_not() -> None:
    found = agreement_bench.means(RUNS, ["a", "b"])
    assert set(found) == {f"{name}, tenth {k}" for name in ("d_loss", "g_loss") for k in (1, 2)} | {"distance"}
    row = found["g_loss, tenth 2"]
    assert row["means"] == pytest.approx({"a": 2.2, "b": 2.3}) and row["nearer"]
    assert (row["apart"], row["spread"]) == pytest.approx((0.1, 0.4))
    assert found["distance"]["nearer"] is False and found["distance"]["apart"] == pytest.approx(3.25)


def test_backends_agree_unless_no_parting_is_as_far() -> None:
    """Partings ab|ab of four runs: losses 0.1, 0.4, 0 apart, distances 3.25, 2.25, 0.25."""
    found = agreement_bench.partings(RUNS, ["a", "b"])
    for name in ("d_loss", "g_loss"):
        row = found[name]
        assert (row["apart"], row["farthest"]) == pytest.approx((0.1, 0.4))
        assert (row["as_far"], row["ways"], row["agree"]) == (2, 3, True)
    row = found["distance"]
    assert (row["apart"], row["farthest"]) == pytest.approx((3.25, 3.25))
    assert (row["as_far"], row["ways"], row["agree"]) == (1, 3, False)


def test_tenths_are_means_of_their_steps() -> None:
    lines = [{"step": k, "d_loss": float(k)} for k in range(1, 41)] + [{"step": 40, "r1": 3.0}]
    assert agreement_bench.tenths(lines, "d_loss", 40) == [2.5 + 4 * k for k in range(10)]


def test_too_little_to_compare_is_said(capsys: pytest.CaptureFixture) -> None:
    for arguments, words in ((["--steps", "9"], "--steps: expected at least 10"), (["--seeds", "1"], "--seeds: expected at least two"), (["--jobs", "0"], "--jobs: expected at least 1")):
        with pytest.raises(SystemExit) as left:
            agreement_bench.main(arguments)
        assert left.value.code == 2 and words in capsys.readouterr().err


def test_a_call(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    """Two backends of the processor from one seed: apart by rounding alone after ten steps."""
    pytest.importorskip("cips.data.earth", reason="the trainer's packages are not installed")
    out = tmp_path / "agreement.json"
    options = "--device cpu --backends cpu reference --seeds 0 1 --size 16 --batch 4 --steps 10 --count 0 --width 16 --layers 3 --jobs 2"
    status = agreement_bench.main([*options.split(), "--d-width=0.002", f"--runs={tmp_path / 'runs'}", f"--out={out}"])
    results = json.loads(out.read_text())
    assert status == 0 and len(results["runs"]) == 4 and len(results["source_digest"]) == 64
    for row in results["means"].values():
        assert row["apart"] < 1e-3 * max(abs(v) for v in row["means"].values()) and row["spread"] > 0
    assert results["comparison"]["g_loss"]["as_far"] == results["comparison"]["g_loss"]["ways"] == 3
    said = capfd.readouterr().out
    assert "| g_loss, tenth 10 |" in said and "| g_loss, the curve |" in said
    again = tmp_path / "again.json"
    assert agreement_bench.main([f"--again={out}", f"--out={again}"]) == 0
    assert json.loads(again.read_text()) == results
