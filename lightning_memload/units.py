"""Numbers, bytes and speeds as people read them: the one place that chooses a unit.

Units are binary (KiB, MiB, GiB, TiB), and fit the number. Needs nothing of the package.
"""

from __future__ import annotations

__all__ = ["counted", "format_bytes", "format_speed"]

_UNITS = ("KiB", "MiB", "GiB", "TiB")


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """A number of things, for example ``"1 file"`` or ``"1,200 files"``. ``plural``: ``None`` adds an s."""
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"


def format_bytes(nbytes: float, *, like: float | None = None) -> str:
    """A number of bytes with the unit that fits it, for example ``"1.50 GiB"``.

    Args:
        nbytes: The bytes.
        like: Take the unit that fits this number instead, for a column of numbers. ``None``: the number's own.
    """
    largest = abs(nbytes if like is None else like)
    if largest < 1024:
        return f"{nbytes:.0f} bytes"
    exponent = 1
    while exponent < len(_UNITS) and round(largest / 1024**exponent, 2) >= 1024:
        exponent += 1
    return f"{nbytes / 1024**exponent:.2f} {_UNITS[exponent - 1]}"


def format_speed(nbytes: float, seconds: float) -> str:
    """The speed of so many bytes in so many seconds, for example ``"3.20 GiB/s"``."""
    return f"{format_bytes(nbytes / max(seconds, 1e-9))}/s"
