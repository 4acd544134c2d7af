"""Formats numbers, bytes and speeds for people, and reads sizes that people write. No other module knows units.

Units are binary (KiB, MiB, GiB, TiB) and chosen to fit the number. Imports nothing from this package.
"""

from __future__ import annotations

import re

__all__ = ["counted", "format_bytes", "format_gib", "format_speed", "parse_bytes"]

_UNITS = ("KiB", "MiB", "GiB", "TiB")


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """Return a number with its noun, such as ``"1 file"`` or ``"1,200 files"``. ``plural=None`` adds an s."""
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"


def format_bytes(nbytes: float, *, like: float | None = None) -> str:
    """Return a number of bytes with a unit that fits it, for example ``"1.50 GiB"``.

    Args:
        nbytes: The number of bytes.
        like: Choose the unit for this number of bytes instead, for a column with one unit. ``None``: for ``nbytes``.
    """
    largest = abs(nbytes if like is None else like)
    if largest < 1024:
        return f"{nbytes:.0f} bytes"
    exponent = 1
    while exponent < len(_UNITS) and round(largest / 1024**exponent, 2) >= 1024:
        exponent += 1
    return f"{nbytes / 1024**exponent:.2f} {_UNITS[exponent - 1]}"


def format_gib(nbytes: float, *, like: float | None = None) -> str:
    """Return a number of bytes in GiB: with two decimals from 1 GiB on and three below: ``"0.125 GiB"``.

    Args:
        nbytes: The number of bytes.
        like: Choose the decimals for this number of bytes instead, for a column. ``None``: for ``nbytes``.
    """
    decimals = 2 if abs(nbytes if like is None else like) >= 2**30 else 3
    return f"{nbytes / 2**30:.{decimals}f} GiB"


def format_speed(nbytes: float, seconds: float) -> str:
    """Return the speed of ``nbytes`` in ``seconds``, for example ``"3.20 GiB/s"``."""
    return f"{format_bytes(nbytes / max(seconds, 1e-9))}/s"


def parse_bytes(text: str) -> int | None:
    """Return the bytes of a size such as ``"8GiB"`` or ``"1.5 TiB"``, ``None`` if it is not one."""
    match = re.fullmatch(rf"(\d+(?:\.\d+)?)\s*({'|'.join(_UNITS)})", text.strip(), re.IGNORECASE)
    if match is None:
        return None
    exponent = [unit.lower() for unit in _UNITS].index(match[2].lower()) + 1
    return int(float(match[1]) * 1024**exponent)
