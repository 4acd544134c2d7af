"""Waits until no thread is modifying weights in an optimizer step.

:meth:`FileMapping.detach` replaces the pages under tensors by copies. A write between copying and replacing would be
lost, so a background thread that detaches waits here first. Other code that modifies weights in place is not detected;
its write is lost only if it hits the pages that are copied in these few milliseconds.
"""

from __future__ import annotations

import functools
import sys
import threading
import time
from types import CodeType, FrameType
from typing import Any

import torch

from lightning_memload.frames import outward, owner

__all__ = ["wait_for_steps"]

_POLL_SECONDS = 0.001


def wait_for_steps(deadline: float) -> None:
    """Blocks until no other thread is modifying weights in an optimizer's step.

    The closure of a step does not count: Lightning runs forward and backward there, and these only read weights.

    Args:
        deadline: The latest time to return, on the clock of ``time.monotonic``.
    """
    own = threading.get_ident()
    while time.monotonic() < deadline:
        frames = sys._current_frames()
        frames.pop(own, None)
        if not any(_is_changing_weights(frame) for frame in frames.values()):
            return
        frames.clear()
        time.sleep(_POLL_SECONDS)


def _is_changing_weights(innermost: FrameType) -> bool:
    within: set[CodeType] = set()
    for frame in outward(innermost):
        if frame.f_code.co_name == "step" and isinstance(owner(frame), torch.optim.Optimizer):
            return _code_of(frame.f_locals.get("closure")) not in within
        within.add(frame.f_code)
    return False


def _code_of(function: Any) -> CodeType | None:
    """The code object that a call of ``function`` runs. ``None`` if it is not a Python function."""
    while isinstance(function, functools.partial):
        function = function.func
    code = getattr(function, "__code__", None)
    if code is None and callable(function):
        code = getattr(type(function).__call__, "__code__", None)
    return code if isinstance(code, CodeType) else None
