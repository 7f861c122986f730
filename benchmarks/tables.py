"""What all tables share: which rows are compared, and how numbers and providers are written."""

from __future__ import annotations

from collections.abc import Iterable

from cases import BASELINE

GRAPH = "+graph"
TITLES = {
    "grouped_conv": "grouped convolution, eager",
    "grouped_conv_compiled": "grouped convolution, `torch.compile`",
    "bmm": "hand-written `bmm`, eager",
    "bmm_compiled": "hand-written `bmm`, `torch.compile`",
    "bmm_autotuned": "hand-written `bmm`, `torch.compile` with max-autotune",
}


def group_key(row: dict) -> tuple:
    """What rows must share to be compared."""
    return tuple(row[key] for key in ("case", "dtype", "batch", "height", "width", "mode"))


def baselines(rows: Iterable[dict], provider: str = BASELINE) -> dict[tuple, float]:
    """Milliseconds of one provider, by default the compiled hand-written formulation, by group."""
    return {group_key(row): row["ms"] for row in rows if row["provider"] == provider and row["ok"]}


def number(value: float | None, pattern: str) -> str:
    """A number as `pattern` says; a dash for none."""
    return "-" if value is None else format(value, pattern)


def milliseconds(ms: float | None) -> str:
    """Three digits, no fraction from a second on."""
    return "-" if ms is None else f"{ms:.3g}" if ms < 10 else f"{ms:.1f}" if ms < 1000 else f"{ms:.0f}"


def title(provider: str) -> str:
    """A provider as the README calls it; ours are bold."""
    name = provider.removesuffix(GRAPH)
    found = TITLES.get(name, f"**`{name}`**")
    return found if name == provider else f"{found}, in a CUDA graph"


def ceilings_text(results: dict) -> str:
    """Such as `matmul_bfloat16 729 TFLOP/s, copy 2880 GB/s`."""
    return ", ".join(f"{name} {c['median']:.3g} {c['unit']}" for name, c in results["ceilings"].items())


def heading(results: dict) -> str:
    """Device, versions and ceilings of a run."""
    clock = f", CUDA {results['cuda']}, driver {results['driver']}" if results["cuda"] else ""
    return (
        f"**{results['device']}**, torch {results['torch']}{clock}, {results['date'][:10]}; "
        f"ceilings in the same run: {ceilings_text(results)}."
    )
