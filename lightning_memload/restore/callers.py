"""Finds the caller of a function of torch, and keeps functions out of ``torch.compile``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from lightning_memload.frames import outward

__all__ = ["calling_frame", "untraced"]

_T = TypeVar("_T")
# Not functools.cache: torch.compile warns of it (torch 2.13).
_UNTRACED: dict[Any, Any] = {}


def untraced(call: Callable[..., _T]) -> Callable[..., _T]:
    """The same function, which ``torch.compile`` runs and does not compile."""
    if "torch._dynamo.eval_frame" not in sys.modules:
        return call  # Without torch.compile in use there is nothing to prevent, and its import takes 2 s.
    if call not in _UNTRACED:
        _UNTRACED[call] = torch.compiler.disable(call)
    disabled: Callable[..., _T] = _UNTRACED[call]
    return disabled


def calling_frame(module: str) -> Any:
    """The frame of the function that called a function of torch, and so code of a module of this package.

    Args:
        module: Name of this module.
    """
    own = (module, __name__, "torch._dynamo.")
    frames = outward(sys._getframe(1))
    return next((frame for frame in frames if not frame.f_globals["__name__"].startswith(own)), None)
