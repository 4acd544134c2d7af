"""The style of all pictures of this project: colours, fonts, and labels at the lines in place of a legend.

The colours are those of Okabe and Ito, which the colour-blind can tell apart, darkened on white and lightened on black
until each has a contrast of at least 3 to 1. matplotlib is imported on the first use. The settings, the backend and the
figures of the user's own matplotlib stay as they are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

__all__ = [
    "PALETTES",
    "Label",
    "Palette",
    "Theme",
    "label_lines",
    "plain_numbers",
    "require_matplotlib",
    "spread",
    "styled",
]

Theme = Literal["light", "dark"]


@dataclass(frozen=True, slots=True)
class Palette:
    """The colours of one theme.

    Attributes:
        ink: Text and axes.
        muted: Lines that help to read, and text of less weight.
        background: The background of a picture that is not transparent.
        colours: The colours of the lines, in the order of their use.
    """

    ink: str
    muted: str
    background: str
    colours: tuple[str, str, str, str, str]


PALETTES: dict[Theme, Palette] = {
    "light": Palette("#24292f", "#6e7781", "#ffffff", ("#D55E00", "#0072B2", "#008A64", "#B5548C", "#A87400")),
    "dark": Palette("#e6edf3", "#8b949e", "#0d1117", ("#FF8A3D", "#56B4E9", "#1FC79A", "#E39AC6", "#E6B84A")),
}


@dataclass(frozen=True, slots=True)
class Label:
    """A text at the end of a line.

    Attributes:
        y: Where the line ends, in the units of the axis.
        text: The text.
        colour: Its colour.
    """

    y: float
    text: str
    colour: str


def require_matplotlib(name: str) -> None:
    """Raise if matplotlib is missing.

    Args:
        name: What needs it, for the message.

    Raises:
        ModuleNotFoundError: It is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{name} needs matplotlib. Install it with: pip install 'lightning-memload[plot]'", name="matplotlib"
        ) from error


@contextlib.contextmanager
def styled(theme: Theme) -> Iterator[Palette]:
    """Apply the style within the block. The settings of the user are back after it."""
    import matplotlib

    palette = PALETTES[theme]
    inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "axes.titlecolor", "xtick.color", "ytick.color")
    style: dict[Any, Any] = {
        **dict.fromkeys(inked, palette.ink),
        "text.usetex": False,
        "text.parse_math": False,  # a name with dollar signs is no formula
        "font.family": "sans-serif",
        # Fonts of the same width, so that text in an SVG has room where the first one is missing.
        "font.sans-serif": ["DejaVu Sans", "Verdana", "Bitstream Vera Sans", "Arial", "sans-serif"],
        "font.size": 9,
        "figure.facecolor": palette.background,
        "savefig.facecolor": "auto",
        "axes.facecolor": "none",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.linewidth": 0.7,
        "grid.color": palette.muted,
        "grid.alpha": 0.25,
        "grid.linewidth": 0.5,
        "lines.linewidth": 1.8,
        "svg.fonttype": "none",  # text stays text
        "svg.hashsalt": "lightning_memload",  # the same picture for the same figures
    }
    with matplotlib.rc_context(style):
        yield palette


def label_lines(axes: Any, labels: Sequence[Label], *, distance: float = 0.075, size: float = 8) -> None:
    """Write labels at the right of the axes, at the height of their lines and never one over the other.

    Args:
        axes: The axes, with their final limits.
        labels: The labels.
        distance: The height of a line of text, as a share of the height of the axes.
        size: The size of the text in points.
    """
    ordered = sorted(labels, key=lambda label: label.y)
    heights = [axes.transAxes.inverted().transform(axes.transData.transform((0, label.y)))[1] for label in ordered]
    sizes = [distance * (1 + label.text.count("\n")) for label in ordered]
    for label, height in zip(ordered, spread(heights, sizes, least=sizes[0] / 2 if sizes else 0.0), strict=True):
        axes.annotate(
            label.text, (1.0, height), xycoords="axes fraction", xytext=(4, 0), textcoords="offset points",
            color=label.colour, fontsize=size, va="center", annotation_clip=False,
        )  # fmt: skip


def spread(places: Sequence[float], sizes: Sequence[float], *, least: float = 0.0, most: float = 1.0) -> list[float]:
    """Move sorted places apart, so that things of these sizes, centred there, do not overlap.

    Args:
        places: The wanted centres, in increasing order.
        sizes: The size of each thing.
        least: The smallest centre.
        most: The largest centre, as far as there is room.
    """
    moved = list(places)
    for i, place in enumerate(moved):
        below = moved[i - 1] + (sizes[i - 1] + sizes[i]) / 2 if i else least
        moved[i] = max(place, below)
    for i in reversed(range(len(moved))):
        above = moved[i + 1] - (sizes[i] + sizes[i + 1]) / 2 if i + 1 < len(moved) else most
        moved[i] = min(moved[i], above)
    return moved


def plain_numbers(*sides: Any) -> None:
    """Write the numbers of axes as people do: ``1,000`` and ``0.1``, also on logarithmic axes."""
    for side in sides:
        side.set_major_formatter(lambda value, _: f"{value:,g}")
        side.set_minor_formatter(lambda *_: "")
