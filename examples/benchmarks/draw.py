"""Draw the results of ``curves.py`` as pictures for the documentation, in a light and a dark variant.

    python examples/benchmarks/draw.py

Each ``results/curves-*.json`` becomes ``docs/assets/curves-*-light.svg`` and ``-dark.svg``. Both axes are logarithmic.
Needs matplotlib.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib
from curves import WORKS

matplotlib.use("svg")
from matplotlib import pyplot as plt

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS, ASSETS = Path(__file__).resolve().parent / "results", ROOT / "docs" / "assets"
AXES = {"bytes": "size of the file, GB", "tensors": "tensors in the file", "threads": "reading threads"}
FIGURES = {"seconds": ("seconds", 1.0), "host_bytes": ("host memory above start, MiB", 2.0**20)}
# Colours of Okabe and Ito, which the colour-blind can tell apart. On white, yellow and sky blue are too pale.
COLOURS = dict(zip(WORKS, ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00"), strict=True))
INK = {"light": "#333333", "dark": "#DDDDDD"}
# Two labels at the end of their lines are at least this share of the picture's height apart.
LABEL_DISTANCE = 0.075
# Where a line ends, and what it shows.
Place = tuple[float, float, str]
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 8,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "lightning_memload",  # the same picture for the same figures
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def main() -> int:
    """Draw all pictures, and return the exit status."""
    for path in sorted(RESULTS.glob("curves-*.json")):
        for variant in INK:
            draw(json.loads(path.read_text()), ASSETS / f"{path.stem}-{variant}.svg", variant)
    return 0


def draw(report: dict[str, Any], path: Path, variant: str) -> None:
    """Draw one result: a column for each axis, above the seconds and below the host memory."""
    ink = INK[variant]
    inked: tuple[Any, ...] = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    with plt.rc_context({**STYLE, **dict.fromkeys(inked, ink)}):
        figure, grid = plt.subplots(2, len(AXES), figsize=(9.2, 5.4), sharey="row", layout="constrained")
        for panels, (figure_name, (label, unit)) in zip(grid, FIGURES.items(), strict=True):
            ends = []
            for panel, (axis, words) in zip(panels, AXES.items(), strict=True):
                ends.append(draw_lines(panel, report["points"], axis, figure_name, unit))
                panel.set_xlabel(words)
            panels[0].set_ylabel(label)
            for panel, places in zip(panels, ends, strict=True):  # The panels share limits, which are known only now.
                name_lines(panel, places)
        figure.savefig(path, transparent=True, metadata={"Date": None, "Creator": None})
        plt.close(figure)


def draw_lines(panel: Any, points: list[dict[str, Any]], axis: str, name: str, unit: float) -> list[Place]:
    """Draw the lines of all works along one axis, and return where they end."""
    panel.set(xscale="log", yscale="log")
    panel.grid(alpha=0.25, linewidth=0.5)
    scale = 1e9 if axis == "bytes" else 1.0
    least = 0.5 if name == "host_bytes" else 1e-3  # a logarithmic axis has no zero
    ends: list[Place] = []
    for work in WORKS:
        chosen = [p for p in points if (p["axis"], p["work"]) == (axis, work) and p[name] is not None]
        line = sorted((point[axis] / scale, max(point[name] / unit, least)) for point in chosen)
        if line:
            xs, ys = zip(*line, strict=True)
            panel.plot(xs, ys, color=COLOURS[work], marker="o", markersize=2.5, linewidth=1.4)
            ends.append((ys[-1], xs[-1], work))
    for side in (panel.xaxis, panel.yaxis):
        side.set_major_formatter(lambda value, _: f"{value:,g}")
        side.set_minor_formatter(lambda *_: "")
    if axis == "threads":
        panel.set_xticks(sorted({point["threads"] for point in points if point["axis"] == axis}))
    if axis == "tensors":
        panel.set_xticks([10, 1_000, 100_000])  # Between them there is no room for the others.
    return ends


def name_lines(panel: Any, places: list[Place]) -> None:
    """Write the names of the lines at their ends, one above the other where the ends are close."""
    below = -1.0
    for y, x, work in sorted(places):
        _, height = panel.transAxes.inverted().transform(panel.transData.transform((x, y)))
        below = max(height, below + LABEL_DISTANCE)
        panel.annotate(
            work, (1.0, below), xycoords="axes fraction", xytext=(3, 0), textcoords="offset points",
            color=COLOURS[work], fontsize=7, va="center",
        )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
