"""The two modes of torch that pass the calls of a thread to a :class:`Recorder`."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from lightning_memload.restore.operations import tensors_in
from lightning_memload.restore.recording import Recorder, set_active
from lightning_memload.torch_private import (
    TorchDispatchMode,
    current_dispatch_mode,
    is_traced_by_dispatch,
    is_traced_by_jit,
)

__all__ = ["OperationWatch"]

# Methods that read memory without the dispatcher. After those in _EXPOSING, other code may keep the address.
_EXPOSING = {
    getattr(torch.Tensor, name)
    for name in (
        "numpy", "data_ptr", "const_data_ptr", "untyped_storage", "storage", "_typed_storage", "share_memory_",
        "__array__", "__dlpack__"
    )
    if hasattr(torch.Tensor, name)
} | {torch.Tensor.__cuda_array_interface__.__get__}  # fmt: skip
_READING = {
    torch.Tensor.tolist, torch.Tensor.__reduce_ex__, torch.Tensor.__deepcopy__, torch.Tensor.__repr__,
    torch.Tensor.__format__, torch.Tensor.apply_, torch.Tensor.map_, torch.Tensor.map2_,
}  # fmt: skip
_READING_ALL = {torch.Tensor.map_, torch.Tensor.map2_}
# Functions that read the values of tensors in lists, with the modes of torch switched off.
_READING_LISTS = {
    torch.tensor, torch.as_tensor, torch.asarray, torch.Tensor.new_tensor, torch.Tensor.__getitem__,
    torch.Tensor.__setitem__,
}  # fmt: skip
_IS_META = torch.Tensor.is_meta.__get__  # type: ignore[attr-defined]
_NUMEL = torch.Tensor.numel
_ASKING = ("_no_grad_trunc_normal_", "orthogonal_")


class OperationWatch:
    """A context that passes every operation of this thread to a recorder."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._operations = _Operations(recorder)
        self._questions = _Questions(recorder, self)
        self._all, self._below = contextlib.ExitStack(), contextlib.ExitStack()

    def __enter__(self) -> None:
        set_active(self._recorder)
        self._all.callback(set_active, None)
        self._all.enter_context(self._questions)
        self._all.enter_context(self._below)
        self._below.enter_context(self._operations)

    def __exit__(self, *exception: Any) -> None:
        self._all.__exit__(*exception)

    def give_up(self, reason: str) -> None:
        """Makes all memory ordinary and stops recording. This is the last resort.

        Args:
            reason: The reason for the warning to the user.
        """
        self._recorder.give_up(reason)
        if current_dispatch_mode() is self._operations:
            self._below.close()


class _Operations(TorchDispatchMode):
    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Otherwise torch (2.6 to 2.14) imports all of torch._dynamo, and sympy, at the first call: 2 s.
        return False

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._recorder = recorder

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        recorder = self._recorder
        if recorder.is_paused:
            return func(*args, **(kwargs or {}))
        recorder.is_paused = True
        try:
            if is_traced_by_dispatch():  # torch must not see the operations of the recorder.
                return recorder.run(func, args, kwargs or {})
            return recorder.on_operation(func, args, kwargs or {})
        finally:
            recorder.is_paused = False


class _Questions(TorchFunctionMode):
    def __init__(self, recorder: Recorder, watch: OperationWatch) -> None:
        super().__init__()
        self._recorder = recorder
        self._watch = watch

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not self._recorder.is_paused:
            known = self._prepare(func, args, kwargs)
            if known is not None:
                return known
        # The only place that calls: torch.jit.trace compares the places of its calls.
        return func(*args, **kwargs)

    def _prepare(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Makes what a call reads. Returns the answer to a question of ``torch.nn.init``; ``None`` for other calls."""
        recorder = self._recorder
        if func in _EXPOSING or func in _READING:
            name = "__cuda_array_interface__" if func.__name__ == "__get__" else func.__name__
            with recorder.paused():
                for tensor in tensors_in(args if func in _READING_ALL else args[:1]):
                    recorder.expose(tensor, f"{name}() reads its memory")
        elif func in _READING_LISTS:
            with recorder.paused():
                for tensor in _in_lists(func, args, kwargs):
                    recorder.expose(tensor, f"{func.__name__}() reads its value")
        elif func in (_IS_META, _NUMEL):
            # Initialisers that draw until all values are valid, or decompose a matrix, need values. Each first asks
            # whether there is anything to do: is_meta (torch 2.13), numel() (orthogonal_, since torch 1.0).
            frame = sys._getframe(2)
            if frame.f_globals is nn.init.__dict__ and frame.f_code.co_name in _ASKING:
                with recorder.paused():
                    is_recorded = recorder.on_initialiser(args[0], frame)
                if is_recorded:
                    return True if func == _IS_META else 0
        if is_traced_by_jit():
            # torch.jit.trace records operations itself, and fails under modes of the dispatcher (torch 2.13).
            self._watch.give_up("torch.jit.trace() is used")
        return None


def _in_lists(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """The tensors that a function reads out of lists. A tuple of tensors is no list where it is an index."""
    is_index = func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__)
    values = [*args, *kwargs.values(), *(args[1] if is_index and isinstance(args[1], tuple) else ())]
    return tensors_in([value for value in values if isinstance(value, list if is_index else (list, tuple))])
