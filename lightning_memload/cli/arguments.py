"""Types of arguments that several verbs have, for argparse, which shows their messages."""

from __future__ import annotations

import argparse
import re

__all__ = ["positive_number", "regular_expression"]


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
