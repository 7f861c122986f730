"""The benchmark's whole generator: rivals and ours draw the oracle's image, points are the right ones, tables say so.

Everything runs on the CPU with narrow layers and a few pixels; nothing here judges a speed.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmark_helpers import CPU, SmallCeilings, options

import generator_cases  # isort: skip
import generator_providers  # isort: skip
import generator_report  # isort: skip
import generator_rivals  # isort: skip
import machine  # isort: skip
import modfc_bench  # isort: skip
import plot  # isort: skip
import providers  # isort: skip
import report  # isort: skip
from cases import BASELINE, CASES, DEPTH, FORWARD, GENERATOR, TRAINING  # isort: skip
from cips import Generator, grids, presets  # isort: skip
from generator_cases import FOVEATED, OWN_TABLE, GeneratorCase, GeneratorProblem, configuration  # isort: skip
from generator_checks import GeneratorChecker, exactly  # isort: skip
from generator_runner import GeneratorGroup  # isort: skip

FORMS = [("grouped_conv", providers.PLANES), ("grouped_conv", providers.CHANNELS_LAST), ("bmm", "")]
FIELDS = (
    "case", "provider", "mode", "dtype", "batch", "height", "width", "pixels", "ms", "ms_p20", "ms_p80",
    "tflops", "of_ceiling", "peak_mb", "error", "error_eager", "ok",
)  # fmt: skip


def small(
    name: str = GENERATOR,
    dtype: torch.dtype = torch.float32,
    batch: int = 2,
    channels: int = 32,
    size: tuple[int, int] = (6, 8),
    table: tuple[int, int] | None = None,
    layers: int = 5,
) -> GeneratorCase:
    config = configuration(size, channels, layers, table)
    return GeneratorCase(name, config, batch, *size, dtype)


def problem_of(case: GeneratorCase, seed: int = 3) -> GeneratorProblem:
    return generator_cases.make_problem(case, CPU, seed)


# --- what is drawn ------------------------------------------------------------------------------------------


def test_the_case_is_the_papers_generator() -> None:
    assert configuration((256, 256)) == presets["paper"]
    case = GeneratorCase(GENERATOR, configuration((256, 256)), 4, 256, 256, torch.bfloat16)
    assert case.flops() == 4 * presets["paper"].flops() and case.layers == DEPTH
    assert case.on_table_grid
    quarter = dataclasses.replace(case, name=FOVEATED)
    assert quarter.pixels == 128 * 128 and quarter.flops() * 4 == case.flops()
    dense = dataclasses.replace(case, height=1024, width=1024)
    assert not dense.on_table_grid and dense.flops() == 16 * case.flops()
    with pytest.raises(ValueError, match="mode"):
        case.flops(TRAINING)


def test_every_parameter_is_random_and_none_is_zero() -> None:
    first, again, other = (problem_of(small(), seed) for seed in (0, 0, 1))
    assert set(first.state) == set(Generator(small().config).state_dict())
    for name, t in first.state.items():
        assert float(t.abs().min()) > 0, name
        assert torch.equal(t, again.state[name]) and not torch.equal(t, other.state[name])
    assert len(first.strengths) == 5
    assert all(float(t) == 0 for t in first.without_noise().strengths)
    assert all(float(t) != 0 for t in first.strengths), "the problem itself keeps its noise"


def test_points_are_a_random_quarter_of_the_grid() -> None:
    """Each a pixel of the full image, bit for bit, none twice, in no order; and they have its colours."""
    case = small(FOVEATED)
    problem = problem_of(case)
    grid = grids.full(case.height, case.width).flatten(0, 1)
    same = (problem.coords[:, None] == grid[None]).all(-1)
    index = same.long().argmax(1)
    assert problem.coords.shape == (12, 2) and same.any(1).all()
    assert len(index.unique()) == 12 and index.tolist() != sorted(index.tolist())
    assert problem_of(case, 4).coords.tolist() != problem.coords.tolist()
    whole = dataclasses.replace(problem, case=small(), coords=None)
    everywhere = exactly(whole, whole.points(), with_noise=True)
    assert torch.equal(exactly(problem, problem.points(), with_noise=True), everywhere[:, index])


def test_flops_are_those_that_pytorch_counts() -> None:
    """Its count of the batched products: mapping, affines, modulation and angles are left out of the formula."""
    case = small()
    problem = problem_of(case)
    run = generator_providers.build("bmm", CPU, torch.float32).adapt(problem).run
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run(None)
    counted = counter.get_flop_counts()["Global"]
    assert sum(n for op, n in counted.items() if "bmm" in str(op)) == case.flops()


# --- right and wrong ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["whole", "points", "dense"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_provider_draws_the_oracles_image(kind: str, dtype: torch.dtype) -> None:
    # in bfloat16 near-zero arguments turn their signs, which averages out over many of them only
    channels, size = (32, (6, 8)) if dtype == torch.float32 else (192, (12, 12))
    case = small(FOVEATED if kind == "points" else GENERATOR, dtype, channels=channels, size=size)
    if kind == "dense":
        case = small(GENERATOR, dtype, channels=channels, size=size, table=(5, 4))
        assert not case.on_table_grid
    checker = GeneratorChecker(problem_of(case), sample=case.pixels // 2)
    low, high = (1e-8, 1e-5) if dtype == torch.float32 else (1e-4, 0.1)
    named = [*FORMS, *((name, "") for name in ("reference", "cpu", "sampler"))]
    for name, planes in named:
        provider = generator_providers.build(name, CPU, dtype, planes)
        if provider.unavailable is not None:
            continue
        verdict = checker.check(provider)
        assert verdict.ok, (name, planes, verdict)
        assert low < verdict.error < high


@pytest.mark.parametrize("kind", [GENERATOR, FOVEATED])
def test_formulations_are_exact_in_float64(kind: str) -> None:
    """With the very noise of the oracle; also the form that is written for a compiler."""
    problem = problem_of(small(kind, torch.float64, size=(8, 8)))
    noise = GeneratorChecker(problem, 64).noise(problem.points())
    exact = exactly(problem, problem.points(), with_noise=True)
    found = [generator_rivals.plain(problem, torch.arange(problem.case.pixels), noise)]
    for name, planes in FORMS:
        provider = generator_providers.build(name, CPU, torch.float64, planes)
        found.append(provider.to_pixels(provider.function(provider.adapt(problem), noise)))
    net = generator_rivals.prepare_pixels(problem)
    case = problem.case
    fixed = (case.dtype, case.config.rgb_layers, case.on_table_grid, noise)
    found.append(generator_rivals.bmm(net, problem.z, *fixed, for_compiler=True))
    # a coordinate is float32: interpolation at a pixel of the table's own grid is off by its rounding
    limit = 1e-10 if kind == GENERATOR else 1e-4
    for image in found:
        assert (image - exact).norm() <= limit * exact.norm()


def test_rivals_draw_fresh_noise() -> None:
    problem = problem_of(small())
    for name, planes in FORMS:
        provider = generator_providers.build(name, CPU, torch.float32, planes)
        adapted = provider.adapt(problem)
        first, second, off = (provider.function(adapted, noise) for noise in ("fresh", "fresh", None))
        assert not torch.equal(first, second) and not torch.equal(first, off)
        silent = provider.adapt(problem.without_noise())
        assert torch.equal(provider.function(silent, "fresh"), provider.function(silent, None))


def _one_pixel_unwritten(image: Tensor) -> Tensor:
    image = image.clone()
    image[:, :, -1, 0] = math.nan
    return image


BROKEN: dict[str, Callable[[Callable, GeneratorProblem, object], Tensor]] = {
    "image a hundredth too bright": lambda draw, p, n: draw(p, n) * 1.01,
    "a pixel unwritten": lambda draw, p, n: _one_pixel_unwritten(draw(p, n)),
    "no noise": lambda draw, p, n: draw(p, None),
    "rows swapped": lambda draw, p, n: draw(p, n).flip(2),
    "a bias left out": lambda draw, p, n: draw(_without(p, "synthesis.layers.1.bias"), n),
    "the mapping's last layer": lambda draw, p, n: draw(_without(p, "mapping.8.bias"), n),
    "wrong shape": lambda draw, p, n: draw(p, n)[:, :, :-1],
}


def _without(problem: GeneratorProblem, name: str) -> GeneratorProblem:
    state = problem.state | {name: torch.zeros_like(problem.state[name])}
    return dataclasses.replace(problem, state=state)


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_provider_is_reported_and_not_timed(fault: str) -> None:
    """Each fault alone is seen; it gets a row without a time, while who is right beside it is timed."""
    right = generator_providers.build("bmm", CPU, torch.float32)
    planes = generator_providers.build("grouped_conv", CPU, torch.float32, providers.PLANES)
    calls: list[object] = []

    def prepare(problem: GeneratorProblem) -> Callable:
        def run(noise: object) -> Tensor:
            calls.append(noise)

            def draw(p: GeneratorProblem, n: object) -> Tensor:
                return planes.function(planes.adapt(p), n)

            return BROKEN[fault](draw, problem, noise)

        return run

    def build(name: str, *arguments: object) -> generator_providers.GeneratorProvider:
        return dataclasses.replace(planes, name=name, prepare=prepare) if name == "broken" else right

    said: list[str] = []
    chosen = options(["bmm", "broken"], said=said)
    rows = GeneratorGroup(small(), chosen, SmallCeilings(), build).run(0.1).rows
    by_name = {row["provider"]: row for row in rows}
    assert len(rows) == 2 and by_name["bmm"]["ok"], "forward only"
    broken = by_name["broken"]
    assert not broken["ok"] and broken["reason"]
    assert all(broken[key] is None for key in ("ms", "tflops", "of_ceiling", "peak_mb"))
    assert "fresh" not in calls, "what is timed draws fresh noise"
    assert any("broken FAILED" in line for line in said)


def test_rows_carry_their_fields_and_numbers() -> None:
    chosen = options(["bmm", "cpu", "reference"])
    case = dataclasses.replace(small(FOVEATED), left_out=("reference",))
    outcome = GeneratorGroup(case, chosen, SmallCeilings()).run(0.1)
    assert [row["provider"] for row in outcome.rows] == ["bmm", "cpu"]
    assert [item["provider"] for item in outcome.left_out] == ["reference"]
    for row in outcome.rows:
        assert set(FIELDS) <= set(row) and row["ok"] and row["mode"] == FORWARD
        assert (row["case"], row["height"], row["width"], row["pixels"]) == (FOVEATED, 6, 8, 12)
        assert row["tflops"] == pytest.approx(case.flops() / row["ms"] * 1e-9)
        assert row["of_ceiling"] == pytest.approx(row["tflops"] / row["ceiling_rate"])
        assert 0 < row["ms_p20"] <= row["ms"] <= row["ms_p80"]
        assert 0 < row["error"] <= 2 * row["error_eager"]
    assert json.loads(json.dumps(outcome.rows)) == outcome.rows


def test_without_the_sampler_it_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    import cips

    monkeypatch.delattr(cips, "Sampler", raising=False)
    provider = generator_providers.build("sampler", CPU, torch.float32)
    assert "Sampler" in (provider.unavailable or "")
    outcome = GeneratorGroup(small(), options(["sampler"]), SmallCeilings()).run(0.1)
    assert not outcome.rows and "unavailable" in outcome.left_out[0]["reason"]


def test_ours_share_the_problems_parameters() -> None:
    """A captured graph is compared with noise turned off where the strengths lie."""
    problem = problem_of(small())
    drawn = generator_providers.generator(problem, "reference")
    for name, t in drawn.state_dict().items():
        assert t.data_ptr() == problem.state[name].data_ptr(), name
    exactly(problem, problem.points(), with_noise=False)
    assert all(t.dtype == torch.float32 for t in problem.state.values()), "the oracle widens copies"
    net = generator_rivals.prepare_pixels(problem)
    assert [t.data_ptr() for t in net.layers.strengths] == [t.data_ptr() for t in problem.strengths]


@pytest.mark.gpu
def test_a_compiled_rival_and_a_graph_on_a_gpu() -> None:
    device = torch.device("cuda")
    case = small(dtype=torch.bfloat16, channels=256, size=(32, 32))
    chosen = dataclasses.replace(options([BASELINE, "triton", "sampler"]), device=device)
    ceilings = SmallCeilings()
    ceilings.device = device
    rows = GeneratorGroup(case, chosen, ceilings).run(0.5).rows
    found = {row["provider"]: row for row in rows}
    assert all(row["ok"] for row in rows), [row.get("reason") for row in rows]
    assert {BASELINE, BASELINE + "+graph", "triton", "triton+graph", "sampler"} <= set(found)
    assert found["sampler"]["kept_mb"] > 0 and found[BASELINE]["peak_mb"] > 0


# --- what is planned ----------------------------------------------------------------------------------------


def _planned(device: str, *arguments: str, monkeypatch: pytest.MonkeyPatch) -> list:
    monkeypatch.setattr(modfc_bench, "eager_rate", lambda device: 1.0)
    monkeypatch.setattr(machine, "has_bf16", lambda device: True)
    chosen = modfc_bench.parser().parse_args(arguments)
    where = torch.device(device)
    found = modfc_bench.terms(chosen, where)
    layers = modfc_bench.plan(chosen, where, found)
    whole = modfc_bench.plan_generator(chosen, where, found)
    return modfc_bench.in_order(layers, whole, where.type == "cuda")


def test_a_gpu_runs_every_question_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """The generator with 16 images and 1 comes first; a quarter of the pixels and 1024x1024 before the lone layer."""
    cases = _planned("cuda", monkeypatch=monkeypatch)
    placed = [(case.name, case.batch, case.height) for case in cases]
    assert placed[:2] == [(GENERATOR, 16, 256), (GENERATOR, 1, 256)]
    wanted = {(FOVEATED, 16, 256), (FOVEATED, 1, 256), (GENERATOR, 1, 1024), (OWN_TABLE, 1, 1024), (GENERATOR, 4, 256)}
    assert wanted <= set(placed) and len(placed) == len(set(placed)) == 7 + 3 * len(CASES)
    assert [place[:2] for place in placed if place[0] == "stack"] == [("stack", b) for b in (16, 1, 4)]
    assert max(placed.index(place) for place in wanted) < placed.index(("layer", 16, 256))
    dense = cases[placed.index((GENERATOR, 1, 1024))]
    assert dense.config == presets["paper"] and BASELINE not in dense.left_out
    assert not dense.on_table_grid
    own = cases.pop(placed.index((OWN_TABLE, 1, 1024)))
    assert own.config == dataclasses.replace(presets["paper"], size=(1024, 1024)) and own.on_table_grid and "bmm" not in own.left_out
    assert own.flops() == dense.flops()
    assert all(case.config == presets["paper"] for case in cases if case.family == GENERATOR)


def test_a_cpu_draws_small_pictures_after_the_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = _planned("cpu", monkeypatch=monkeypatch)
    whole = [case for case in cases if case.family == GENERATOR]
    assert [case.name for case in whole] == [GENERATOR, FOVEATED]
    assert {case.dtype for case in whole} == {torch.float32} and whole[0].layers == 3
    assert [case.name for case in cases[:3]] == list(CASES) and cases[-1].dtype == torch.bfloat16
    assert not any(c.family == GENERATOR for c in _planned("cpu", "--quick", monkeypatch=monkeypatch))
    training = _planned("cpu", "--modes", TRAINING, monkeypatch=monkeypatch)
    assert not any(case.family == GENERATOR for case in training)
    alone = _planned("cpu", "--cases", GENERATOR, "--providers", "reference", monkeypatch=monkeypatch)
    assert {case.family for case in alone} == {GENERATOR} and not any(case.left_out for case in alone)


def test_the_program_times_it_when_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole way to the results file and its tables; the layers' groups know no sampler."""
    arguments = [
        "--cases",
        "generator,layer",
        "--device",
        "cpu",
        "--size",
        "6x8",
        "--channels",
        "32",
        "--layers",
        "3",
    ]
    arguments += ["--dtype", "float32", "--providers", "grouped_conv,bmm,cpu,sampler", "--out", str(tmp_path)]
    assert modfc_bench.main(arguments) == 0
    results = json.loads(next(tmp_path.glob("*.json")).read_text())
    found = {(row["case"], row["provider"], row["mode"]) for row in results["rows"]}
    assert {
        (case, name, FORWARD) for case in (GENERATOR, FOVEATED) for name in ("grouped_conv", "bmm", "cpu")
    } <= found
    assert ("layer", "sampler", FORWARD) not in found and ("layer", "cpu", TRAINING) in found
    assert f"{GENERATOR}, forward, float32, 2 x 6x8" in capsys.readouterr().out
    picture = next(tmp_path.glob("*.svg")).read_text()
    assert "whole generator of 3 layers" in picture and "a quarter of the pixels" in picture
    assert "The whole generator" in report.tables(tmp_path) and "| generator, 2 images of 6x8" in report.readme_section(tmp_path)


# --- the table ----------------------------------------------------------------------------------------------


def _row(provider: str, batch: int, ms: float | None, case: str = GENERATOR, size: int = 256) -> dict:
    return {
        "case": case, "provider": provider, "mode": FORWARD, "dtype": "bfloat16", "batch": batch, "height": size,
        "width": size, "layers": 15, "ms": ms, "ms_p20": ms, "ms_p80": ms, "tflops": 1.0, "of_ceiling": 0.5,
        "peak_mb": 100.0 * batch, "error": 1e-2, "error_eager": 1e-2, "ok": ms is not None, "samples": 3,
    }  # fmt: skip


def _made_up() -> dict:
    rows = [_row(BASELINE, batch, 2.0 * batch) for batch in (16, 1, 4)]
    rows += [_row("grouped_conv", batch, 8.0 * batch) for batch in (16, 1, 4)]
    rows += [_row("sampler", 16, 16.0), _row("sampler", 1, 1.5), _row("cuda", 16, None)]
    rows += [
        _row("sampler", 16, 4.8, FOVEATED),
        _row("sampler", 1, 0.6, FOVEATED),
        _row("cuda", 1, 0.7, FOVEATED),
    ]
    rows += [_row("sampler", 1, 16.0, size=1024), _row(BASELINE, 1, 40.0, size=1024), _row("sampler", 1, 15.0, OWN_TABLE, size=1024)]
    head = {"device": "Tester", "torch": "2.99", "triton": None, "cuda": None, "date": "2030-01-02T03:04"}
    ceiling = {"matmul_bfloat16": {"median": 700.0, "unit": "TFLOP/s"}}
    return head | {"driver": None, "ceilings": ceiling, "rows": rows}


def test_the_table_says_what_was_measured() -> None:
    text = generator_report.markdown(_made_up())
    lines = text.splitlines()
    assert "256x256" in text and "1 / 4 / 16 images" in text and "matmul_bfloat16 700" in lines[0]
    ours = next(line for line in lines if line.startswith("| **`sampler`**"))
    assert "| 1.5 / - / 1 |" in ours and "| 50% / - / 50% |" in ours and "| 100 / - / 1600 |" in ours
    assert "| 0.75x / - / 0.50x |" in ours, "beside the compiled hand-written formulation"
    assert "| 0.19x / - / 0.12x |" in ours, "beside the official one"
    assert "| - / - / - |" in ours, "which was not compiled"
    assert "| **`cuda`**" not in text, "a row whose check fails is not printed"
    quarter = next(line for line in lines if line.startswith("A random quarter"))
    assert "`sampler`** 40% (B = 1), 30% (B = 16)" in quarter
    assert "cuda" not in quarter, "it has no time for the whole image to be compared with"
    dense = next(line for line in lines if line.startswith("1024x1024"))
    assert "interpolated" in dense and "`sampler`** 16.0 ms (50% of the ceiling, 0.40x, 100 MB)" in dense
    own = next(line for line in lines if "from a table of that size" in line)
    assert "`sampler`** 15.0 ms (50% of the ceiling" in own


def test_no_generator_no_table() -> None:
    results = _made_up()
    results["rows"] = [row | {"case": "layer"} for row in results["rows"]]
    assert generator_report.markdown(results) == ""


def test_the_page_beside_the_results_shows_the_table(tmp_path: Path) -> None:
    (tmp_path / "tester.json").write_text(json.dumps(_made_up()))
    assert generator_report.markdown(_made_up()) in report.tables(tmp_path)
    assert "whole generator" in plot.svg(_made_up())
    assert "runs of its own" not in report.tables(tmp_path)
    (tmp_path / GENERATOR).mkdir()
    (tmp_path / GENERATOR / "tester.json").write_text(json.dumps(_made_up() | {"device": "Later"}))
    page = report.tables(tmp_path)
    assert page.count("The whole generator") == 2 and page.index("runs of its own") < page.index("Later")


def test_only_what_is_known_is_built() -> None:
    with pytest.raises(ValueError, match="provider"):
        generator_providers.build("cudnn", CPU, torch.float32)
    assert set(generator_providers.NAMES) == set(modfc_bench.NAMES)
