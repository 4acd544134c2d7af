"""Lays out the results of a verb: tables and lists in the width of the terminal. In a pipe no name is shortened."""

from __future__ import annotations

import json
import math
import shutil
import sys
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

__all__ = ["lay_out_list", "lay_out_table", "print_json", "printable", "shortened", "terminal_width"]

_MIN_NAME = 20


def terminal_width() -> int | None:
    """Columns of the terminal that stdout is. ``None`` if it is a pipe or a file."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def printable(name: str | None) -> str:
    """A name on one line, without the terminal control codes that a hostile file may put in it."""
    return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in name or "")


def shortened(name: str, most: int) -> str:
    """A name of at most so many characters: the middle is replaced by an ellipsis."""
    if len(name) <= most:
        return name
    head = (most - 1) // 2
    return f"{name[:head]}…{name[len(name) - (most - 1 - head) :]}"


def lay_out_table(rows: Sequence[Sequence[str]], right: Iterable[int], *, width: int | None) -> list[str]:
    """The lines of a table.

    Args:
        rows: Cells, the same number in each row. The first cell is a name, which is shortened if the line is too wide.
        right: The columns that are aligned to the right.
        width: The width of the terminal. ``None``: unlimited.
    """
    if not rows:
        return []
    right = set(right)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    if width is not None:
        others = sum(widths[1:]) + 2 * (len(widths) - 1)
        widths[0] = min(widths[0], max(_MIN_NAME, width - others))
    lines = []
    for row in rows:
        cells = [shortened(row[0], widths[0]), *row[1:]]
        padded = [
            cell.rjust(size) if column in right else cell.ljust(size)
            for column, (cell, size) in enumerate(zip(cells, widths, strict=True))
        ]
        lines.append("  ".join(padded).rstrip())
    return lines


def lay_out_list(title: str, items: Iterable[str], *, width: int | None) -> list[str]:
    """A title and items, separated by commas, in lines of the terminal's width (100 columns in a pipe)."""
    return textwrap.wrap(
        f"{title} {', '.join(items)}",
        width or 100,
        subsequent_indent="  ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def print_json(answer: Any) -> None:
    """Prints an answer as JSON. Infinite numbers and NaN, which JSON lacks, become strings."""
    print(json.dumps(_finite(answer)))


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
