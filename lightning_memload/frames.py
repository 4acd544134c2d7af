"""The functions that a thread is running. Some facts follow only from them: whether an optimizer's step is running."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

__all__ = ["callers", "outward", "owner"]


def callers() -> Iterator[FrameType]:
    """The frames of this thread, from the caller of this function outward."""
    return outward(sys._getframe(1))


def outward(frame: FrameType | None) -> Iterator[FrameType]:
    """A frame and all its callers, innermost first.

    Args:
        frame: The innermost frame, ``None`` for no frames.
    """
    while frame is not None:
        yield frame
        frame = frame.f_back


def owner(frame: FrameType) -> Any:
    """The object whose method runs in a frame: the present value of its first argument. ``None`` if it has none."""
    code = frame.f_code
    return frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
