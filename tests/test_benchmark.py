"""The benchmark: what it writes is what it measured. Its check of providers is in `test_benchmark_checks.py`.

Everything runs on the CPU with narrow layers and a few pixels; nothing here judges a speed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmark_helpers import CPU, ROOT, small, written_out

import environment  # isort: skip
import machine  # isort: skip
import measure  # isort: skip
import modfc_bench  # isort: skip
import plot  # isort: skip
import providers  # isort: skip
import report  # isort: skip
import rivals  # isort: skip
from cases import CASES, FORWARD, MODES, TRAINING, Case, make_case, make_problem  # isort: skip
from runner import call_of, worth_capturing  # isort: skip

HEAD = ("device", "driver", "torch", "triton", "cuda", "commit", "source_digest", "date", "ceilings", "rows")
ROW = {
    "case": str, "provider": str, "mode": str, "dtype": str, "batch": int, "height": int, "width": int,
    "ms": float, "ms_p20": float, "ms_p80": float, "tflops": float, "of_ceiling": float,
    "error": float, "error_eager": float, "ok": bool,
}  # fmt: skip


# --- the program, from the command line to the file ---------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Path]:
    """One run of the program as a user runs it: the results, and the folder they lie in."""
    folder = tmp_path_factory.mktemp("results")
    command = [sys.executable, str(ROOT / "benchmarks" / "modfc_bench.py"), "--quick", "--device", "cpu"]
    command += ["--size", "6x7", "--channels", "32", "--dtype", "float32", "--out", str(folder)]
    before = machine.source_digest()
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    stem = machine.slug(machine.device_name(CPU))
    files = sorted(path.name for path in folder.iterdir())
    assert files == [stem + ".json", stem + ".svg"], "a file and its picture, and no temporary one left"
    assert "x bmm_compiled" in done.stdout
    results = json.loads((folder / files[0]).read_text())
    assert results["source_digest"] in (before, machine.source_digest())  # someone may be editing
    return results, folder


def test_results_hold_every_row_with_its_numbers(written) -> None:
    results, _ = written
    assert set(HEAD) <= set(results)
    assert results["torch"] == torch.__version__
    expected = {
        (case, provider, mode)
        for case in CASES
        for provider in ("grouped_conv", "bmm", "reference", "cpu")
        for mode in MODES
    }
    assert {(row["case"], row["provider"], row["mode"]) for row in results["rows"]} == expected
    for row in results["rows"]:
        for key, kind in ROW.items():
            assert isinstance(row[key], kind), (key, row)
        assert row["ok"]
        assert 0 < row["ms_p20"] <= row["ms"] <= row["ms_p80"]
        assert 0 < row["error"] <= 2 * row["error_eager"] < 1e-4
        case = make_case(row["case"], batch=2, height=6, width=7, dtype=torch.float32, channels=32, layers=3)
        assert row["layers"] == case.layers
        assert row["tflops"] == pytest.approx(case.flops(row["mode"]) / row["ms"] * 1e-9)
        moved = (
            case.bytes_moved(row["mode"]) / row["ms"] * 1e-6 if row["ceiling"] == "copy" else row["tflops"]
        )
        assert row["of_ceiling"] == pytest.approx(moved / row["ceiling_rate"])
    for name in ("matmul_float32", "copy"):
        rates = results["ceilings"][name]
        assert 0 < rates["p20"] <= rates["median"] <= rates["p80"]


def test_what_is_not_compiled_is_said(written) -> None:
    results, _ = written
    left = {item["provider"] for item in results["left_out"]}
    assert {"bmm_compiled", "grouped_conv_compiled"} <= left
    assert all(item["reason"] for item in results["left_out"])


def test_picture_is_that_of_the_results(written) -> None:
    results, folder = written
    picture = folder / (machine.slug(results["device"]) + ".svg")
    assert picture.read_text(encoding="utf-8") == plot.svg(results)
    assert picture.name in report.tables(folder) and report.BRIEF in report.readme_section(folder)


def _planned(monkeypatch: pytest.MonkeyPatch, *arguments: str, rate: float = 1.0) -> list[Case]:
    monkeypatch.setattr(modfc_bench, "eager_rate", lambda device: rate)
    monkeypatch.setattr(machine, "has_bf16", lambda device: True)
    return modfc_bench.plan(modfc_bench.parser().parse_args(arguments), CPU)


def test_a_cpu_runs_every_case_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """The paper's widths through few layers; what matters most first, each case before its second dtype."""
    cases = _planned(monkeypatch)
    named = [(case.name, case.dtype) for case in cases]
    assert named == [*((name, torch.float32) for name in CASES), ("stack", torch.bfloat16)]
    assert cases[0].widths == (1024, 512, 512, 512) and cases[0].rgb_after == (2,)
    assert {(case.height, case.width) for case in cases} == {(48, 48)}
    assert _planned(monkeypatch, rate=0.0)[0].pixels < cases[0].pixels, "a slow one must end in time, too"
    assert len(_planned(monkeypatch, "--dtype", "float32,bfloat16")) == 2 * len(CASES)
    assert _planned(monkeypatch, "--layers", "15")[0].layers == 15
    assert {"grouped_conv_compiled", "bmm_compiled", "reference", "cpu"} <= set(providers.default_names(CPU))


def test_without_a_compiler_the_rest_is_timed(tmp_path: Path) -> None:
    """Whoever needs it is unavailable, and the reason is told; that is no fault of the program's."""
    command = [sys.executable, str(ROOT / "benchmarks" / "modfc_bench.py"), "--device", "cpu", "--no-plot"]
    command += ["--cases", "layer", "--size", "6x7", "--channels", "32", "--dtype", "float32"]
    command += ["--providers", "bmm,bmm_compiled,grouped_conv_compiled", "--out", str(tmp_path)]
    variables = {"CXX": str(tmp_path / "no-compiler"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, timeout=300, env=os.environ | variables
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert {row["provider"] for row in results["rows"]} == {"bmm"} and all(
        row["ok"] for row in results["rows"]
    )
    reasons = {item["provider"]: item["reason"] for item in results["left_out"]}
    assert set(reasons) == {"bmm_compiled", "grouped_conv_compiled"}
    for reason in reasons.values():
        assert (
            reason.startswith("unavailable: torch.compile does not work here") and "compiler found" in reason
        )
        assert reason in done.stdout


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("--cases", "stck"),
        ("--providers", "cudnn"),
        ("--modes", "backward"),
        ("--batch", "0"),
        ("--size", "2x"),
        ("--dtype", "int8"),
        ("--device", "tpu"),
        ("--channels", "0"),
        ("--layers", "4"),
    ],
)
def test_bad_argument_is_named(argument: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert modfc_bench.main(["--device", "cpu", argument, value]) == 2
    message = capsys.readouterr().err
    assert "expected" in message
    assert argument.strip("-").rstrip("s") in message


def test_what_is_captured_as_a_graph_does_not_depend_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of a quick run on a GPU, however slow its host; of the whole run, what is too short to hide its launches."""
    monkeypatch.setattr(machine, "has_bf16", lambda device: True)

    def captured(*arguments: str) -> dict[tuple[str, int, str], bool]:
        cases = modfc_bench.plan(modfc_bench.parser().parse_args(arguments), torch.device("cuda", 0))
        return {(c.name, c.batch, mode): worth_capturing(c, mode) for c in cases for mode in MODES}

    quick, whole = captured("--quick"), captured()
    assert {name for name, _, _ in quick} == set(CASES) and all(quick.values())
    assert not whole["stack", 16, FORWARD] and not whole["stack", 4, TRAINING]
    assert whole["stack", 1, FORWARD] and whole["stack", 1, TRAINING] and whole["modulate", 16, TRAINING]


@pytest.mark.gpu
def test_quick_run_on_a_gpu(tmp_path: Path) -> None:
    """Every provider passes on the GPU too, short calls are captured as graphs, and memory is counted."""
    command = [sys.executable, str(ROOT / "benchmarks" / "modfc_bench.py"), "--quick", "--out", str(tmp_path)]
    done = subprocess.run([*command, "--device", "cuda"], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert results["driver"] and results["cuda"]
    rows = {(row["case"], row["provider"], row["mode"]): row for row in results["rows"]}
    for case in CASES:
        for mode in MODES:
            plain, graph = rows[case, "triton", mode], rows[case, "triton+graph", mode]
            assert plain["ok"] and graph["ok"] and plain["peak_mb"] > 0
    assert rows["stack", "bmm", TRAINING]["peak_mb"] > rows["stack", "bmm", FORWARD]["peak_mb"]


# --- errors are real ----------------------------------------------------------------------------------------


def test_reported_error_is_that_of_the_output(written) -> None:
    """A row's error, computed once more from nothing but the seed and the formulas."""
    results, _ = written
    row = next(
        r for r in results["rows"] if (r["case"], r["provider"], r["mode"]) == ("stack", "bmm", FORWARD)
    )
    problem = make_problem(small(layers=row["layers"]), CPU, 0)
    noise = None if row["worst"].endswith("off") else problem.noise
    exact = written_out(problem, noise)
    output = providers.build("bmm", CPU, torch.float32).function(problem, noise).detach().double()
    again = float((output - exact).norm() / exact.norm())
    assert row["error"] == pytest.approx(again, rel=0.05)
    eager = providers.PLAIN.function(problem, noise).detach().double()
    assert row["error_eager_measured"] == pytest.approx(
        float((eager - exact).norm() / exact.norm()), rel=0.05
    )


# --- what is counted ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["stack", "layer"])
@pytest.mark.parametrize("mode", MODES)
def test_flops_are_those_that_pytorch_counts(name: str, mode: str) -> None:
    """Its count of the batched products, less that of the modulation, which the formula leaves out."""
    case = small(name)
    problem = make_problem(case, CPU, 0)
    with FlopCounterMode(display=False) as counter:
        call_of(providers.build("bmm", CPU, torch.float32), mode)(problem)
    with FlopCounterMode(display=False) as modulation:
        for weight, style in zip(problem.weights, problem.styles):
            modulated = rivals.modulate(weight, style)
            if mode == TRAINING:
                torch.autograd.grad(modulated.sum(), [weight, style])
    assert modulation.get_total_flops() > 0
    assert counter.get_total_flops() - modulation.get_total_flops() == case.flops(mode)


def test_flops_of_the_paper() -> None:
    case = make_case("stack", batch=1, height=256, width=256, dtype=torch.bfloat16)
    layers = 1024 * 512 + 14 * 512 * 512
    assert case.flops(FORWARD) == 2 * 65536 * (layers + 7 * 512 * 3)
    assert case.flops(FORWARD) == pytest.approx(551e9, rel=1e-3)
    assert case.flops(TRAINING) == 3 * case.flops(FORWARD)


def test_entries_take_turns_and_percentiles_are_ordered() -> None:
    order: list[str] = []
    entries = [measure.Entry(name, lambda name=name: order.append(name)) for name in "ab"]
    clock = measure.Clock(CPU)
    measure.take_turns(entries, clock, rounds=4, least=2, seconds=60, progress=lambda steps: steps)
    assert "".join(order) == "abbaabba"
    order.clear()
    measure.take_turns(entries, clock, rounds=9, least=2, seconds=0, progress=lambda steps: steps)
    assert "".join(order) in ("ab", "abab"), "time is up"
    slept = measure.Entry("", lambda: time.sleep(0.02), calls=2, repeats=3)
    measure.take_turns([slept], clock, rounds=1, least=1, seconds=60, progress=lambda steps: steps)
    assert 10.0 <= slept.samples[0] < 20.0, "one call of 20 ms does it twice, whatever the repeats"
    entry = measure.Entry("", lambda: None, samples=[4.0, 1.0, 3.0, 2.0, 5.0])
    assert (entry.percentile(0.2), entry.median, entry.percentile(0.8)) == (1.8, 3.0, 4.2)


def test_busy_share_reads_what_others_take(tmp_path: Path) -> None:
    stat = tmp_path / "stat"
    stat.write_text("cpu  100 0 50 800 50 0 0 0 0 0\ncpu0 1 2 3\n")
    assert environment.busy_share(0.0, stat) == 0.0, "no time passed"
    assert environment.busy_share(0.0, tmp_path / "absent") == 0.0
    text = iter(["cpu  100 0 50 800 50 0 0 0 0 0\n", "cpu  130 0 60 850 60 0 0 0 0 0\n"])

    class Changing:
        def read_text(self) -> str:
            return next(text)

    assert environment.busy_share(0.0, Changing()) == pytest.approx(0.4)


def test_input_sets_rotate() -> None:
    seen: list[int] = []
    call = measure.rotating(seen.append, [1, 2, 3])
    for _ in range(5):
        call()
    assert seen == [1, 2, 3, 1, 2]


def test_peak_memory_is_that_of_the_call() -> None:
    def call() -> Tensor:
        return torch.randn(16 * 2**20).mul(2)  # 64 MiB and 64 MiB more

    peak = measure.peak_bytes(call, CPU)
    if peak is None:
        pytest.skip("this system does not tell a process's peak memory")
    assert 0.8 * 2**27 < peak < 1.3 * 2**27


# --- names and reports --------------------------------------------------------------------------------------


def test_slug() -> None:
    assert machine.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    assert machine.slug("Intel(R) Xeon(R) Processor @ 2.60GHz") == "intel-xeon-processor-2-60ghz"


def test_digest_follows_names_and_contents(tmp_path: Path) -> None:
    for folder in ("cips_kernels/triton", "csrc/ptx", "benchmarks/results"):
        (tmp_path / folder).mkdir(parents=True)
    source = tmp_path / "cips_kernels" / "triton" / "a.py"
    source.write_text("x = 1\n")
    (tmp_path / "csrc" / "ptx" / "b.cuh").write_text("// b\n")
    first = machine.source_digest(tmp_path)
    (tmp_path / "benchmarks" / "results" / "gpu.json").write_text("{}")
    (tmp_path / "cips_kernels" / "_cuda.so").write_text("built")
    assert machine.source_digest(tmp_path) == first, "results and binaries are no sources"
    source.write_text("x = 2\n")
    second = machine.source_digest(tmp_path)
    source.rename(source.with_name("c.py"))
    assert len({first, second, machine.source_digest(tmp_path)}) == 3
    assert machine.commit(tmp_path) == "unknown"


def test_readme_is_updated_between_its_markers(written, tmp_path: Path) -> None:
    results, folder = written
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.START}\nold\n{report.END}\nafter\n")
    arguments = ["--results", str(folder), "--readme", str(readme)]
    assert report.main([*arguments, "--check"]) == 1
    assert report.main(arguments) == 0
    assert report.main([*arguments, "--check"]) == 0
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    row = next(
        r for r in results["rows"] if (r["case"], r["provider"], r["mode"]) == ("stack", "cpu", FORWARD)
    )
    line = next(line for line in (folder / "README.md").read_text().splitlines() if "**`cpu`**" in line)
    assert report._time(row["ms"] / row["batch"]) in line
    with pytest.raises(ValueError, match="readme"):
        report.insert("no markers", "x")


def test_ratio_and_failures_in_the_table(written) -> None:
    results, _ = written
    rows = [dict(row) for row in results["rows"] if row["case"] == "stack" and row["mode"] == FORWARD]
    rows[0] |= {"provider": "bmm_compiled", "ms": 8.0}
    rows[1] |= {"provider": "triton", "ms": 4.0}
    rows[2] |= {"provider": "cuda", "ok": False, "reason": "check failed", "ms": None}
    table = report.markdown(results | {"rows": rows})
    assert "| 0.50x |" in next(line for line in table.splitlines() if "`triton`" in line)
    assert "`cuda`" not in table, "a row whose check fails is not printed"
    assert "cuda: FAILED, not timed. check failed" in report.terminal(rows)


@pytest.mark.parametrize("path", machine.stack_results(), ids=lambda path: path.stem)
def test_committed_results_keep_the_schema(path: Path) -> None:
    results = json.loads(path.read_text())
    assert set(HEAD) <= set(results)
    slug, _, earlier = path.stem.partition("_")  # an earlier run may stand beside the newest, with its date
    assert slug == machine.slug(results["device"]) and earlier in ("", results["date"][:10])
    assert results["rows"]
    for row in results["rows"]:
        assert set(ROW) <= set(row) and "peak_mb" in row
        if row["ok"]:
            assert row["error"] <= 2 * row["error_eager"]
            assert 0 < row["ms_p20"] <= row["ms"] <= row["ms_p80"]
        else:
            assert row["ms"] is None and row["reason"]


def test_readme_shows_the_results_files() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert report.insert(text, report.readme_section()) == text, "run: python benchmarks/report.py"
    page = machine.RESULTS / report.TABLES
    assert page.read_text(encoding="utf-8") == report.tables(), "run: python benchmarks/report.py"
    picture = machine.RESULTS / report.BRIEF
    assert picture.read_text(encoding="utf-8") == plot.svg(plot.brief(report.load()[0])), "run: python benchmarks/report.py"
