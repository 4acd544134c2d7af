"""The ``state`` of an optimizer whose values are still on their way: every look at it waits for them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

__all__ = ["WaitingStates"]

# What makes an object, and what does not look at its entries.
_OWN = {"__class_getitem__", "__doc__", "__getattribute__", "__hash__", "__init__", "__missing__", "__new__"}
_OWN |= {"__sizeof__", "default_factory", "fromkeys"}


class WaitingStates(defaultdict[Any, Any]):
    """Stands in for ``optimizer.state``. The first use, of any kind and by any code, waits.

    All uses reach the dict that torch made, so code that keeps this object sees the same entries as the optimizer.
    A copy, also a pickled one, is an ordinary ``defaultdict``.

    Args:
        states: The dict that torch made.
        wait: Waits for all values. It may raise.

    Attributes:
        unfilled: The dict that torch made. Its tensors may lack their values.
    """

    def __init__(self, states: defaultdict[Any, Any], wait: Callable[[], object]) -> None:
        super().__init__(states.default_factory)
        self.unfilled = states
        self._wait = wait

    def __bool__(self) -> bool:
        return len(self) > 0


def _waiting(name: str) -> Callable[..., Any]:
    def method(self: WaitingStates, *args: Any, **kwargs: Any) -> Any:
        self._wait()
        return getattr(self.unfilled, name)(*args, **kwargs)

    method.__name__ = name
    return method


# All methods of a dict, so that none of a later Python is forgotten.
for _name in {**vars(dict), **vars(defaultdict)}.keys() - _OWN:
    setattr(WaitingStates, _name, _waiting(_name))
