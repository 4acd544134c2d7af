"""Lists the public names with their arguments and defaults.

``python -m tests.signatures`` writes the list to ``tests/signatures.txt``. The difference to the list before shows what
users of the package would notice, so each one needs a line in ``CHANGELOG.md``.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning_memload

__all__ = ["LIST", "describe"]

# Lightning and this package call their methods. Users create them.
ONLY_CREATED = {"MemoryEfficientRestore", "StreamingCheckpointIO", "WeightsSource"}

LIST = Path(__file__).with_name("signatures.txt")


def describe() -> str:
    """One line for each public function, class, method and property, sorted by name."""
    lines: list[str] = []
    for name in lightning_memload.__all__:
        value = getattr(lightning_memload, name)
        if isinstance(value, type):
            lines += [f"{name}{_arguments(value)}", *(() if name in ONLY_CREATED else _members(name, value))]
        elif callable(value):
            lines.append(f"{name}{_arguments(value)}")
    return "".join(f"{line}\n" for line in sorted(lines))


def _members(name: str, kind: type[Any]) -> Iterator[str]:
    """The public methods and properties that a class has from this package, not from the standard library."""
    own = [base for base in kind.__mro__ if base.__module__.startswith("lightning_memload.")]
    for member in {member for base in own for member in vars(base) if not member.startswith("_")}:
        value = inspect.getattr_static(kind, member)
        if isinstance(value, property):
            yield f"{name}.{member}"
        elif inspect.isfunction(value) or isinstance(value, (classmethod, staticmethod)):
            yield f"{name}.{member}{_arguments(getattr(kind, member))}"


def _arguments(value: Any) -> str:
    """The arguments without their types, which differ between versions of Python and torch."""
    try:
        signature = inspect.signature(value)
    except ValueError:
        return "(...)"  # the constructor of a builtin error
    plain = [argument.replace(annotation=inspect.Parameter.empty) for argument in signature.parameters.values()]
    return str(signature.replace(parameters=plain, return_annotation=inspect.Signature.empty))


if __name__ == "__main__":
    LIST.write_text(describe())
