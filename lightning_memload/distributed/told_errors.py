"""Errors as messages to other ranks, in values that JSON can represent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_memload.errors import CheckpointReadError, ChecksumError

__all__ = ["describe_error", "rebuild_read_error"]

# The errors that are the same on every rank, and their fields.
_FIELDS: dict[type[CheckpointReadError], tuple[str, ...]] = {
    CheckpointReadError: ("path", "key", "offset", "errno"),
    ChecksumError: ("path", "key", "offset", "expected", "actual"),
}


def describe_error(error: Exception) -> dict[str, Any]:
    """An error for other ranks: ``kind``, the name of its class, ``message``, and ``fields`` of a read error."""
    names = next((names for kind, names in _FIELDS.items() if type(error) is kind), ())
    fields = {name: getattr(error, name) for name in names}
    # The text of a KeyError is in quotes.
    message = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return {"kind": type(error).__name__, "message": message, "fields": fields}


def rebuild_read_error(told: Mapping[str, Any], where: str) -> CheckpointReadError | None:
    """The error of another rank, with a sentence about where it was found.

    Returns:
        ``None`` if it is neither a :class:`CheckpointReadError` nor a :class:`ChecksumError`.
    """
    for kind in _FIELDS:
        if kind.__name__ == told["kind"]:
            return kind(f"{told['message']} {where}", **told["fields"])
    return None
