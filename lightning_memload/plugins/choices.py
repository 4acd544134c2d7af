"""Checks arguments that have a fixed set of values, and sizes."""

from __future__ import annotations

from typing import Any, Literal, get_args

from lightning_memload.report import Detail
from lightning_memload.units import parse_bytes

__all__ = ["Log", "SnapshotSize", "check_choice", "check_snapshot", "detail_of"]

Log = Literal[False, True, "summary", "all"]
SnapshotSize = Literal["auto", False] | int | str


def check_choice(name: str, value: Any, choices: Any) -> None:
    """Raises if an argument has none of its possible values.

    Args:
        name: The name of the argument, for the message.
        value: Its value.
        choices: The ``Literal`` type with the possible values.

    Raises:
        ValueError: The value is not one of them.
    """
    if value not in get_args(choices):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, get_args(choices)))}, got {value!r}.")


def detail_of(name: str, value: Log) -> Detail | None:
    """Return how many figures an argument of :data:`Log` stands for, ``None`` for silence.

    Args:
        name: The name of the argument, for the message.
        value: Its value.

    Raises:
        ValueError: The value is not possible.
    """
    check_choice(name, value, Log)
    if isinstance(value, str):
        return value
    return "summary" if value else None


def check_snapshot(name: str, value: SnapshotSize, asynchronous_name: str, asynchronous: object) -> int | None:
    """Raises if an argument is no size of a snapshot, or if there is no asynchronous save to take one for.

    Args:
        name: The name of the argument, for the message.
        value: Its value.
        asynchronous_name: The name of the argument that makes saves asynchronous, for the message.
        asynchronous: Its value.

    Returns:
        The most memory in bytes, 0 for no snapshot, ``None`` for no limit.

    Raises:
        ValueError: The value is not possible.
    """
    if value == "auto":
        nbytes = None
    elif isinstance(value, str):
        nbytes = parse_bytes(value) or -1
    else:
        nbytes = -1 if value is True or not isinstance(value, int) else int(value)
    if nbytes is not None and nbytes < 0:
        raise ValueError(f"{name} must be 'auto', False or a size such as '8GiB' or 8589934592, got {value!r}.")
    if nbytes != 0 and not asynchronous:
        raise ValueError(
            f"{name}={value!r} needs {asynchronous_name}=True or 'until_step': a snapshot is written in the background."
        )
    return nbytes
