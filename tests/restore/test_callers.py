"""The caller of a function of torch, and functions that torch.compile does not compile."""

from __future__ import annotations

import sys
from types import FunctionType
from typing import Any

import pytest
import torch

from lightning_memload.restore import callers
from lightning_memload.restore.callers import calling_frame, untraced


def as_if_in(module: str, function: FunctionType) -> Any:
    """The function with the name of another module."""
    return FunctionType(function.__code__, {**function.__globals__, "__name__": module}, function.__name__)


def test_frames_of_the_package_and_of_dynamo_are_skipped() -> None:
    def ask() -> Any:
        return calling_frame("package.waiting")

    def call(function: Any) -> Any:
        return function()

    inner = as_if_in("package.waiting", ask)  # type: ignore[arg-type]
    frame = as_if_in("torch._dynamo.eval_frame", call)(inner)  # type: ignore[arg-type]
    assert frame.f_code.co_name == "test_frames_of_the_package_and_of_dynamo_are_skipped"


def test_without_compilation_a_function_is_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch._dynamo.eval_frame", raising=False)
    assert untraced(len) is len


def test_with_compilation_a_function_is_disabled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch._dynamo.eval_frame", sys)
    monkeypatch.setattr(callers, "_UNTRACED", {})
    disabled: list[Any] = []
    monkeypatch.setattr(torch.compiler, "disable", lambda call: disabled.append(call) or (lambda: "untraced"))
    assert untraced(len)() == untraced(len)() == "untraced"
    assert disabled == [len]
