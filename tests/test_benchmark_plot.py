"""The benchmark's picture: it says what the results say, needs nothing but the standard library, and is whole."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from benchmark_helpers import ROOT

import cases  # isort: skip
import machine  # isort: skip
import plot  # isort: skip
import providers  # isort: skip

SVG = "{http://www.w3.org/2000/svg}"
HEAD = {
    "device": "Tester <1> & Co",
    "torch": "2.99.0",
    "triton": None,
    "cuda": None,
    "date": "2030-01-02T03:04",
}


def _row(provider: str, ms: float | None, mode: str = "forward", **more: object) -> dict:
    place = dict(case="stack", layers=5, dtype="float32", batch=2, height=6, width=7, samples=8)
    spread = {} if ms is None else {"ms_p20": ms * 0.9, "ms_p80": ms * 1.1}
    return place | {"provider": provider, "mode": mode, "ms": ms, "ok": ms is not None} | spread | more


def _results(*rows: dict) -> dict:
    return HEAD | {"rows": list(rows)}


def _drawn(results: dict) -> tuple[dict[str, list[ElementTree.Element]], list[str]]:
    """Marks by class, in the order painted, and all texts."""
    root = ElementTree.fromstring(plot.svg(results))
    marks: dict[str, list[ElementTree.Element]] = {}
    for element in root.iter():
        marks.setdefault(element.get("class", ""), []).append(element)
    return marks, ["".join(text.itertext()) for text in root.iter(f"{SVG}text")]


def test_bars_are_as_long_as_the_times_are_beside_the_best_rival() -> None:
    """The baseline is the fastest of PyTorch's own, compiled or not, never one of ours."""
    rows = [_row("grouped_conv", 16.0), _row("bmm", 8.0), _row("bmm_compiled", 10.0), _row("cpu", 4.0)]
    marks, texts = _drawn(_results(*rows))
    lengths = [float(bar.get("width")) for bar in marks["bar"]]
    assert [length / lengths[1] for length in lengths] == pytest.approx([2.0, 1.0, 1.25, 0.5], abs=0.01)
    first = float(marks["bar"][0].get("x"))
    best = float(marks["best"][0].get("d").split()[0].lstrip("M"))
    assert best - first == pytest.approx(lengths[1], abs=0.02), (
        "the dashed line stands at the best rival's end"
    )
    for label in ("8.00 ms · 2.00×", "4.00 ms · 1.00×", "5.00 ms · 1.25×", "2.00 ms · 0.50×"):
        assert label in texts, "milliseconds an image, and the ratio"


def test_whiskers_reach_from_percentile_to_percentile() -> None:
    marks, _ = _drawn(_results(_row("bmm", 8.0), _row("cpu", 4.0, ms_p20=3.0, ms_p80=6.0)))
    unit, start = float(marks["bar"][0].get("width")), float(marks["bar"][1].get("x"))
    left, right = re.match(r"M([\d.]+) [\d.]+ H([\d.]+)", marks["whisker"][1].get("d")).groups()
    assert (float(left) - start) / unit == pytest.approx(3 / 8, abs=0.01)
    assert (float(right) - start) / unit == pytest.approx(6 / 8, abs=0.01)
    marks, _ = _drawn(_results(_row("bmm", 1.0), _row("cpu", 2.9, ms_p80=40.0)))
    inside, beyond = (mark.get("d") for mark in marks["whisker"])
    assert inside.count("v6") == 2 and beyond.count("v6") == 1, "no cap where it goes on beyond the axis"


def test_rivals_are_those_that_are_timed() -> None:
    assert set(cases.RIVALS) == set(providers.RIVALS)
    built = {name: providers.build(name, torch.device("cpu"), torch.float32) for name in cases.RIVALS}
    assert {name for name, provider in built.items() if provider.compiled} == set(cases.COMPILED)


def test_a_bar_that_is_cut_says_so() -> None:
    marks, texts = _drawn(_results(_row("bmm", 1.0), _row("grouped_conv", 50.0)))
    rival, slow = (float(bar.get("width")) for bar in marks["bar"])
    assert slow == pytest.approx(plot._MOST * rival, abs=0.1)
    assert marks["cut"] and "25.0 ms · 50.00×" in texts


def test_who_failed_gets_no_bar() -> None:
    marks, texts = _drawn(_results(_row("bmm", 1.0), _row("cuda", None), _row("triton", 2.0)))
    assert len(marks["bar"]) == 2 and "failed, not timed" in texts and "cuda" in texts
    marks, texts = _drawn(_results(_row("bmm", None), _row("cuda", 3.0)))
    assert "1.50 ms · 1.00×" in texts, "without a rival, the fastest is the measure"
    marks, texts = _drawn(_results(_row("bmm", None)))
    assert "bar" not in marks and "failed, not timed" in texts


def test_cases_and_modes_have_groups_of_their_own() -> None:
    """A group's baseline is its own; a mode stands beside the other; device and versions are in the caption."""
    rows = [
        _row("bmm", 8.0), _row("bmm", 30.0, "forward+backward"), _row("cpu", 15.0, "forward+backward"),
        _row("bmm", 2.0, case="layer", layers=1), _row("cpu+graph", 3.0, case="layer", layers=1),
    ]  # fmt: skip
    marks, texts = _drawn(_results(*rows))
    assert len(marks["best"]) == 4
    assert {"7.50 ms · 0.50×", "1.50 ms · 1.50×", "forward", "forward + backward", "cpu, CUDA graph"} <= set(
        texts
    )
    assert any(text.startswith("stack of 5 layers") and "float32, 2 × 6×7" in text for text in texts)
    assert "Tester <1> & Co: torch 2.99.0, 2030-01-02" in texts
    legend = {"PyTorch, eager", "this package", "20th to 80th percentile", "best of PyTorch"}
    assert legend <= set(texts) and "PyTorch, torch.compile" not in texts, "only what is there"


@pytest.mark.parametrize("path", machine.stack_results(), ids=lambda path: path.stem)
def test_committed_pictures_are_those_of_their_results(path: Path) -> None:
    picture = path.with_suffix(".svg")
    assert picture.read_text(encoding="utf-8") == plot.svg(json.loads(path.read_text())), (
        "run: python benchmarks/report.py --plots"
    )


def test_nothing_lies_outside_the_picture() -> None:
    """Bars, and texts by a generous guess of their widths."""
    for path in machine.stack_results():
        root = ElementTree.fromstring(plot.svg(json.loads(path.read_text())))
        width, height = float(root.get("width")), float(root.get("height"))
        background = root.find(f"{SVG}rect")
        assert background.get("fill") == "#ffffff" and float(background.get("width")) == width
        for text in root.iter(f"{SVG}text"):
            x, y, size = (float(text.get(key)) for key in ("x", "y", "font-size"))
            long = 0.58 * size * len("".join(text.itertext()))
            assert 0 < y < height
            assert x - long > 0 if text.get("text-anchor") == "end" else x + long / 2 < width
            assert text.get("text-anchor") or x + long < width, text.text


def test_only_the_standard_library_is_needed(tmp_path: Path) -> None:
    """Beside the runtime's PyTorch and numpy, which the benchmark's other pages import."""
    (tmp_path / "results.json").write_text(json.dumps(_results(_row("bmm", 1.0), _row("cpu", 2.0))))
    program = f"""
import json, sys
for name in ("matplotlib", "tqdm", "PIL", "scipy"):
    sys.modules[name] = None
sys.path[:0] = [{str(ROOT / "benchmarks")!r}, {str(ROOT)!r}]
from pathlib import Path
import plot
assert "cips_kernels" not in sys.modules, "results are drawn without the kernels, too"
assert plot.draw(json.loads(Path("results.json").read_text()), Path("out.svg")) is None
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.svg", "results.json"]


def test_a_picture_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = tmp_path / "a.svg"
    picture.write_text("old")
    assert plot.draw(_results(), picture) == "nothing was measured" and picture.read_text() == "old"

    def interrupted(self: Path, target: Path) -> None:
        assert self.read_text().endswith("</svg>\n") and target == picture
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        plot.draw(_results(_row("bmm", 1.0)), picture)
    assert picture.read_text() == "old"


def test_in_brief_the_extremes_where_rivals_are_at_their_best() -> None:
    def of(case: str, provider: str, batch: int, height: int = 6) -> dict:
        return _row(provider, 8.0, case=case) | {"batch": batch, "height": height}

    rows = [of("stack", name, batch) for batch in (1, 4, 16) for name in ("bmm", "cuda")]
    rows += [of("stack", "bmm_compiled", 16), of("stack", "bmm_compiled", 4), of("layer", "bmm_compiled", 1)]
    rows += [of(cases.GENERATOR, "bmm_compiled", 1), of(cases.GENERATOR, "bmm_compiled", 1, 60)]
    shown = plot.brief(_results(*rows))["rows"]
    assert {(r["case"], r["batch"], r["height"]) for r in shown} == {("stack", 16, 6), (cases.GENERATOR, 1, 6)}
    plain = [row for row in rows if row["provider"] != "bmm_compiled"]
    assert {r["batch"] for r in plot.brief(_results(*plain))["rows"]} == {1, 16}, "compiled nowhere: what there is"
    assert plot.brief(_results())["rows"] == []
