"""Finds the classes of a checkpoint that ``weights_only`` refuses, explains the refusal, and allows names of the user.

Only torch decides: the names in a file are passed to ``torch.serialization.get_unsafe_globals_in_checkpoint``, and
allowed names to ``torch.serialization.safe_globals``, for one load. A name that only a file contains is never imported.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import pickle
import re
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from lightning_memload.checkpoint.index import Checkpoint, PickledGlobal
from lightning_memload.errors import UnsafeGlobalsError
from lightning_memload.units import counted

__all__ = ["SafeGlobal", "allow_globals", "check_safe_globals", "explain_refusal", "refused_globals"]

# A class or function, its dotted name, or a pair of an object and its name in the file, as in torch.
SafeGlobal = str | type | Callable[..., Any] | tuple[Callable[..., Any], str]

# The end of the message of torch's unpickler (2.6 to 2.13) for an object that an allowed function returned.
_OF_CLASS = re.compile(r"but got <class '([\w.<>]+)'>")
# Modules of which torch (2.6 to 2.13) refuses all names, even allowed ones.
_NEVER = frozenset(("sys", "os", "posix", "nt"))
_NAME = re.compile(r"[^\n\r]+")


def refused_globals(found: Sequence[PickledGlobal]) -> tuple[PickledGlobal, ...]:
    """The names that ``torch.load(weights_only=True)`` refuses at this moment, according to torch."""
    askable = [item for item in found if _NAME.fullmatch(item.module) and _NAME.fullmatch(item.qualname)]
    lines = [f"c{item.module}\n{item.qualname}\n".encode(errors="replace") for item in askable]
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("names/data.pkl", b"\x80\x02" + b"".join(lines) + b".")
        file.writestr("names/version", "3\n")
    archive.seek(0)
    refused = set(torch.serialization.get_unsafe_globals_in_checkpoint(archive)) if lines else set()
    asked = set(map(id, askable))
    return tuple(item for item in found if id(item) not in asked or item.name in refused)


def check_safe_globals(safe_globals: Sequence[SafeGlobal]) -> tuple[tuple[Any, str], ...]:
    """The classes and functions that a user allows, each with its full name in files. Imports those given by name.

    Raises:
        ValueError: A name cannot be imported.
        TypeError: ``safe_globals`` is not a sequence of classes, functions and names.
    """
    if isinstance(safe_globals, str) or not isinstance(safe_globals, Sequence):
        raise TypeError(f"safe_globals must be a list of classes or of their names, got {safe_globals!r}.")
    allowed = []
    for item in safe_globals:
        if isinstance(item, str):
            allowed.append((_import(item), item))
        elif isinstance(item, tuple) and len(item) == 2 and isinstance(item[1], str):
            allowed.append(item)
        elif hasattr(item, "__module__") and hasattr(item, "__qualname__"):
            allowed.append((item, f"{item.__module__}.{item.__qualname__}"))
        else:
            raise TypeError(f"safe_globals must list classes, functions or their dotted names, got {item!r}.")
    return tuple(allowed)


@contextlib.contextmanager
def allow_globals(safe_globals: Sequence[SafeGlobal]) -> Iterator[None]:
    """A context in which ``weights_only`` also allows some classes and functions.

    Works like ``torch.serialization.safe_globals``.

    Raises:
        ValueError: See :func:`check_safe_globals`.
        TypeError: See :func:`check_safe_globals`.
    """
    allowed = check_safe_globals(safe_globals)
    # The exit of torch's context (2.13) removes its names even if they were allowed before, so those are not passed.
    before: list[Any] = torch.serialization.get_safe_globals()
    named = {item[1] if isinstance(item, tuple) else f"{item.__module__}.{item.__qualname__}" for item in before}
    with torch.serialization.safe_globals([item for item in allowed if item[1] not in named]):
        yield


def explain_refusal(index: Checkpoint, error: pickle.UnpicklingError) -> pickle.UnpicklingError:
    """Makes a more helpful error from an error of ``torch.load(weights_only=True)``.

    Returns:
        An error that names every refused class and gives advice. The given error if no class is refused, for example
        for a pickle protocol that torch does not read.
    """
    refused = list(refused_globals(index.globals))
    made = _OF_CLASS.search(str(error))
    if made is not None and "<locals>" not in made[1]:
        module, _, name = made[1].rpartition(".")
        if made[1] not in {item.name for item in refused} and not _is_safe(PickledGlobal(module, name, None)):
            refused.append(PickledGlobal(module or "builtins", name, None))
    if not refused:
        return error
    found = [f"  {item.name}, at {item.place}" for item in refused]
    lines = [
        f"{index.path} holds objects of {counted(len(refused), 'class', 'classes')} that torch refuses under "
        "weights_only=True:",
        *found,
    ]
    unbuildable = [item.name for item in refused if not item.is_buildable or item.module in _NEVER]
    if unbuildable:
        lines.append(
            f"torch cannot build {', '.join(unbuildable)} under weights_only=True, allowed or not. If you trust the "
            "file, load it with weights_only=False, which runs any code that it names."
        )
    else:
        lines.append(
            "If you trust these classes, allow them for this load with safe_globals= (of MemoryEfficientRestore, "
            f"load_weights, WeightsSource or load_from_checkpoint), safe_globals={[item.name for item in refused]}, or "
            "for all loads of this program with"
        )
        lines += [f"    {line}" for line in _allowing_lines(refused)]
        lines.append("weights_only=False loads the file too, and runs any code that it names.")
    return UnsafeGlobalsError(
        "\n".join(lines),
        path=index.path,
        places={item.name: item.place for item in refused},
    )


def _is_safe(item: PickledGlobal) -> bool:
    return not refused_globals([item])


def _allowing_lines(refused: Sequence[PickledGlobal]) -> list[str]:
    """Lines of Python that allow names for all later loads of a program."""
    modules = {item.module for item in refused} - {"builtins", "__builtin__", "__main__"}
    expressions = [_expression(item) for item in refused]
    imports = [f"import {module}" for module in sorted({*modules, "torch"})]
    return [*imports, f"torch.serialization.add_safe_globals([{', '.join(expressions)}])"]


def _expression(item: PickledGlobal) -> str:
    plain = item.qualname if item.module in ("builtins", "__main__") else item.name
    known = functools.reduce(
        lambda value, part: getattr(value, part, None), item.qualname.split("."), sys.modules.get(item.module)
    )
    # torch uses the name in the object's own attributes, which may differ from the name in the file.
    own = f"{getattr(known, '__module__', None)}.{getattr(known, '__qualname__', None)}"
    return plain if known is None or own == item.name else f"({plain}, {item.name!r})"


def _import(name: str) -> Any:
    """Imports the object of a dotted name. It may be nested in a class."""
    parts = name.split(".")
    reason: Exception | None = None
    for count in range(len(parts) - 1, 0, -1):
        module = ".".join(parts[:count])
        try:
            value = importlib.import_module(module)
        except ImportError as error:
            reason = reason or error
            continue
        try:
            return functools.reduce(getattr, parts[count:], value)
        except AttributeError as error:
            reason = error
            break
    raise ValueError(
        f"safe_globals: {name!r} cannot be imported ({reason or 'a module is missing before the name'}). Give the full "
        "name of a class or function, such as 'argparse.Namespace'."
    )
