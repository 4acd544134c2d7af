"""Tells which tests are unit tests: those that start neither a process nor a Trainer.

They are not marked. What a test calls is read from its code, and from the code of its fixtures, of its cases and of the
functions of ``tests`` that these call. Where that overlooks something, :func:`no_process` makes the test fail.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest

__all__ = ["is_unit_test", "no_process"]

# What has one of these names starts a process, or trains. A benchmark does.
_HEAVY = {
    "Popen", "ProcessPoolExecutor", "Trainer", "check_call", "check_output", "fork", "get_context",
    "import_benchmark", "measure_import", "run_fresh", "run_pages", "run_program", "spawn", "subprocess", "system",
}  # fmt: skip


def is_unit_test(item: pytest.Item) -> bool:
    """Whether a test, its fixtures and its cases start no process and no Trainer."""
    if not isinstance(item, pytest.Function):
        return False
    if any(item.get_closest_marker(marker) for marker in ("gpu", "memory", "cgroup", "slow")):
        return False
    if _HEAVY & {*item.fixturenames}:
        return False
    fixtures = [fixture.func for fixtures in item._fixtureinfo.name2fixturedefs.values() for fixture in fixtures]
    cases = list(item.callspec.params.values()) if hasattr(item, "callspec") else []
    return not any(map(_is_heavy, [item.function, *fixtures, *cases]))


def _is_heavy(value: Any) -> bool:
    return any(name in _HEAVY for function in _called(value) for name in _names(function.__code__))


def _called(value: Any) -> Iterator[types.FunctionType]:
    """The functions of ``tests`` that a value is or calls, directly and indirectly."""
    found: set[types.FunctionType] = set()
    waiting = list(_functions(value))
    while waiting:
        function = waiting.pop()
        if function in found or not _is_of_tests(function):
            continue
        found.add(function)
        yield function
        for name in _names(function.__code__):
            waiting += _functions(function.__globals__.get(name))


def _functions(value: Any) -> Iterator[types.FunctionType]:
    value = inspect.unwrap(value.func if isinstance(value, functools.partial) else value)
    if isinstance(value, types.FunctionType):
        yield value
    elif isinstance(value, type):
        yield from (member for member in vars(value).values() if isinstance(member, types.FunctionType))
    elif _is_of_tests(type(value)):
        yield from _functions(type(value))
        for field in vars(value).values() if hasattr(value, "__dict__") else ():
            if isinstance(field, types.FunctionType):
                yield field


def _is_of_tests(thing: Any) -> bool:
    return str(thing.__module__).partition(".")[0] == "tests"


@functools.cache
def _names(code: types.CodeType) -> frozenset[str]:
    inner = [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return frozenset({*code.co_names, *code.co_freevars}.union(*map(_names, inner)))


# Not os.system: pickles call it to show that they could, and its shell takes a millisecond.
_EVENTS = {"os.fork", "os.forkpty", "os.posix_spawn", "subprocess.Popen"}


class _Guard:
    """Refuses processes while it is on. Python cannot remove such a hook again."""

    is_installed = is_on = False

    @classmethod
    def hook(cls, event: str, arguments: tuple[Any, ...]) -> None:
        if cls.is_on and event in _EVENTS:
            raise AssertionError(f"{event} in a unit test: name what starts the process in _HEAVY of tests/unit.py")


@contextlib.contextmanager
def no_process() -> Iterator[None]:
    """Makes each start of a process an error, for a ``with`` block."""
    if not _Guard.is_installed:
        sys.addaudithook(_Guard.hook)
        _Guard.is_installed = True
    _Guard.is_on = True
    try:
        yield
    finally:
        _Guard.is_on = False
