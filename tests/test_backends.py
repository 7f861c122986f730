"""Which backend serves: the order, the three ways to choose, and the reasons why one cannot."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import warnings

import pytest
import torch

import cips_kernels
from cips_kernels import use_backend
from cips_kernels.backends import NAMES, Status, resolve, why_not

registry = importlib.import_module(
    "cips_kernels.backends"
)  # the package's attribute of that name is the function
CPU, CUDA, META = torch.device("cpu"), torch.device("cuda", 0), torch.device("meta")
FLOAT = torch.float32


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    """No choice made before, nothing warned of yet, and none left behind."""
    monkeypatch.setattr(registry, "_override", None)
    monkeypatch.setattr(registry, "_from_environment", "auto")
    monkeypatch.setattr(registry, "_warned", set())
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture
def serving(monkeypatch):
    """Set which backends are available, with a reason for the others."""

    def choose(**reasons: str | None) -> None:
        for name, reason in reasons.items():
            status = Status(reason is None, reason or "")
            monkeypatch.setitem(registry._STATUS, name, lambda status=status: status)

    return choose


# --- statuses -------------------------------------------------------------------------------------------------------


def test_statuses_have_reasons():
    statuses = cips_kernels.backends()
    assert tuple(statuses) == NAMES == ("reference", "cpu", "triton", "cuda")
    assert statuses["reference"].available and statuses["cpu"].available
    for status in statuses.values():
        assert status.available == (status.reason == "")
        assert str(status) == ("available" if status.available else f"unavailable: {status.reason}")


def status_in_subprocess(code: str, **environment: str) -> str:
    variables = {key: value for key, value in os.environ.items() if not key.startswith(("TRITON_", "CIPS_"))}
    command = [sys.executable, "-c", f"import cips_kernels\n{code}"]
    done = subprocess.run(command, env=variables | environment, capture_output=True, text=True, timeout=120)
    return done.stdout.strip() + done.stderr.strip()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_reason_without_a_gpu():
    said = status_in_subprocess("for name, s in cips_kernels.backends().items(): print(name, s)")
    lines = dict(line.split(" ", 1) for line in said.splitlines())
    assert lines["reference"] == lines["cpu"] == "available"
    assert lines["triton"].startswith(("unavailable: no CUDA device", "unavailable: triton does not import"))
    assert lines["cuda"].startswith("unavailable: ")


def test_reason_where_triton_does_not_import():
    code = "import sys; sys.modules['triton'] = None; print(cips_kernels.backends()['triton'])"
    assert status_in_subprocess(code).startswith("unavailable: triton does not import (ModuleNotFoundError")


# --- order ----------------------------------------------------------------------------------------------------------


def test_order_on_a_cuda_device(serving):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        serving(cuda=None, triton=None)
        assert resolve("auto", CUDA, FLOAT) == "triton"
        assert resolve("auto", CUDA, torch.bfloat16) == "triton"
        assert resolve("reference", CUDA, FLOAT) == "reference"
    serving(cuda="no extension", triton=None)
    assert resolve("auto", CUDA, torch.float16) == "triton"
    serving(cuda=None, triton="turned off")
    assert resolve("auto", CUDA, torch.float16) == "cuda"


def test_order_elsewhere(serving):
    serving(cuda=None, triton=None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            assert resolve("auto", CPU, dtype) == "cpu"
            assert resolve("auto", META, dtype) == "reference"


def test_falling_back_on_a_gpu_warns_once_with_the_reasons(serving):
    serving(cuda="no extension was built", triton="triton is too old")
    with pytest.warns(RuntimeWarning) as caught:
        assert resolve("auto", CUDA, FLOAT) == "reference"
    assert len(caught) == 1
    for part in ("reference", "slower", "cuda: no extension was built", "triton: triton is too old"):
        assert part in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resolve("auto", CUDA, FLOAT) == "reference"
    serving(cuda=None, triton=None)
    with pytest.warns(RuntimeWarning, match="not in torch.float64"):  # another reason is told as well
        assert resolve("auto", CUDA, torch.float64) == "reference"


def test_why_not(serving):
    serving(cuda=None, triton=None)
    for name in NAMES:
        serves = {device: why_not(name, device, FLOAT) is None for device in (CPU, CUDA)}
        assert serves == {CPU: name in ("reference", "cpu"), CUDA: name != "cpu"}
    assert why_not("cpu", CUDA, FLOAT) == "it serves tensors on the CPU, not on cuda:0"
    assert why_not("triton", CPU, FLOAT) == "it serves tensors on a CUDA device, not on cpu"
    for name in ("triton", "cuda"):
        assert (
            why_not(name, CUDA, torch.float64)
            == "it computes in float16, bfloat16 or float32, not in torch.float64"
        )
    serving(cuda="no extension was built")
    assert why_not("cuda", CUDA, FLOAT) == "no extension was built"
    assert why_not("reference", CUDA, torch.float64) is None


def test_interpreted_triton_serves_the_cpu(serving, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    serving(triton=None, cuda=None)
    assert why_not("triton", CPU, FLOAT) is None and why_not("cuda", CPU, FLOAT) is not None
    assert resolve("auto", CPU, FLOAT) == "cpu"  # only where it is asked for by name


def test_asking_for_what_cannot_serve(serving):
    serving(triton="the driver is asleep")
    with pytest.raises(RuntimeError, match="backend 'triton' cannot serve this call: the driver is asleep"):
        resolve("triton", CUDA, FLOAT)
    with pytest.raises(
        RuntimeError,
        match="backend 'cpu' cannot serve this call: it serves tensors on the CPU, not on cuda:0",
    ):
        resolve("cpu", CUDA, FLOAT)


# --- choosing -------------------------------------------------------------------------------------------------------


def test_use_backend_sets_from_now_on():
    use_backend("reference")
    assert resolve("auto", CPU, FLOAT) == "reference"
    assert resolve("cpu", CPU, FLOAT) == "cpu"  # an argument is stronger
    use_backend("cpu")
    assert resolve("auto", CPU, FLOAT) == "cpu"
    use_backend("reference")
    use_backend("auto")
    assert resolve("auto", CPU, FLOAT) == "cpu"


def test_use_backend_within_a_block():
    with use_backend("reference"):
        assert resolve("auto", CPU, FLOAT) == "reference"
        with use_backend("cpu"):
            assert resolve("auto", CPU, FLOAT) == "cpu"
        assert resolve("auto", CPU, FLOAT) == "reference"
    assert resolve("auto", CPU, FLOAT) == "cpu"
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    assert resolve("auto", CPU, FLOAT) == "cpu"


def test_a_chosen_backend_that_cannot_serve_is_an_error_not_a_fallback(serving):
    serving(triton="the driver is asleep")
    with use_backend("triton"), pytest.raises(RuntimeError, match="backend 'triton' cannot serve"):
        cips_kernels.functional.modulate(torch.randn(2, 3), torch.randn(2, 3))


def test_environment_variable_is_the_weakest(monkeypatch):
    monkeypatch.setattr(registry, "_from_environment", "reference")
    assert resolve("auto", CPU, FLOAT) == "reference"
    assert resolve("cpu", CPU, FLOAT) == "cpu"
    with use_backend("cpu"):
        assert resolve("auto", CPU, FLOAT) == "cpu"
    with use_backend("auto"):
        assert resolve("auto", CPU, FLOAT) == "cpu"
    assert resolve("auto", CPU, FLOAT) == "reference"


def test_environment_variable_is_read():
    code = "import torch; from cips_kernels.backends import resolve; print(resolve('auto', torch.device('cpu'), torch.float32))"
    assert status_in_subprocess(code, CIPS_KERNELS_BACKEND="reference") == "reference"
    said = status_in_subprocess(code, CIPS_KERNELS_BACKEND="metal")
    assert (
        "ValueError: CIPS_KERNELS_BACKEND: expected auto, reference, cpu, triton, cuda, got 'metal'" in said
    )


def test_unknown_names():
    for call in (lambda: use_backend("metal"), lambda: resolve("metal", CPU, FLOAT)):
        with pytest.raises(ValueError, match="expected auto, reference, cpu, triton, cuda, got 'metal'"):
            call()
    assert resolve("auto", CPU, FLOAT) == "cpu"  # the failed call chose nothing


@pytest.mark.parametrize("device", [CPU, CUDA])
def test_a_compiler_can_trace_the_choice(serving, monkeypatch, device):
    torch._dynamo.reset()
    serving(triton=None)

    def probe() -> Status:  # as the extension is looked for, which no compiler can trace
        importlib.import_module("cips_kernels.packing")
        return Status(False, "no extension was built")

    monkeypatch.setitem(registry._STATUS, "cuda", probe)
    factors = {"reference": 2.0, "cpu": 3.0, "triton": 4.0, "cuda": 5.0}

    def function(x):
        return x * factors[resolve("auto", device, x.dtype)]

    compiled = torch.compile(function, fullgraph=True, backend="eager")
    expected = 3.0 if device == CPU else 4.0
    assert compiled(torch.ones(())).item() == function(torch.ones(())).item() == expected
    with use_backend("reference"):  # compiled code notices another choice
        assert compiled(torch.ones(())).item() == 2.0
    assert compiled(torch.ones(())).item() == expected


# --- the report -----------------------------------------------------------------------------------------------------


def test_environment_report():
    done = subprocess.run(
        [sys.executable, "-m", "cips_kernels.env"],
        env={**os.environ, "CIPS_KERNELS_BACKEND": "reference"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    report = done.stdout
    for part in (
        cips_kernels.__version__, torch.__version__, "python", "triton", "cuda", "device",
        *NAMES, "CIPS_KERNELS_BACKEND", "reference", "CIPS_KERNELS_CHECK", "CIPS_KERNELS_CUDA", "TRITON_INTERPRET",
    ):  # fmt: skip
        assert part in report, part
    reference = next(line for line in report.splitlines() if line.split()[:1] == ["reference"])
    assert reference.split()[1] == "available"


def test_report_knows_every_environment_variable_that_is_read():
    from cips_kernels import env

    root = os.path.dirname(cips_kernels.__file__)
    read = set()
    for folder, _, names in os.walk(root):
        for name in names:
            if name.endswith(".py") and name != "env.py":
                text = open(os.path.join(folder, name), encoding="utf-8").read()
                read |= {word.split('"')[0] for word in text.split('environ.get("')[1:]}
    assert read <= set(env.VARIABLES), read - set(env.VARIABLES)
