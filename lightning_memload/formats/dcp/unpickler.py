"""Unpickles the ``.metadata`` of a distributed checkpoint into inert records. No code of the file runs.

``torch.distributed.checkpoint`` pickles instances of its own classes. Here each becomes an :class:`InertObject`, which
keeps arguments and state and has no behaviour. Any class or function from elsewhere is refused.
"""

from __future__ import annotations

import io
import reprlib
from typing import Any

import torch

from lightning_memload.pickles.structure import InertUnpickler

__all__ = ["ForeignGlobal", "InertObject", "MetadataUnpickler"]

# Modules of the classes that torch's own planners and writers pickle.
_RECORD_MODULES = ("torch.distributed", "torch.serialization", "pathlib")


class ForeignGlobal(Exception):
    """The pickle names a class or function that such a file never holds."""


class InertObject:
    """Stands for an instance of any class that the pickle names: holds its arguments and state, has no behaviour."""

    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any) -> InertObject:
        """Keeps the arguments."""
        self = super().__new__(cls)
        self.args, self.state = args, None
        return self

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state


class MetadataUnpickler(InertUnpickler):
    """Builds inert records, dicts, shapes and dtypes, and nothing else.

    Args:
        data: The pickle.
    """

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data))
        self._classes: dict[tuple[str, str], type[InertObject]] = {}

    def find_class(self, module: str, name: str) -> Any:
        """A placeholder for a class or function.

        Raises:
            ForeignGlobal: ``torch.distributed.checkpoint`` does not write this name.
        """
        if (module, name) == ("torch", "Size"):
            return tuple
        # Not getattr: torch imports some of its modules on attribute access.
        if module == "torch" and isinstance(vars(torch).get(name), torch.dtype):
            return vars(torch)[name]
        if (module, name) in (("collections", "OrderedDict"), ("builtins", "dict")):
            return dict
        if not any(module == known or module.startswith(f"{known}.") for known in _RECORD_MODULES):
            raise ForeignGlobal(f"{reprlib.repr(module)}.{reprlib.repr(name)}".replace("'", ""))
        if (module, name) not in self._classes:
            self._classes[module, name] = type(name, (InertObject,), {})
        return self._classes[module, name]

    def persistent_load(self, saved_id: Any) -> Any:
        """Refuses a reference to an object outside the pickle.

        Raises:
            ForeignGlobal: Always.
        """
        raise ForeignGlobal(f"an object outside itself, {reprlib.repr(saved_id)}")
