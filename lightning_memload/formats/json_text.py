"""Parses the JSON of the safetensors format, which may be hostile, and shortens its values for messages.

The rules are stricter than those of the standard library: a key that occurs twice, and a number or a text that no
format can use, are damage.
"""

from __future__ import annotations

import json
import re
import reprlib
from typing import Any

from lightning_memload.errors import CheckpointFormatError

__all__ = ["COPY_AGAIN", "MAX_HEADER_BYTES", "parse_json", "short"]

# The limit of the format. A false length cannot make us read more. An index of shards has the same limit.
MAX_HEADER_BYTES = 100_000_000
_MAX_DIGITS = 20
_MANY_DIGITS = re.compile(rb"[0-9]{%d}" % (_MAX_DIGITS + 1))

COPY_AGAIN = "The file is damaged, or safetensors did not write it: copy or download it again."

# Names and numbers of a hostile header may be millions of characters long, and its lists deeper than the stack.
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 100
_SHORT.maxlist = _SHORT.maxtuple = 8
_SHORT.maxdict = 4
_SHORT.maxlevel = 2
short = _SHORT.repr


def parse_json(data: bytes, path: str, what: str) -> Any:
    """Parses JSON.

    Args:
        data: The text.
        path: The file of the text.
        what: The name of the text in messages.

    Raises:
        CheckpointFormatError: It is no JSON, too deep, has a key twice, or unusable numbers or texts.
    """
    # Rare cases are searched for once, not in each of thousands of entries.
    to_object = _unique_texts if b"\\u" in data else _unique_keys
    to_integer = _short_integer if _MANY_DIGITS.search(data) else int
    try:
        return json.loads(data.decode(), object_pairs_hook=to_object, parse_int=to_integer, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise CheckpointFormatError(
            f"{path}: {what}, {len(data)} bytes of JSON, cannot be read ({error}). {COPY_AGAIN}", path=path
        ) from error


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys: set[str] = set()
        twice = next(key for key, _ in pairs if key in keys or keys.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"it has the key {short(twice)} twice, so which one is meant cannot be told")
    return found


def _unique_texts(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # Half of a surrogate pair is no text: it could neither be printed nor compared with a parameter's name. Only an
    # escape can write one.
    "".join(key for key, _ in pairs).encode()
    return _unique_keys(pairs)


def _short_integer(digits: str) -> int:
    # Python's own limit may be switched off, and then the time is quadratic.
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"it has an integer of {len(digits)} digits")
    return int(digits)


def _no_constant(name: str) -> Any:
    raise ValueError(f"it has {name} for a number")
