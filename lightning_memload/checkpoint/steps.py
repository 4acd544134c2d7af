"""Whether an optimizer is changing weights in some thread right now.

Pages under tensors are exchanged for a copy of them, and what is written in between would be lost. Whoever does that in
a thread of its own waits here for a moment in which no optimizer writes. Other code that changes weights in place is
not known; such a write is lost only if it meets the few milliseconds in which its very pages are copied.
"""

from __future__ import annotations

import functools
import sys
import threading
import time
from types import CodeType, FrameType
from typing import Any

import torch

__all__ = ["wait_for_steps"]

_POLL_SECONDS = 0.001


def wait_for_steps(deadline: float) -> None:
    """Returns when no other thread is changing weights in an optimizer's step.

    Its closure does not count: forward and backward only read weights, and Lightning runs them there.

    Args:
        deadline: When to return in any case, on the clock of ``time.monotonic``.
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
    frame: FrameType | None = innermost
    while frame is not None:
        code = frame.f_code
        if code.co_name == "step" and code.co_argcount:
            names = frame.f_locals
            if isinstance(names.get(code.co_varnames[0]), torch.optim.Optimizer):
                return _code_of(names.get("closure")) not in within
        within.add(code)
        frame = frame.f_back
    return False


def _code_of(function: Any) -> CodeType | None:
    """The code that a call of something runs, ``None`` if it is not Python's."""
    while isinstance(function, functools.partial):
        function = function.func
    code = getattr(function, "__code__", None)
    if code is None and callable(function):
        code = getattr(type(function).__call__, "__code__", None)
    return code if isinstance(code, CodeType) else None
