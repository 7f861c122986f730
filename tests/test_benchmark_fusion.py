"""The benchmark of the Triton backend's fusions, interpreted on a CPU: it times what is right and says what is not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="this machine has no triton")

from benchmark_helpers import ROOT

import triton_fusion_bench as bench  # isort: skip
from cases import make_case  # isort: skip

from cips_kernels.triton import layers
from cips_kernels.triton.fusion import Fusion

assert Path(bench.__file__).parent == ROOT / "benchmarks"

SMALL = ["--device", "cpu", "--size", "6", "--channels", "16", "--batches", "2", "--layers", "3", "--dtype", "float16"]
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are interpreted only without a CUDA device")


@pytest.fixture(autouse=True)
def untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples of 2 and 4 ms for everything."""
    monkeypatch.setattr(bench.Clock, "prepare", lambda *_: None)
    monkeypatch.setattr(bench, "take_turns", lambda entries, *_, **__: [e.samples.extend([2.0, 4.0]) for e in entries])


def run(path: Path) -> tuple[int, list[dict]]:
    status = bench.main([*SMALL, "--chunks", "20", "--budget", "1000", "--json", str(path)])
    return status, json.loads(path.read_text())["rows"]


@interpreted
def test_it_times_what_is_right(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    status, rows = run(tmp_path / "results.json")
    assert status == 0
    assert [row["variant"] for row in rows] == ["chain", "chunks of 20"]
    for row in rows:
        assert row["fault"] is None and row["error"] <= row["allowed"]
        assert row["ms_image"] == 3.0 / 2
        flops = 2 * 2 * 36 * (32 * 16 + 2 * 16 * 16 + 3 * 16)
        assert row["tflops"] == pytest.approx(flops / 3.0e-3 * 1e-12)
    assert "chunks of 20 | 1.500 |" in capsys.readouterr().out


@interpreted
def test_it_names_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    plain = layers.noise_values
    monkeypatch.setattr(layers, "noise_values", lambda inputs, spec, *first: plain(inputs, spec, 0, 0))
    status, rows = run(tmp_path / "results.json")
    assert status == 1
    assert rows[0]["fault"] is None and rows[1]["fault"].startswith("wrong") and "ms_image" not in rows[1]
    assert "chunks of 20 | wrong" in capsys.readouterr().out


def test_every_tile_of_the_list_is_one_of_its_width() -> None:
    """No pair's shared memory or rows are those of the other width: the first of each list is the rule's own."""
    from cips_kernels.triton import config

    for width, tiles in bench.TILES.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(config, "device_limits", lambda device: (227 * 1024, (9, 0), 132))
            assert config.pair_tile(width, torch.device("cpu")) == tiles[0]
        assert len(set(tiles)) == len(tiles)


@pytest.mark.parametrize("channels", [512, 256, 128])
def test_the_chain_comes_first_and_nothing_twice(channels: int) -> None:
    case = make_case("stack", batch=1, height=8, width=8, dtype=torch.bfloat16, channels=channels)
    found = bench.variants(case, True, bench.CHUNKS)
    assert (found[0].name, found[0].graph, found[0].fusion) == ("chain", False, Fusion())
    assert len({(v.name, v.graph) for v in found}) == len({(v.fusion, v.graph) for v in found}) == len(found)
    assert all(v.fusion.pairs in (0, channels) for v in found)
