"""Tables of what was measured: in the terminal, in the README, and beside the results files.

`python benchmarks/report.py` prints the README's short tables from the results files and writes them between the
README's two markers, its picture in brief and every table beside those files; with `--check` it writes nothing and exits with 1
where they differ.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import generator_report
import headline
import plot
from cases import BASELINE, DEPTH, GENERATOR, MODES
from machine import RESULTS, ROOT, replace, source_digest, stack_results
from tables import TITLES, baselines, group_key, heading
from tables import milliseconds as _time
from tables import number as _format
from tables import title as _title

START, END = "<!-- benchmark:start -->", "<!-- benchmark:end -->"
README = ROOT / "README.md"
TABLES, BRIEF = "README.md", "brief.svg"  # in the folder of results


def load(folder: Path = RESULTS) -> list[dict]:
    """Every results file of a folder, GPUs first, each with its file name under `file`."""
    found = [json.loads(path.read_text()) | {"file": path.name} for path in stack_results(folder)]
    return sorted(found, key=lambda r: (r["cuda"] is None, r["device"]))


def _align(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))]
        lines.append("  ".join(cells).rstrip())
    return lines


def terminal(rows: Sequence[dict]) -> str:
    """Aligned text, one block for each case, size and mode; a provider that failed shows why and no time."""
    base = baselines(rows)
    blocks: list[str] = []
    for key in dict.fromkeys(group_key(row) for row in rows):
        case, dtype, batch, height, width, mode = key
        ratio = f"x {BASELINE}"
        head = (
            "provider",
            "ms",
            "ms/image",
            "TFLOP/s",
            "of ceiling",
            ratio,
            "peak MB",
            "error",
            "eager error",
        )
        table, failures = [head], []
        for row in (r for r in rows if group_key(r) == key):
            if not row["ok"]:
                failures.append(f"  {row['provider']}: FAILED, not timed. {row['reason']}")
                continue
            table.append((
                row["provider"],
                _time(row["ms"]),
                _time(row["ms"] / batch),
                _format(row["tflops"], ".3g"),
                _format(row["of_ceiling"], ".0%"),
                _format(row["ms"] / base[key] if key in base else None, ".2f"),
                _format(row["peak_mb"], ".0f"),
                _format(row["error"], ".1e"),
                _format(row["error_eager"], ".1e"),
            ))  # fmt: skip
        if case == "stack":
            case = f"stack of {next(r.get('layers', DEPTH) for r in rows if group_key(r) == key)}"
        lines = [f"{case}, {mode}, {dtype}, {batch} x {height}x{width}"]
        if len(table) > 1:
            text = _align(table)
            lines += ["  " + text[0], "  " + "-" * len(text[0]), *("  " + line for line in text[1:])]
        blocks.append("\n".join(lines + failures))
    return "\n\n".join(blocks)


def _cell(row: dict | None, base: float | None) -> tuple[str, str, str]:
    if row is None:
        return "", "", ""
    if not row["ok"]:
        return "failed", "", ""
    ratio = "" if base is None else f"{row['ms'] / base:.2f}x"
    return _time(row["ms"] / row["batch"]), f"{row['of_ceiling']:.0%}", ratio


def markdown(results: dict) -> str:
    """One device's table of the whole stack: a line for each batch and provider that passed in some mode."""
    rows = [row for row in results["rows"] if row["case"] == "stack"]
    if not rows:
        return ""
    base = baselines(rows)
    found = {(group_key(row)[:-1], row["provider"], row["mode"]): row for row in rows}
    lines = [
        heading(results),
        "",
        "| dtype, images | provider "
        + "".join(f"| {mode}, ms/image | of ceiling | ratio " for mode in MODES)
        + "| peak MB | error | eager error |",
        "|---" * 11 + "|",
    ]
    for place, provider in dict.fromkeys((group_key(row)[:-1], row["provider"]) for row in rows):
        pair = [found.get((place, provider, mode)) for mode in MODES]
        if not any(row and row["ok"] for row in pair):
            continue
        _, dtype, batch, height, width = place
        cells = [cell for row, mode in zip(pair, MODES) for cell in _cell(row, base.get((*place, mode)))]
        last = next(row for row in (*pair[::-1],) if row and row["ok"])
        peak = " / ".join(_format(row["peak_mb"], ".0f") for row in pair if row and row["ok"])
        lines.append(
            f"| {dtype}, {batch} x {height}x{width} | {_title(provider)} | "
            + " | ".join(cells)
            + f" | {peak} | {last['error']:.1e} | {last['error_eager']:.1e} |"
        )
    return "\n".join(lines)


def _picture(results: dict, folder: Path) -> str:
    """The device's picture as the page beside it shows it; nothing where there is none."""
    path = (folder / results["file"]).with_suffix(".svg")
    return f"![Time of the modulated layers on {results['device']}]({path.name})" if path.exists() else ""


def readme_section(folder: Path = RESULTS) -> str:
    """What stands between the README's markers: the first device's picture in brief, and each device's short table."""
    found = load(folder)
    shown = [text for results in found if (text := headline.markdown(results, folder))]
    if not shown:
        return "Nothing measured yet: `python benchmarks/modfc_bench.py`."
    table, picture = (Path(os.path.relpath(folder / name, ROOT)).as_posix() for name in (TABLES, BRIEF))
    image = f"![Time of the modulated layers on {found[0]['device']}]({picture})"
    written = f"Every provider, size, peak memory and error: [{table}]({table}). Written by `python benchmarks/report.py`."
    return "\n\n".join([image, *shown, headline.NOTE, written])


def tables(folder: Path = RESULTS) -> str:
    """Every table of every device: the page beside the results files."""
    kinds = (lambda results: _picture(results, folder), markdown, generator_report.markdown)
    shown = [text for results in load(folder) for kind in kinds if (text := kind(results))]
    note = (
        f"Time, share of the matrix-product ceiling and ratio to {TITLES[BASELINE]} of the same run; peak "
        "memory beyond the inputs, forward / forward+backward; error against the float64 oracle, worst of "
        "output and gradients, beside that of the eager formulation in the same dtype. Written by "
        "`python benchmarks/report.py` from the files beside this page, which `benchmarks/modfc_bench.py` wrote."
    )
    alone = [text for results in load(folder / GENERATOR) if (text := generator_report.markdown(results))]
    if alone:
        alone.insert(0, f"## The generator, in runs of its own (`{GENERATOR}/`)")
    return "\n\n".join(["# What was measured", *shown, *alone, note]) + "\n"


def insert(readme: str, section: str) -> str:
    """The README with the section between its markers.

    Raises:
        ValueError: the markers are missing or out of order.
    """
    start, end = readme.find(START), readme.find(END)
    if start < 0 or end < start:
        raise ValueError(f"readme: expected the markers {START} and {END}, in this order")
    return readme[: start + len(START)] + "\n" + section + "\n" + readme[end:]


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="README tables from benchmarks/results")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of results files")
    parser.add_argument("--readme", type=Path, default=README, help="file to write the tables into")
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit with 1 if the tables differ"
    )
    parser.add_argument("--plots", action="store_true", help="draw the pictures, too")
    chosen = parser.parse_args(arguments)
    if chosen.plots:
        for results in load(chosen.results):
            picture = (chosen.results / results["file"]).with_suffix(".svg")
            reason = plot.draw(results, picture)
            print(f"{picture} written" if reason is None else f"no plot: {reason}", file=sys.stderr)
    section = readme_section(chosen.results)
    print(section)
    for results in load(chosen.results):
        if results["source_digest"] != source_digest():
            print(f"note: {results['file']} was measured with other sources than these", file=sys.stderr)
    pages = {chosen.results / TABLES: tables(chosen.results)}
    if found := load(chosen.results):
        pages[chosen.results / BRIEF] = plot.svg(plot.brief(found[0]))
    if chosen.readme.exists():
        pages[chosen.readme] = insert(chosen.readme.read_text(encoding="utf-8"), section)
    else:
        print(f"{chosen.readme} does not exist: not written", file=sys.stderr)
    differ = [page for page, text in pages.items() if not page.exists() or page.read_text(encoding="utf-8") != text]
    if chosen.check:
        return 1 if differ or not chosen.readme.exists() else 0
    for page in differ:
        replace(page, pages[page])
        print(f"{page} written", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
