"""The walk through the calls of a thread."""

from __future__ import annotations

import sys

from lightning_memload.frames import callers, outward, owner


class Outer:
    def call(self, *words: str) -> list[str]:
        return inner(*words)


def inner(*words: str) -> list[str]:
    return [frame.f_code.co_name for frame in callers()]


def test_callers_begin_with_the_caller() -> None:
    assert Outer().call()[:3] == ["inner", "call", "test_callers_begin_with_the_caller"]


def test_callers_do_not_depend_on_the_place_of_the_iteration() -> None:
    walk = callers()
    assert next(frame.f_code.co_name for frame in walk) == "test_callers_do_not_depend_on_the_place_of_the_iteration"


def test_outward_ends_with_the_outermost() -> None:
    walk = list(outward(sys._getframe()))
    assert walk[0] is sys._getframe()
    assert walk[-1].f_back is None
    assert list(outward(None)) == []


def test_the_owner_is_the_first_argument() -> None:
    class Named:
        def method(this, other: int) -> object:
            return owner(sys._getframe())

    def function(*words: str) -> object:
        return owner(sys._getframe())

    named = Named()
    assert named.method(1) is named
    assert function("word") is None
