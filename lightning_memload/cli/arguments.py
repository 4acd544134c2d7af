"""Types of arguments that several verbs have, for argparse, which shows their messages."""

from __future__ import annotations

import argparse
import re

__all__ = ["positive_number", "regular_expression", "renaming", "size_in_bytes"]

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def positive_number(word: str) -> int:
    """A whole number of at least 1."""
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"{word!r} is not a whole number of at least 1")
    return int(word)


def regular_expression(word: str) -> re.Pattern[str]:
    """A regular expression that is searched for in names."""
    try:
        return re.compile(word)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{word!r} is not a regular expression: {error}") from None


def renaming(word: str) -> tuple[str, str]:
    """A regular expression and its replacement, as ``PATTERN=REPLACEMENT``. The last ``=`` divides them."""
    pattern, equals, replacement = word.rpartition("=")
    if not equals or not pattern:
        raise argparse.ArgumentTypeError(f"{word!r} is not of the form REGEX=NEW")
    regular_expression(pattern)
    return pattern, replacement


def size_in_bytes(word: str) -> int:
    """A size such as ``5GB`` (decimal), ``5GiB`` (binary) or a number of bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", word)
    factor = _UNITS.get(match[2].upper()) if match else None
    if match is None or factor is None or float(match[1]) * factor < 1:
        raise argparse.ArgumentTypeError(f"{word!r} is not a size such as 5GB or 500MiB")
    return int(float(match[1]) * factor)
