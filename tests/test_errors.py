"""Errors: one tree, the builtin that each resembles, their fields, lists that stay short."""

from __future__ import annotations

import inspect
import pickle

import pytest

from lightning_memload import errors
from lightning_memload.errors import CheckpointReadError, ChecksumError, MemloadError, UnsafeGlobalsError, listed

CLASSES = [
    value for value in vars(errors).values() if inspect.isclass(value) and issubclass(value, MemloadError)
]  # fmt: skip


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_an_error_is_what_it_resembles(kind: type[MemloadError]) -> None:
    """Code that catches the errors of plain Python goes on to work."""
    resembled = next(base for base in kind.__mro__ if base.__module__ != errors.__name__)
    assert kind is MemloadError or resembled is not Exception
    assert inspect.getdoc(kind)


def test_values_are_fields() -> None:
    error = ChecksumError("damaged", path="a", key="b", offset=3, expected=1, actual=2)
    assert (error.path, error.key, error.offset, error.expected, error.actual) == ("a", "b", 3, 1, 2)
    assert isinstance(error, MemloadError)


def test_an_error_of_reading_is_an_os_error_with_its_number() -> None:
    error = CheckpointReadError("short", path="a", key=None, offset=0, errno=5)
    assert isinstance(error, OSError)
    assert error.errno == 5
    assert str(error) == "short"


def test_refused_classes_resemble_the_error_of_pickle() -> None:
    assert issubclass(UnsafeGlobalsError, pickle.UnpicklingError)


@pytest.mark.parametrize(
    ("count", "text"), [(0, ""), (1, "0"), (3, "0, 1, 2"), (4, "0, 1, 2, and 1 more"), (90, "0, 1, 2, and 87 more")]
)
def test_a_list_is_cut_and_counted(count: int, text: str) -> None:
    assert listed(range(count), most=3) == text


def test_a_list_has_the_separator_that_is_asked_for() -> None:
    assert listed("abc", separator="; ", most=2) == "a; b; and 1 more"
