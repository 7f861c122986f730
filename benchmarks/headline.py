"""The README's short table of a device: the whole generator, the stack with its gradients, a training iteration."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from cases import COMPILED, GENERATOR, MODES, RIVALS
from machine import ITERATION
from tables import GRAPH, TITLES, heading, milliseconds, title

PUBLISHED = "grouped_conv"  # the official code's formulation, eager
NOTE = (
    "Milliseconds an image, medians of providers taking turns in one run. The best rival is the fastest of the formulations in "
    "PyTorch's own operators, compiled, in a CUDA graph where that is faster; a dash where the run's time budget left "
    "compiling out. The matrix units' rate is that of cuBLAS's 8192^3 product: in turn with the row, and by its median over "
    "the whole run, whose clocks other loads left higher or lower."
)

_WHOLE = {GENERATOR: "generator", GENERATOR + "-own-table": "generator with a table of that size"}


def markdown(results: dict, folder: Path) -> str:
    """One device's table; nothing where no provider of ours passed."""
    lines = [line for rows in _groups(results["rows"]) if (line := _line(rows, results["ceilings"]))]
    if lines:
        lines += _iteration((folder / results["file"]).with_suffix(""))
    if not lines:
        return ""
    head = ["", "published, eager", "best rival", "ours", "times the published", "times the rival", "of cuBLAS, in turn", "of the run's"]
    return "\n".join([heading(results), "", _row(head), "|---" * len(head) + "|", *lines])


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _groups(rows: Sequence[dict]) -> list[list[dict]]:
    """The rows of each line, those that passed, in the run's first dtype."""
    shown = [
        row for row in rows
        if row["ok"] and row["dtype"] == rows[0]["dtype"] and (row["case"] in _WHOLE or (row["case"], row["mode"]) == ("stack", MODES[-1]))
    ]  # fmt: skip
    places = dict.fromkeys(_place(row) for row in shown)
    return [[row for row in shown if _place(row) == place] for place in sorted(places)]


def _place(row: dict) -> tuple:
    """What one line is of, in the order of the lines."""
    return row["case"] not in _WHOLE, row["height"] * row["width"], row["batch"], row["case"]


def _line(rows: Sequence[dict], ceilings: dict) -> str:
    rivals = [row for row in rows if row["provider"].removesuffix(GRAPH) in RIVALS]
    own = [row for row in rows if row not in rivals and row["provider"] != "reference"]
    if not own:
        return ""
    ours, one = min(own, key=lambda row: row["ms"]), rows[0]
    compiled = any(row["provider"].removesuffix(GRAPH) in COMPILED for row in rivals)  # without them no rival is at its best
    rival = min(rivals, key=lambda row: row["ms"]) if compiled else None
    published = next((row for row in rows if row["provider"] == PUBLISHED), None)
    what = _WHOLE[one["case"]] if one["case"] in _WHOLE else f"stack of {one['layers']}, {one['mode']}"
    images = "1 image" if one["batch"] == 1 else f"{one['batch']} images"
    ceiling = ceilings.get(ours.get("ceiling"))
    cells = [
        f"{what}, {images} of {one['height']}x{one['width']}",
        _time(published),
        f"{_time(rival)} ({_short(rival['provider'])})" if rival else "-",
        f"**{_time(ours)}** ({_short(ours['provider'])})",
        *(f"**{other['ms'] / ours['ms']:.1f}x**" if other else "-" for other in (published, rival)),
        f"{ours['of_ceiling']:.0%}",
        f"{ours['tflops'] / ceiling['median']:.0%}" if ceiling and ceiling["unit"] == "TFLOP/s" else "-",
    ]
    return _row(cells)


def _time(row: dict | None) -> str:
    return "-" if row is None else milliseconds(row["ms"] / row["batch"])


def _short(provider: str) -> str:
    return title(provider).replace("**", "").replace(", in a CUDA graph", ", graph") if provider.removesuffix(GRAPH) in TITLES else (
        f"`{provider.removesuffix(GRAPH)}`" + (", graph" if provider.endswith(GRAPH) else "")
    )  # fmt: skip


def _iteration(stem: Path) -> list[str]:
    """The line of iteration_bench.py's file beside, if there is one that holds both."""
    path = stem.with_name(stem.name + ITERATION + ".json")
    found = json.loads(path.read_text()) if path.exists() else {"summary": {}}
    summary, published = found["summary"], found["summary"].get("published")
    own = [row for name, row in summary.items() if name.startswith("ours")]
    if not own or published is None:
        return []
    ours, options = min(own, key=lambda row: row["ms"]), found["options"]
    each = [milliseconds(row["ms"] / options["batch"]) for row in (published, ours)]
    what = f"training iteration, R1 every 16th, {options['batch']} images of {options['size']}x{options['size']}"
    rate = f"**{each[1]}** ({ours['images_per_second']:.0f} images/s)"
    return [_row([what, each[0], "-", rate, f"**{published['ms'] / ours['ms']:.1f}x**", "-", "-", "-"])]
