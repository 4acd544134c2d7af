"""Calls an action before ``torch.save`` opens a path, because a lease on that file would block the process otherwise.

The C++ code of ``torch.save`` opens the file while it holds the interpreter's lock (seen with torch 2.13; also in
``torch.jit.save``, which is not covered here). If there is a lease on the file, the kernel blocks that open, and the
thread that would end the lease waits for the interpreter's lock. After 45 s the kernel gives up and truncates the file.
torch has no hook there, so the function that opens the file is replaced while a lease exists. Saves to open files, and
all other writers that were tested (Python's own, numpy, safetensors, Lightning), release the lock.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["before_torch_save"]


def before_torch_save(action: Callable[[str | os.PathLike[str]], object]) -> Callable[[], None]:
    """Calls an action before every ``torch.save`` to a path, in the thread of the save.

    Args:
        action: Called with the path.

    Returns:
        A function that undoes this.
    """
    serialization: Any = torch.serialization
    opens = getattr(serialization, "_open_zipfile_writer", None)  # its name from torch 1.6 to 2.14
    if opens is None:
        return lambda: None

    @functools.wraps(opens)
    def opens_later(name_or_buffer: Any) -> Any:
        if isinstance(name_or_buffer, (str, os.PathLike)):
            action(name_or_buffer)
        return opens(name_or_buffer)

    def undo() -> None:
        if serialization._open_zipfile_writer is opens_later:
            serialization._open_zipfile_writer = opens

    serialization._open_zipfile_writer = opens_later
    return undo
