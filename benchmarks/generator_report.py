"""The README's table of the whole generator: every number of images beside each other, a line for each provider."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from cases import BASELINE, GENERATOR, RIVALS
from tables import GRAPH, TITLES, baselines, group_key, heading, milliseconds, number, title

_FOVEATED, _OWN_TABLE = GENERATOR + "-25%", GENERATOR + "-own-table"
_NOTE = (
    "Its peak memory is beyond the float32 parameters and the image, and counts what a provider makes ready once: "
    "`sampler` copies the parameters, the formulations in PyTorch's operators keep the table in the compute dtype."
)
_OFFICIAL = ("grouped_conv", "grouped_conv_compiled")


def _ratio(row: dict, base: dict[tuple, float]) -> str:
    found = base.get(group_key(row))
    return "-" if found is None else f"{row['ms'] / found:.2f}x"


def _cells(rows: Sequence[dict | None], shown: Callable[[dict], str]) -> str:
    """One number for each number of images, such as `1.2 / 0.9 / 0.8`."""
    return " / ".join("-" if row is None else shown(row) for row in rows)


def markdown(results: dict) -> str:
    """One device's table, and what foveated points and a denser image take; nothing where nothing passed."""
    passed = [row for row in results["rows"] if row["case"] in (GENERATOR, _FOVEATED, _OWN_TABLE) and row["ok"]]
    whole = [row for row in passed if row["case"] == GENERATOR]
    if not whole:
        return ""
    smallest = min(whole, key=lambda row: row["height"] * row["width"])
    size = smallest["height"], smallest["width"]
    first = whole[0]["dtype"]
    parts = [
        _table([r for r in whole if (r["height"], r["width"]) == size and r["dtype"] == dtype])
        for dtype in dict.fromkeys(row["dtype"] for row in whole)
    ]
    points = [row for row in passed if row["case"] == _FOVEATED and row["dtype"] == first]
    dense = [row for row in whole if (row["height"], row["width"]) != size and row["dtype"] == first]
    own = [row for row in passed if row["case"] == _OWN_TABLE and row["dtype"] == first]
    alone = [] if any(row["case"] == "stack" for row in results["rows"]) else [heading(results)]
    return "\n\n".join(
        text for text in (*alone, *parts, _quarter(points, whole), _dense(dense, "the same table, interpolated"), _dense(own, "a table of that size"), _NOTE) if text
    )


def _table(rows: Sequence[dict]) -> str:
    if not rows:
        return ""
    batches = sorted({row["batch"] for row in rows})
    found = {(row["provider"], row["batch"]): row for row in rows}
    one = rows[0]
    bases = [baselines(rows), *(baselines(rows, provider) for provider in _OFFICIAL)]
    lines = [
        f"The whole generator, latents to images, {one['layers']} layers, {one['dtype']}, "
        f"{one['height']}x{one['width']}, forward; {' / '.join(str(b) for b in batches)} images:",
        "",
        f"| provider | ms/image | of ceiling | x {TITLES[BASELINE]} "
        + "".join(f"| x {TITLES[name]} " for name in _OFFICIAL)
        + "| peak MB | error |",
        "|---" * 8 + "|",
    ]
    for provider in dict.fromkeys(row["provider"] for row in rows):
        line = [found.get((provider, batch)) for batch in batches]
        cells = [
            title(provider),
            _cells(line, lambda row: milliseconds(row["ms"] / row["batch"])),
            _cells(line, lambda row: f"{row['of_ceiling']:.0%}"),
            *(_cells(line, lambda row, base=base: _ratio(row, base)) for base in bases),
            _cells(line, lambda row: number(row["peak_mb"], ".0f")),
            f"{max(row['error'] for row in line if row):.1e}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _quarter(points: Sequence[dict], whole: Sequence[dict]) -> str:
    """Each provider's time for a quarter of the pixels beside its own for all of them."""
    full = {(group_key(row)[1:], row["provider"]): row["ms"] for row in whole}
    said: dict[str, list[str]] = {}
    for row in sorted(points, key=lambda row: row["batch"]):
        every = full.get((group_key(row)[1:], row["provider"]))
        if every:
            said.setdefault(row["provider"], []).append(f"{row['ms'] / every:.0%} (B = {row['batch']})")
    if not said:
        return ""
    each = "; ".join(f"{title(provider)} {', '.join(shares)}" for provider, shares in said.items())
    return f"A random quarter of the pixels, given as points, in shares of the same provider's time for all: {each}."


def _dense(rows: Sequence[dict], table: str) -> str:
    if not rows:
        return ""
    base = baselines(rows)
    said = []
    for row in rows:
        rival = row["provider"].removesuffix(GRAPH) in RIVALS
        ratio = "" if rival else f", {_ratio(row, base)}"
        peak = f", {row['peak_mb']:.0f} MB" if row["peak_mb"] is not None else ""
        time = milliseconds(row["ms"] / row["batch"])
        said.append(
            f"{title(row['provider'])} {time} ms ({row['of_ceiling']:.0%} of the ceiling{ratio}{peak})"
        )
    one = rows[0]
    place = f"{one['height']}x{one['width']}, B = {one['batch']}"
    return f"{place}, from {table}: {'; '.join(said)}."
