"""A dict that waits: each way to look at it waits first, and reaches the entries of the dict behind it."""

from __future__ import annotations

import copy
import pickle
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest

from lightning_memload.restore.waiting_states import WaitingStates


class Waits:
    def __init__(self) -> None:
        self.number = 0

    def __call__(self) -> None:
        self.number += 1


def made() -> tuple[WaitingStates, defaultdict[Any, Any], Waits]:
    waits = Waits()
    behind: defaultdict[Any, Any] = defaultdict(dict, {"a": {"x": 1}, "b": {"y": 2}})
    return WaitingStates(behind, waits), behind, waits


LOOKS: dict[str, Callable[[Any], Any]] = {
    "item": lambda states: states["a"],
    "missing": lambda states: states["new"],
    "get": lambda states: states.get("a"),
    "contains": lambda states: ("a" in states, "c" in states),
    "len": len,
    "bool": bool,
    "list": list,
    "dict": dict,
    "unpacked": lambda states: {**states},
    "reversed": lambda states: list(reversed(states)),
    "keys": lambda states: list(states.keys()),
    "values": lambda states: list(states.values()),
    "items": lambda states: list(states.items()),
    "equal": lambda states: states == {"a": {"x": 1}, "b": {"y": 2}},
    "unequal": lambda states: states != {"a": {"x": 1}, "b": {"y": 2}},
    "equal the other way": lambda states: states == {"a": {"x": 1}, "b": {"y": 2}},
    "or": lambda states: states | {"c": 3},
    "ror": lambda states: {"c": 3} | states,
    "update of another": lambda states: _updated(states),
    "repr": repr,
    "pop": lambda states: states.pop("a"),
    "popitem": lambda states: states.popitem(),
    "setdefault": lambda states: states.setdefault("c", 5),
    "set": lambda states: states.__setitem__("c", 6),
    "delete": lambda states: states.__delitem__("a"),
    "update": lambda states: states.update(c=7),
    "clear": lambda states: states.clear(),
    "copy method": lambda states: states.copy(),
    "copy": copy.copy,
    "deep copy": copy.deepcopy,
    "pickle": lambda states: pickle.loads(pickle.dumps(states)),
}


def _updated(states: Any) -> Any:
    other: dict[str, Any] = {}
    other.update(states)
    return other


@pytest.mark.parametrize("look", LOOKS)
def test_each_look_waits_and_does_what_the_dict_does(look: str) -> None:
    states, behind, waits = made()
    _, expected_behind, _ = made()
    expected, actual = LOOKS[look](expected_behind), LOOKS[look](states)
    assert waits.number
    assert actual == expected
    assert type(actual) is type(expected)
    assert behind == expected_behind


def test_an_addition_in_place_ends_at_the_dict_behind() -> None:
    states, behind, _ = made()
    alias: Any = states
    alias |= {"c": 3}
    assert alias is behind
    assert behind["c"] == 3


@pytest.mark.parametrize("look", [look for look in LOOKS if look not in ("or", "ror")])
def test_an_error_of_the_wait_is_that_of_the_look(look: str) -> None:
    def fail() -> None:
        raise ZeroDivisionError

    states = WaitingStates(defaultdict(dict), fail)
    with pytest.raises(ZeroDivisionError):
        LOOKS[look](states)


def test_it_is_a_defaultdict() -> None:
    states, _, waits = made()
    assert isinstance(states, defaultdict)
    assert states.default_factory is dict
    assert not waits.number
