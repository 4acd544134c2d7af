"""Errors: one tree, the builtin that each resembles, their fields, lists that stay short."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from typing import Any

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


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda error: pickle.loads(pickle.dumps(error))])
@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_an_error_passes_from_process_to_process(kind: type[MemloadError], again: Callable[[Any], Any]) -> None:
    parameters = inspect.signature(kind.__init__).parameters.values()
    keywords = {p.name: f"some {p.name}" for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "places"}
    if kind is UnsafeGlobalsError:
        keywords["places"] = {"module.Class": "hyper_parameters.optimizer"}  # type: ignore[assignment]
    error = kind("what failed", **keywords)
    error.intact_sibling = "epoch=1.ckpt"
    twin = again(error)
    assert type(twin) is kind
    assert (str(twin), twin.args, twin.intact_sibling) == (str(error), error.args, "epoch=1.ckpt")
    for name in keywords:
        assert getattr(twin, name) == getattr(error, name) == keywords[name]


def test_refused_classes_resemble_the_error_of_pickle() -> None:
    assert issubclass(UnsafeGlobalsError, pickle.UnpicklingError)


@pytest.mark.parametrize(
    ("count", "text"), [(0, ""), (1, "0"), (3, "0, 1, 2"), (4, "0, 1, 2, and 1 more"), (90, "0, 1, 2, and 87 more")]
)
def test_a_list_is_cut_and_counted(count: int, text: str) -> None:
    assert listed(range(count), most=3) == text


def test_a_list_has_the_separator_that_is_asked_for() -> None:
    assert listed("abc", separator="; ", most=2) == "a; b; and 1 more"
