"""``torch.save`` to a path, the one common writer that no thread of this process can make room for.

Its C++ code opens the file with the interpreter's lock held (seen with torch 2.13; so does ``torch.jit.save``, which is
not covered). While the kernel holds it for a lease, the thread that would end the lease waits for that lock, until the
kernel loses patience after 45 s and the file is cut to nothing. torch has no hook there, so the function that opens the
file is replaced for as long as somebody has to know. Saves to open files, and every other writer that was tried
(Python's own, numpy, safetensors, Lightning), release the lock.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["before_torch_save"]


def before_torch_save(action: Callable[[str | os.PathLike[str]], object]) -> Callable[[], None]:
    """Has something done whenever ``torch.save`` is about to open a path, in its thread.

    Args:
        action: Gets the path.

    Returns:
        A function that ends this.
    """
    serialization: Any = torch.serialization
    opens = getattr(serialization, "_open_zipfile_writer", None)  # so called from torch 1.6 to 2.14
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
