"""Draws memory over time: one restore with its phases and limits, or several measurements on one axis.

Uses matplotlib without pyplot: no window, no change of the user's backend, and nothing that must be closed.
"""

from __future__ import annotations

import os
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightning_memload.memory import MemorySeries
from lightning_memload.report.explanation import explain_host_memory
from lightning_memload.report.picture_style import (
    PALETTES,
    Label,
    Palette,
    Theme,
    label_lines,
    plain_numbers,
    require_matplotlib,
    spread,
    styled,
)
from lightning_memload.units import format_gib

if TYPE_CHECKING:
    from lightning_memload.report.restore_report import PhaseReport, RestoreReport

__all__ = ["compare_figure", "compare_plots", "restore_figure", "save_figure"]

_GIB = 2**30
# In inches, at 100 points to the inch: the width of a README.
_WIDTH, _PANEL_HEIGHT, _AROUND = 8.3, 2.3, 1.1
# The width of a character of the small text, as a share of the axes.
_CHARACTER = 0.0105
# A limit that is further above the highest level than this is written and not drawn, so that the lines stay readable.
_LARGEST_HEADROOM = 1.6

# For each panel its title and lines: field of the series, label, number of the colour, dashes.
_PANELS = {
    "host memory, GiB": (
        ("host_bytes", "anonymous + shmem", 0, "-"),
        ("file_backed_bytes", "file-backed", 2, "-"),
        ("pinned_bytes", "page-locked", 3, "-"),
    ),
    "GPU memory, GiB": (
        ("cuda_reserved_bytes", "reserved", 4, "--"),
        ("cuda_allocated_bytes", "allocated", 1, "-"),
    ),
}


def restore_figure(report: RestoreReport, theme: Theme = "light") -> Any:
    """Return a restore as a ``matplotlib.figure.Figure``: memory over time, phases as bands, limits as lines.

    Raises:
        ValueError: The report has no series, or there is no such theme.
        ModuleNotFoundError: matplotlib is not installed.
    """
    panels = _panels_of([report.series], theme)
    with styled(theme) as palette:
        figure, grid = _make_figure(len(panels))
        for axes, (title, lines) in zip(grid, panels.items(), strict=True):
            labels = _draw_lines(axes, report.series, lines, palette)
            if title.startswith("host"):
                labels += _draw_limits(axes, report, palette)
            _finish(axes, title, report.series.seconds[-1])
            label_lines(axes, labels)
            _draw_phases(axes, report.phases, palette, named=axes is grid[0])
        grid[-1].set_xlabel("seconds since the start of the restore")
        read = format_gib(report.total.bytes_read)
        title = f"{os.path.basename(report.path)}, {report.stage}: {read} read in {report.total.seconds:.2f} s"
        explained = explain_host_memory(report)
        _head(figure, title, f"Anonymous memory {explained}" if explained else "", palette)
        return figure


def compare_plots(
    measurements: Mapping[str, RestoreReport | MemorySeries], path: str | os.PathLike[str], *, theme: Theme = "light"
) -> None:
    """Draw the memory of several measurements over time on one axis, with their names and peaks at the lines.

    The host memory is anonymous memory and shmem. Where a GPU was measured, a second axis shows its live tensors.

    Args:
        measurements: Reports of restores, or ``MemoryMonitor.series``, by their names.
        path: The picture. The end of its name decides the format: ``.png``, ``.svg`` or ``.pdf``.
        theme: ``"light"`` or ``"dark"``.

    Raises:
        ValueError: There is nothing to draw, or no such theme or format.
        ModuleNotFoundError: matplotlib is not installed. The extra ``plot`` installs it.
        OSError: The file cannot be written.
    """
    require_matplotlib("compare_plots()")
    save_figure(compare_figure(measurements, theme), path, theme)


def compare_figure(measurements: Mapping[str, RestoreReport | MemorySeries], theme: Theme = "light") -> Any:
    """Return the picture of :func:`compare_plots` as a ``matplotlib.figure.Figure``.

    Raises:
        ValueError: There is nothing to draw, or no such theme.
        ModuleNotFoundError: matplotlib is not installed.
    """
    named = {name: one if isinstance(one, MemorySeries) else one.series for name, one in measurements.items()}
    panels = _panels_of(list(named.values()), theme)
    last = max(series.seconds[-1] for series in named.values())
    with styled(theme) as palette:
        figure, grid = _make_figure(len(panels))
        for axes, (title, lines) in zip(grid, panels.items(), strict=True):
            field = lines[-1][0] if title.startswith("GPU") else lines[0][0]
            labels: list[Label] = []
            for number, (name, series) in enumerate(named.items()):
                labels += _draw_measurement(axes, name, series, field, palette.colours[number % 5], last)
            _finish(axes, title, last)
            label_lines(axes, labels)
        grid[-1].set_xlabel("seconds since the start")
        return figure


def save_figure(figure: Any, path: str | os.PathLike[str], theme: Theme) -> None:
    """Write a figure to a file. The same figures give the same file.

    Raises:
        ValueError: The end of the name is not a format.
        OSError: The file cannot be written.
    """
    # Other formats than SVG do not know an empty date.
    fixed: dict[str, Any] = {"Date": None, "Creator": None} if os.fspath(path).endswith(".svg") else {}
    with styled(theme):
        figure.savefig(path, dpi=200, metadata=fixed)


# ----------------------------------------------------------------------------------------------------------------------


def _panels_of(drawn: Sequence[MemorySeries], theme: str) -> dict[str, Any]:
    """The panels that have figures, each with the lines that have figures."""
    if theme not in PALETTES:
        raise ValueError(f"theme must be one of {', '.join(map(repr, PALETTES))}, got {theme!r}.")
    if not drawn or not all(drawn):
        raise ValueError("There is no memory over time to draw: a measurement has no points.")
    panels = {
        title: [line for line in lines if any(any(getattr(series, line[0])) for series in drawn)]
        for title, lines in _PANELS.items()
    }
    known = {title: lines for title, lines in panels.items() if lines}
    if not known:
        raise ValueError("There is no memory over time to draw: this platform does not tell anonymous memory.")
    return known


def _make_figure(num_panels: int) -> tuple[Any, list[Any]]:
    require_matplotlib("save_plot()")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, _AROUND + _PANEL_HEIGHT * num_panels), dpi=100, layout="constrained")
    return figure, list(figure.subplots(num_panels, 1, sharex=True, squeeze=False)[:, 0])


def _draw_lines(axes: Any, series: MemorySeries, lines: Sequence[Any], palette: Palette) -> list[Label]:
    labels = []
    for field, name, colour, dashes in lines:
        points = [
            (seconds, level / _GIB)
            for seconds, level in zip(series.seconds, getattr(series, field), strict=True)
            if level is not None
        ]
        xs, ys = zip(*points, strict=True)
        axes.plot(xs, ys, dashes, color=palette.colours[colour], solid_capstyle="round")
        peak = format_gib(max(ys) * _GIB)
        labels.append(Label(ys[-1], f"{name}\npeak {peak}", palette.colours[colour]))
    return labels


def _draw_limits(axes: Any, report: RestoreReport, palette: Palette) -> list[Label]:
    """The budget above what stays, and the limit of the memory cgroup if it is near."""
    series, top = report.series, axes.get_ylim()[1]
    ends = [level for level in (series.host_bytes[0], series.host_bytes[-1]) if level is not None]
    limits = []
    if ends and report.budget_bytes:
        limits.append(((max(ends) + report.budget_bytes) / _GIB, f"budget +{format_gib(report.budget_bytes)}"))
    if report.total.peaks.cgroup_limit_bytes is not None:
        limit = report.total.peaks.cgroup_limit_bytes
        limits.append((limit / _GIB, f"limit {format_gib(limit)}"))
    near = [(level, text) for level, text in limits if level <= _LARGEST_HEADROOM * top]
    for level, _ in near:
        axes.axhline(level, color=palette.muted, linewidth=0.9, linestyle=(0, (4, 3)))
    return [Label(level, text, palette.muted) for level, text in near]


def _draw_measurement(axes: Any, name: str, series: MemorySeries, field: str, colour: str, last: float) -> list[Label]:
    """One line to its end, and from there a dotted one to its name at the right."""
    levels = zip(series.seconds, getattr(series, field), strict=True)
    points = [(seconds, level / _GIB) for seconds, level in levels if level is not None]
    if not points:
        return []
    xs, ys = zip(*points, strict=True)
    axes.plot(xs, ys, color=colour, solid_capstyle="round")
    axes.plot([xs[-1], last], [ys[-1]] * 2, ":", color=colour, linewidth=1, alpha=0.6)
    axes.plot(xs[-1:], ys[-1:], "o", color=colour, markersize=4, clip_on=False)
    return [Label(ys[-1], f"{name}\n{xs[-1]:.2f} s, peak {format_gib(max(ys) * _GIB)}", colour)]


def _draw_phases(axes: Any, phases: Sequence[PhaseReport], palette: Palette, *, named: bool) -> None:
    """The phases as bands. Their names are above the first panel."""
    known = [phase for phase in phases if phase.start_seconds is not None]
    least, most = axes.get_xlim()
    centres, texts = [], []
    for number, phase in enumerate(known):
        start = phase.start_seconds or 0.0
        axes.axvspan(start, start + phase.seconds, color=palette.muted, alpha=(0.10, 0.20)[number % 2], linewidth=0)
        centres.append((start + phase.seconds / 2 - least) / (most - least))
        texts.append(f"{phase.name} {phase.seconds:.2f} s")
    if not named:
        return
    sizes = [_CHARACTER * (len(text) + 2) for text in texts]
    first, last = (sizes[0] / 2, 1 - sizes[-1] / 2) if sizes else (0.0, 1.0)
    for centre, text in zip(spread(centres, sizes, least=first, most=last), texts, strict=True):
        axes.annotate(
            text, (centre, 1.0), xycoords="axes fraction", xytext=(0, 4), textcoords="offset points",
            color=palette.muted, fontsize=8, ha="center", annotation_clip=False,
        )  # fmt: skip


def _finish(axes: Any, title: str, seconds: float) -> None:
    axes.set_xlim(0, max(seconds, 1e-3))
    axes.set_ylim(0, axes.get_ylim()[1])
    axes.set_ylabel(title)
    axes.grid(axis="y")
    axes.locator_params(nbins=6)
    plain_numbers(axes.xaxis, axes.yaxis)


def _head(figure: Any, title: str, text: str, palette: Palette) -> None:
    """A title at the left, and a smaller text below it."""
    lines = textwrap.wrap(text, 125)
    figure.suptitle("\n".join([title, *([""] * len(lines))]), x=0.01, ha="left", fontsize=10, fontweight="bold")
    figure.text(0.01, 1 - 0.26 / figure.get_figheight(), "\n".join(lines), fontsize=8, color=palette.muted, va="top")
