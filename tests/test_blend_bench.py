"""The benchmark of blends: what it checks, what it writes, and that a missed target is told."""

from __future__ import annotations

import json

import pytest

import benchmark_helpers  # noqa: F401 (puts benchmarks/ on the path)

import blend_bench  # isort: skip

SMALL = ["--device=cpu", "--channels=16", "--layers=3", "--size=8", "--samples=3", "--batch=1,2", "--dtype=float32"]


def results(*ratios: float, brief: float = 1.1) -> dict:
    options = {"layers": 15, "channels": 512, "size": 256, "dtype": "bfloat16"}
    rows = [{"batch": k, "one_ms": 2.0 * k, "two_ms": 2.0 * k * r, "ratio": r, "brief_ratio": brief} for k, r in enumerate(ratios, 1)]
    return {"device": "GPU", "options": options, "rows": rows}


def test_the_target_is_met_or_missed() -> None:
    assert blend_bench.report(results(1.3, 1.2))[1]
    text, met = blend_bench.report(results(1.2, 1.31))
    assert not met and "one style 2.000, two a pixel 2.620: 1.310, in brief turns 1.100 (at most 1.3)" in text
    assert not blend_bench.report(results(1.2, brief=1.31))[1], "brief turns have the same target"


def test_a_small_run_checks_times_and_writes(tmp_path, capsys) -> None:
    path = tmp_path / "deep" / "out.json"
    assert blend_bench.main([*SMALL, f"--out={path}"]) in (0, 1)
    found = json.loads(path.read_text())
    assert [row["batch"] for row in found["rows"]] == [1, 2] and found["commit"]
    for row in found["rows"]:
        assert row["ratio"] == row["two_ms"] / row["one_ms"] and row["brief_ratio"] == row["two_brief_ms"] / row["one_brief_ms"]
        assert 0 < row["two_error"] <= 2 * row["two_error_eager"] < 1e-4
    assert "two a pixel" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", ["noise", "blend"])
def test_wrong_colours_are_not_timed(wrong: str, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    right = blend_bench.functional.modfc_stack

    def broken(*args, **options):
        if wrong == "noise":
            options["noise"] += 1
        elif options["blend"] is not None:
            options["blend"] = options["blend"].flip(-1)
        return right(*args, **options)

    monkeypatch.setattr(blend_bench.functional, "modfc_stack", broken)
    assert blend_bench.main(SMALL) == 1
    assert "expected at most 2.0 x" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--batch=0", "--batch=x", "--size=1", "--samples=1", "--dtype=int8", "--layers=0"])
def test_bad_options_are_named(option: str, capsys) -> None:
    with pytest.raises(SystemExit) as left:
        blend_bench.main([option])
    assert left.value.code == 2 and f"{option.split('=')[0]}: expected" in capsys.readouterr().err
