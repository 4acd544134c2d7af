"""Checks arguments that have a fixed set of values."""

from __future__ import annotations

from typing import Any, get_args

__all__ = ["check_choice"]


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
