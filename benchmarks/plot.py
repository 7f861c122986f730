"""A picture of a results file: each provider's rate on the whole stack, and the ceiling of the same run."""

from __future__ import annotations

from pathlib import Path

from cases import MODES

# Rivals in cool greys and blues, ours in warm colours; a captured graph is its provider's colour, hatched.
_COLOURS = {
    "grouped_conv": "#c3c9d1",
    "grouped_conv_compiled": "#98a3b3",
    "bmm": "#8fb6d9",
    "bmm_compiled": "#3f7fb5",
    "bmm_autotuned": "#2a5a85",
    "reference": "#f3d9a4",
    "cpu": "#e8743b",
    "triton": "#f0a03c",
    "cuda": "#d9412b",
}
_GRAPH = "+graph"


def _label(ms: float) -> str:
    return f"{ms:.2f}" if ms < 10 else f"{ms:.0f}"


def draw(results: dict, path: Path) -> str | None:
    """Write the picture; returns None, or why there is none."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return "matplotlib is not installed (pip install matplotlib)"
    rows = [row for row in results["rows"] if row["case"] == "stack" and row["ok"]]
    case = "The paper's 15-layer stack"
    if not rows:
        rows = [row for row in results["rows"] if row["case"] == "layer" and row["ok"]]
        case = "One layer"
    if not rows:
        return "no provider passed its check on the stack or the layer"
    modes = [mode for mode in MODES if any(row["mode"] == mode for row in rows)]
    groups = list(dict.fromkeys((row["dtype"], row["batch"], row["height"], row["width"]) for row in rows))
    present = {row["provider"] for row in rows}
    providers = [name + suffix for name in _COLOURS for suffix in ("", _GRAPH) if name + suffix in present]
    width = 0.84 / len(providers)
    figure, axes = pyplot.subplots(
        len(modes),
        1,
        figsize=(max(7.0, 1.6 + 0.4 * len(groups) * len(providers)), 3.5 * len(modes)),
        squeeze=False,
    )
    for axis, mode in zip(axes[:, 0], modes):
        for g, group in enumerate(groups):
            members = [
                r
                for r in rows
                if (r["dtype"], r["batch"], r["height"], r["width"]) == group and r["mode"] == mode
            ]
            members.sort(key=lambda row: providers.index(row["provider"]))
            for i, row in enumerate(members):
                name = row["provider"]
                centre = g + width * (i + 0.5 - len(members) / 2)
                axis.bar(
                    centre,
                    row["tflops"],
                    width * 0.92,
                    color=_COLOURS.get(name.removesuffix(_GRAPH), "#777777"),
                    hatch="///" if name.endswith(_GRAPH) else None,
                    edgecolor="white",
                    linewidth=0.4,
                )
                axis.annotate(
                    _label(row["ms"] / row["batch"]),
                    (centre, row["tflops"]),
                    xytext=(0, 2),
                    textcoords="offset points",
                    ha="center",
                    fontsize=7,
                    color="#333333",
                )
            if members:
                axis.hlines(
                    members[0]["ceiling_rate"],
                    g - 0.45,
                    g + 0.45,
                    colors="#222222",
                    linestyles="--",
                    linewidth=1,
                )
        axis.set_xticks(range(len(groups)), [f"{d}\n{b} x {h}x{w}" for d, b, h, w in groups])
        axis.set_ylabel("TFLOP/s")
        axis.set_ylim(0, max(row["ceiling_rate"] for row in rows if row["mode"] == mode) * 1.12)
        axis.set_title(mode, loc="left", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        axis.yaxis.grid(True, color="#e6e6e6", linewidth=0.6)
        axis.set_axisbelow(True)
    handles = [
        pyplot.Rectangle(
            (0, 0), 1, 1, facecolor=_COLOURS.get(name.removesuffix(_GRAPH), "#777777"), edgecolor="white",
            hatch="///" if name.endswith(_GRAPH) else None,
        )
        for name in providers
    ]  # fmt: skip
    handles.append(pyplot.Line2D([], [], color="#222222", linestyle="--", linewidth=1))
    labels = [*providers, "large matrix product, same run"]
    figure.legend(
        handles, labels, loc="outside lower center", ncols=min(4, len(labels)), fontsize=8, frameon=False
    )
    title = f"{case} on {results['device']}\nhigher is better; above the bars: milliseconds an image"
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    rows_of_legend = -(-len(labels) // 4)
    figure.tight_layout(rect=(0, (0.1 + 0.22 * rows_of_legend) / figure.get_figheight(), 1, 1))
    temporary = path.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=150)
    pyplot.close(figure)
    temporary.replace(path)
    return None
