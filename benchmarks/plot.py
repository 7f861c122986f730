"""A picture of a results file: time relative to the best rival of each group, as an SVG.

Written with the standard library alone, since whoever runs the benchmark has PyTorch and little else. Shorter
bars are faster; the dashed line is the fastest formulation in PyTorch's own operators that passed its check.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from xml.sax.saxutils import escape, quoteattr

import machine
from cases import COMPILED, DEPTH, GENERATOR, MODES, RIVALS

_GRAPH = "+graph"
_INK, _GREY, _GRID, _BAD = "#1f2328", "#656d76", "#e4e7eb", "#b42318"
_FAMILIES = {
    "PyTorch, eager": "#a9b4c0",
    "PyTorch, torch.compile": "#4c7fb0",
    "this package": "#dd6b2d",
    "its oracle, eager": "#f2c9a5",
}
_MOST = 3.0  # of the best rival's time: longer bars are cut, and show that they are

# pixels
_MARGIN, _NAMES, _PLOT, _LABELS = 24, 200, 236, 128
_BAR, _PITCH, _HEAD, _TICKS = 13, 19, 30, 26


def _family(provider: str) -> str:
    eager, compiled, ours, oracle = _FAMILIES
    name = provider.removesuffix(_GRAPH)
    if name in RIVALS:
        return compiled if name in COMPILED else eager
    return oracle if name == "reference" else ours


def _place(row: dict) -> tuple:
    """What the bars of one group share, the mode left out."""
    return (row["case"], row.get("layers", DEPTH), *(row[k] for k in ("dtype", "batch", "height", "width")))


def best_rival(rows: Sequence[dict]) -> dict | None:
    """The fastest of PyTorch's own that passed, or else the fastest of all; None where nobody passed."""
    passed = [row for row in rows if row["ok"]]
    rivals = [row for row in passed if row["provider"].removesuffix(_GRAPH) in RIVALS]
    return min(rivals or passed, key=lambda row: row["ms"], default=None)


def _time(ms: float) -> str:
    digits = max(0, 2 - math.floor(math.log10(ms))) if ms > 0 else 0
    return f"{ms:.{min(digits, 4)}f} ms"


class _Sheet:
    """Elements of the picture, in the order in which they are painted."""

    def __init__(self) -> None:
        self.parts: list[str] = []

    def text(
        self,
        x: float,
        y: float,
        content: str,
        size: float = 12,
        fill: str = _INK,
        then: str = "",
        **more: object,
    ) -> None:
        """A line of text; `then` goes on with it, smaller and in grey."""
        attributes = "".join(f" {k.replace('_', '-')}={quoteattr(str(v))}" for k, v in more.items())
        rest = (
            f'<tspan font-size="12" font-weight="400" fill="{_GREY}">{escape(then)}</tspan>' if then else ""
        )
        self.parts.append(
            f'<text x="{x:.2f}" y="{y:g}" font-size="{size:g}" fill="{fill}"{attributes}>{escape(content)}{rest}</text>'
        )

    def rectangle(self, x: float, y: float, width: float, height: float, fill: str, kind: str = "") -> None:
        named = f' class="{kind}"' if kind else ""
        self.parts.append(
            f'<rect{named} x="{x:.2f}" y="{y:.2f}" width="{width:.2f}" height="{height:.2f}" fill="{fill}"/>'
        )

    def path(self, way: str, stroke: str, kind: str = "", width: float = 1, dash: str = "") -> None:
        named = (f' class="{kind}"' if kind else "") + (f' stroke-dasharray="{dash}"' if dash else "")
        self.parts.append(f'<path{named} d="{way}" stroke="{stroke}" stroke-width="{width:g}" fill="none"/>')


def _bar(sheet: _Sheet, x: float, y: float, row: dict, base: float, scale: float) -> None:
    """One provider in one mode: bar, whisker, milliseconds an image and ratio; or that it failed."""
    middle = y + _BAR / 2
    if not row["ok"]:
        sheet.text(x + 5, middle + 4, "failed, not timed", 11, _BAD)
        return
    ratio, low, high = (row[key] / base for key in ("ms", "ms_p20", "ms_p80"))
    length = min(ratio, _MOST) * scale
    sheet.rectangle(x, y, length, _BAR, _FAMILIES[_family(row["provider"])], "bar")
    end = x + length
    if ratio > _MOST:
        for back in (9, 14):  # cut off
            sheet.path(f"M{end - back - 3:.2f} {y + _BAR + 1:g} l6 {-_BAR - 2}", "#ffffff", "cut", 2)
    else:
        left, right = x + low * scale, x + min(high, _MOST) * scale
        cap = (
            f" M{right:.2f} {middle - 3:g} v6" if high <= _MOST else ""
        )  # none where it goes on beyond the axis
        sheet.path(f"M{left:.2f} {middle:g} H{right:.2f} M{left:.2f} {middle - 3:g} v6{cap}", _INK, "whisker")
        end = max(end, right)
    times = f"{_time(row['ms'] / row['batch'])} · {ratio:.2f}×"
    right = max(end, x + scale) + 6  # of the best rival's line, too
    ours = _family(row["provider"]) == "this package"
    sheet.text(right, middle + 4, times, 11, font_weight=600 if ours else 400)


def _group(sheet: _Sheet, top: float, place: tuple, rows: Sequence[dict], modes: Sequence[str]) -> float:
    """One case at one size, the modes beside each other; returns where the next one starts."""
    case, layers, dtype, batch, height, width = place
    titles = {"stack": f"stack of {layers} layers", GENERATOR: f"whole generator of {layers} layers"}
    titles[GENERATOR + "-25%"] = "whole generator, a quarter of the pixels"
    titles[GENERATOR + "-own-table"] = "whole generator, with a table of that size"
    title = titles.get(case, case)
    size = f" \u2002{dtype}, {batch} × {height}×{width}"
    sheet.text(_MARGIN, top + 12, title, 13, then=size, font_weight=700)
    first, names = top + _HEAD, list(dict.fromkeys(row["provider"] for row in rows))
    bottom = first + _PITCH * len(names)
    for i, name in enumerate(names):
        shown = name.replace(_GRAPH, ", CUDA graph")
        sheet.text(_MARGIN + _NAMES - 8, first + i * _PITCH + _BAR - 2, shown, 11, text_anchor="end")
    scale = _PLOT / _MOST
    for column, mode in enumerate(modes):
        x = _MARGIN + _NAMES + column * (_PLOT + _LABELS)
        members = [row for row in rows if row["mode"] == mode]
        if not members and case.startswith(GENERATOR):
            continue  # it is timed forward only
        for tick in range(int(_MOST) + 1):
            sheet.path(f"M{x + tick * scale:.2f} {first - 4:g} V{bottom:g}", _GREY if tick == 0 else _GRID)
            sheet.text(x + tick * scale, bottom + 12, f"{tick}×", 10, _GREY, text_anchor="middle")
        base = best_rival(members)
        for row in members:
            _bar(sheet, x, first + names.index(row["provider"]) * _PITCH, row, base and base["ms"], scale)
        sheet.path(f"M{x + scale:.2f} {first - 6:g} V{bottom:g}", _INK, "best", 1, "4 3")
    return bottom + _TICKS


def _legend(sheet: _Sheet, y: float, families: Sequence[str]) -> None:
    x = float(_MARGIN)
    for family in families:
        sheet.rectangle(x, y - 10, 12, 12, _FAMILIES[family])
        sheet.text(x + 17, y, family, 12)
        x += 32 + 6.6 * len(family)
    sheet.path(f"M{x:g} {y - 4:g} h18 m-18 -3 v6 m18 -6 v6", _INK)
    sheet.text(x + 24, y, "20th to 80th percentile", 12)
    x += 178
    sheet.path(f"M{x:g} {y - 11:g} v14", _INK, "", 1, "4 3")
    sheet.text(x + 8, y, "best of PyTorch", 12)


def _versions(results: dict) -> str:
    """Such as `torch 2.11.0, triton 3.6.0, CUDA 13.0, driver 580.1, 2026-11-22`."""
    known = {"CUDA": "cuda", "driver": "driver", "Python": "python", "threads": "threads"}
    versions = [f"{name} {results[name]}" for name in ("torch", "triton") if results.get(name)]
    versions += [f"{shown} {results[key]}" for shown, key in known.items() if results.get(key)]
    return ", ".join([*versions, results["date"][:10]])


def svg(results: dict) -> str:
    """The picture's text."""
    rows = results["rows"]
    modes = [mode for mode in MODES if any(row["mode"] == mode for row in rows)]
    width = 2 * _MARGIN + _NAMES + max(2, len(modes)) * (_PLOT + _LABELS)
    present = {_family(row["provider"]) for row in rows}
    sheet = _Sheet()
    sheet.text(_MARGIN, 36, f"Modulated layers on {results['device']}", 18, font_weight=700)
    explained = "Time relative to the best formulation in PyTorch's own operators; shorter is faster. "
    sheet.text(_MARGIN, 58, explained + "Numbers: milliseconds an image, and the ratio.", 12, _GREY)
    _legend(sheet, 84, [family for family in _FAMILIES if family in present])
    for column, mode in enumerate(modes):
        x = _MARGIN + _NAMES + column * (_PLOT + _LABELS)
        sheet.text(x, 116, mode.replace("+", " + "), 13, font_weight=700)
    y = 132.0
    for place in dict.fromkeys(_place(row) for row in rows):
        y = _group(sheet, y, place, [row for row in rows if _place(row) == place], modes)
    samples = max((row.get("samples", 0) for row in rows if row["ok"]), default=0)
    sheet.text(_MARGIN, y + 14, f"{results['device']}: {_versions(results)}", 11, _GREY)
    note = f"Medians of up to {samples} rounds in which all take turns. Every bar passed the check against the float64 oracle."
    sheet.text(_MARGIN, y + 31, note, 11, _GREY)
    height = round(y + 48)
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        'role="img" font-family="Helvetica, Arial, \'Liberation Sans\', sans-serif">',
        f"<title>{escape('Time of the modulated layers on ' + results['device'])}</title>",
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        *sheet.parts,
        "</svg>\n",
    ])  # fmt: skip


def brief(results: dict) -> dict:
    """`results` with what a first look is for: stack and whole generator at the smallest size, the fewest and the most images,
    where rivals are at their best; all of those where they are nowhere."""
    rows = [row for row in results["rows"] if row["case"] in ("stack", GENERATOR)]
    smallest = min((row["height"] * row["width"] for row in rows), default=0)
    rows = [row for row in rows if row["height"] * row["width"] == smallest]
    extremes = {extreme(row["batch"] for row in rows) for extreme in (min, max)} if rows else set()
    rows = [row for row in rows if row["batch"] in extremes]
    best = {_place(row) for row in rows if row["ok"] and row["provider"].removesuffix(_GRAPH) in COMPILED}
    return results | {"rows": [row for row in rows if _place(row) in best] or rows}


def draw(results: dict, path: Path) -> str | None:
    """Write the picture; returns None, or why there is none."""
    if not results["rows"]:
        return "nothing was measured"
    machine.replace(path, svg(results))
    return None
