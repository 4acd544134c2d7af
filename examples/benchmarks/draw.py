"""Draw the measured results as pictures for README and the documentation, in a light and a dark variant.

    python examples/benchmarks/draw.py

Writes ``docs/assets/NAME-light.svg`` and ``-dark.svg``: ``summary-h100`` from the results of a resume and a save on a
GPU, ``curves-*`` from each ``results/curves-*.json``, and ``memory-*`` from each ``results/resume-*.json`` that has
memory over time. Needs matplotlib. No figure is typed by hand.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import GIB
from curves import WORKS
from matplotlib.figure import Figure

from lightning_memload.memory import MemorySeries
from lightning_memload.report import compare_figure
from lightning_memload.report.picture_style import PALETTES, Label, Palette, Theme, label_lines, plain_numbers, styled

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS, ASSETS = Path(__file__).resolve().parent / "results", ROOT / "docs" / "assets"
# The width of README in inches, at 100 points to the inch.
WIDTH = 8.3
AXES = {"bytes": "size of the file, GB", "tensors": "tensors in the file", "threads": "reading threads"}
FIGURES = {"seconds": ("seconds", 1.0), "host_bytes": ("host memory above start, MiB", 2.0**20)}
STOCK, OURS = "stock Lightning", "this project"


def main() -> int:
    """Draw all pictures, and return the exit status."""
    for path, text in drawn().items():
        path.write_text(text)
    return 0


def drawn() -> dict[Path, str]:
    """Return the text of each picture."""
    makers: dict[str, Any] = {"summary-h100": (draw_summary, read("resume-h100"), read("save-h100"))}
    for path in sorted(RESULTS.glob("curves-*.json")):
        makers[path.stem] = (draw_curves, read(path.stem))
    for path in sorted(RESULTS.glob("resume-*.json")):
        result = read(path.stem)
        if "series" in result:
            makers["memory-gpu" if result["machine"]["gpu"] else "memory-cpu"] = (draw_memory, result)
    return {
        ASSETS / f"{name}-{theme}.svg": picture(theme, make, *results)
        for name, (make, *results) in makers.items()
        for theme in PALETTES
    }


def read(name: str) -> dict[str, Any]:
    """Return one result."""
    result: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return result


def picture(theme: Theme, make: Callable[..., Figure], *results: dict[str, Any]) -> str:
    """Return a picture of results as an SVG without a background, for pages of any colour."""
    file = io.StringIO()
    with styled(theme) as palette:
        figure = make(palette, *results)
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return file.getvalue()


# Summary --------------------------------------------------------------------------------------------------------------


def draw_summary(palette: Palette, resume: dict[str, Any], save: dict[str, Any]) -> Figure:
    """Draw host memory as bars and seconds on a logarithmic axis: a resume and a save, stock and this project."""
    works = {
        "resume": (resume["variants"]["stock"], resume["variants"]["callback"]),
        "save": (save["ways"]["stock"], save["ways"]["ours"]),
    }
    figure = Figure(figsize=(WIDTH, 2.3), layout="constrained")
    memory, seconds = figure.subplots(1, 2)
    gibs = {name: [way["host_above_start_bytes"] / GIB for way in ways] for name, ways in works.items()}
    draw_bars(memory, palette, gibs)
    draw_spans(seconds, palette, {name: [way["seconds"] for way in ways] for name, ways in works.items()})
    titles = "Host memory above the start, GiB", "Time until training continues, seconds"
    for panel, title in zip((memory, seconds), titles, strict=True):
        panel.set_title(title, loc="left", fontsize=9.5, fontweight="bold", pad=8)
        panel.tick_params(left=False)
        panel.spines["left"].set_visible(False)
    gpu = resume["machine"]["gpu"].removeprefix("NVIDIA ").split()[0]
    size = f"{resume['checkpoint_bytes'] / 1e9:.1f} GB"
    figure.supxlabel(
        f"{resume['size']} with AdamW, a checkpoint of {size}, on one {gpu}. The values are the same, bit for bit.",
        x=0.01, ha="left", fontsize=8, color=palette.muted,
    )  # fmt: skip
    return figure


def draw_bars(panel: Any, palette: Palette, values: dict[str, list[float]]) -> None:
    """Draw two bars for each work, each with its number, and the names of the two above the first ones."""
    half = max(max(pair) for pair in values.values()) / 2
    for row, pair in enumerate(values.values()):
        for place, value, colour, name in zip((-0.19, 0.19), pair, palette.colours[:2], (STOCK, OURS), strict=True):
            place += row
            panel.barh(place, value, height=0.32, color=colour)
            text = f"{value:.2f} GiB" if row else f"{value:.2f} GiB, {name}"
            inside = value > half
            panel.annotate(
                text, (value, place), xytext=(-5 if inside else 5, 0), textcoords="offset points", va="center",
                ha="right" if inside else "left", fontsize=8.5, fontweight="bold",
                color=palette.background if inside else colour,
            )  # fmt: skip
    panel.set_yticks(range(len(values)), list(values))
    panel.invert_yaxis()
    panel.set_xticks([])
    panel.spines["bottom"].set_visible(False)


def draw_spans(panel: Any, palette: Palette, values: dict[str, list[float]]) -> None:
    """Draw for each work a point for stock and one for this project on a logarithmic axis, each with its number."""
    panel.set_xscale("log")
    for row, (stock, ours) in enumerate(values.values()):
        panel.plot([ours, stock], [row, row], color=palette.muted, linewidth=1.2, zorder=1)
        for value, colour, name in zip((stock, ours), palette.colours[:2], (STOCK, OURS), strict=True):
            panel.plot([value], [row], "o", color=colour, markersize=7)
            panel.annotate(
                f"{value:.2f} s" if row else f"{name}\n{value:.2f} s", (value, row), xytext=(0, 7),
                textcoords="offset points", ha="center", fontsize=8.5, fontweight="bold", color=colour,
            )  # fmt: skip
        panel.annotate(
            f"{stock / ours:.1f} times as fast", ((stock * ours) ** 0.5, row), xytext=(0, -11),
            textcoords="offset points", ha="center", fontsize=8, color=palette.muted,
        )  # fmt: skip
    numbers = [value for pair in values.values() for value in pair]
    panel.set_xlim(min(numbers) / 1.8, max(numbers) * 1.8)
    panel.set_ylim(len(values) - 0.5, -0.6)
    panel.set_yticks(range(len(values)), list(values))
    panel.set_xticks([1, 2, 5, 10, 20, 50])
    panel.minorticks_off()
    panel.grid(axis="x")
    plain_numbers(panel.xaxis)


# Memory over time -----------------------------------------------------------------------------------------------------


def draw_memory(palette: Palette, result: dict[str, Any]) -> Figure:
    """Draw the memory of the same resume over time: stock and this project."""
    courses = {
        label: MemorySeries(**{figure: tuple(levels) for figure, levels in result["series"][variant].items()})
        for label, variant in ((STOCK, "stock"), (OURS, "callback"))
    }
    (theme,) = (theme for theme, known in PALETTES.items() if known is palette)
    figure: Figure = compare_figure(courses, theme)
    return figure


# Curves ---------------------------------------------------------------------------------------------------------------


def draw_curves(palette: Palette, report: dict[str, Any]) -> Figure:
    """Draw a column for each axis, above the seconds and below the host memory. All axes are logarithmic."""
    figure = Figure(figsize=(9.2, 5.4), layout="constrained")
    grid = figure.subplots(2, len(AXES), sharey="row")
    for panels, (figure_name, (label, unit)) in zip(grid, FIGURES.items(), strict=True):
        ends = []
        for panel, (axis, words) in zip(panels, AXES.items(), strict=True):
            ends.append(draw_lines(panel, palette, report["points"], axis, figure_name, unit))
            panel.set_xlabel(words)
        panels[0].set_ylabel(label)
        for panel, labels in zip(panels, ends, strict=True):  # The panels share limits, which are known only now.
            label_lines(panel, labels, size=7)
    return figure


def draw_lines(
    panel: Any, palette: Palette, points: list[dict[str, Any]], axis: str, name: str, unit: float
) -> list[Label]:
    """Draw the lines of all works along one axis, and return the labels at their ends."""
    panel.set(xscale="log", yscale="log")
    panel.grid()
    scale = 1e9 if axis == "bytes" else 1.0
    least = 0.5 if name == "host_bytes" else 1e-3  # a logarithmic axis has no zero
    labels: list[Label] = []
    for work, colour in zip(WORKS, palette.colours, strict=True):
        chosen = [p for p in points if (p["axis"], p["work"]) == (axis, work) and p[name] is not None]
        line = sorted((point[axis] / scale, max(point[name] / unit, least)) for point in chosen)
        if line:
            xs, ys = zip(*line, strict=True)
            panel.plot(xs, ys, color=colour, marker="o", markersize=2.5, linewidth=1.4)
            labels.append(Label(ys[-1], work, colour))
    plain_numbers(panel.xaxis, panel.yaxis)
    if axis == "threads":
        panel.set_xticks(sorted({point["threads"] for point in points if point["axis"] == axis}))
    if axis == "tensors":
        panel.set_xticks([10, 1_000, 100_000])  # Between them there is no room for the others.
    return labels


if __name__ == "__main__":
    sys.exit(main())
