"""Tensors that wait for their values: parameters that were built under ``meta_init``, and their aliases.

Such a tensor has a shape, strides, a type and a device, but no memory. Two places see every call that gets one. Calls
from Python reach ``__torch_function__``, which knows what can be answered without values (:mod:`questions`). All other
calls, those from C++ too, reach ``__torch_dispatch__``, below autograd. Both make the values that are needed, so every
call gives the result that it gives for an ordinary parameter.

A tensor that gets its values becomes an ordinary tensor and stays the same object. If other code refers to it at that
moment, it is a :class:`FilledParameter` or :class:`FilledAlias` until this is possible.
"""

from __future__ import annotations

import copy
import sys
import threading
import warnings
from collections.abc import Callable, Collection
from typing import Any, TypeVar

import torch
from torch import nn

from lightning_memload.restore import questions
from lightning_memload.restore.allocation import (
    FutureMemory,
    empty_on,
    is_free,
    set_in_place,
    stand_in,
    with_other_memory,
    without_memory,
)
from lightning_memload.restore.callers import calling_frame, untraced
from lightning_memload.restore.operations import OperationKind, kind_of_call, tensors_in
from lightning_memload.restore.recording import unrecorded
from lightning_memload.restore.tape import Recipe, undisturbed
from lightning_memload.torch_private import IS_COMPATIBLE, make_subclass, without_overrides, without_torch_dispatch

__all__ = [
    "OWN_ATTRIBUTES",
    "FilledAlias",
    "FilledParameter",
    "WaitingAlias",
    "WaitingParameter",
    "give_memory",
    "settle",
]

_T = TypeVar("_T")
_Tensor = TypeVar("_Tensor", bound=torch.Tensor)
# Attributes of waiting tensors that ordinary tensors do not have.
OWN_ATTRIBUTES = ("waits_for", "memory", "is_data")
_LOCK = threading.RLock()
_DEVICE = torch.ops.prim.device.default


class _Seen(torch.Tensor):
    """The two places that see every call."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs a call from Python, after making the values that it needs."""
        return untraced(_on_call)(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs an operation, after making the values unless it only allocates memory."""
        return untraced(_on_operation)(func, args, kwargs or {})

    def as_subclass(self, cls: type[torch.Tensor]) -> Any:
        """Makes the values first: torch gives the result of an operation that Python code ran no other class."""
        ordinary = _with_values(self, lambda: torch.Tensor.view_as(self, self) if isinstance(self, _FILLED) else self)
        return torch.Tensor.as_subclass(ordinary, cls)

    @property
    def _is_param(self) -> bool:
        return isinstance(self, FilledParameter)

    @_is_param.setter
    def _is_param(self, value: bool) -> None:
        """Becomes a parameter: ``nn.Parameter(tensor)`` sets this attribute on another alias of the same memory."""
        if isinstance(self, _WAITING):
            made = sys._getframe(1).f_locals.get("cls", nn.Parameter)
            values = _memory_of(self).make()
            with without_overrides():
                torch.utils.swap_tensors(self, make_subclass(made, values, self.requires_grad))


class WaitingParameter(_Seen, nn.Parameter):
    """A parameter without memory that gets memory and values at the first call that needs them.

    It then becomes an ordinary parameter. Before that, its module can be copied and sent to other processes.

    Attributes:
        waits_for: The recipe of its values.
    """

    waits_for: Recipe

    @staticmethod
    def of(recipe: Recipe, requires_grad: bool) -> WaitingParameter:
        """Makes a parameter that waits for these values."""
        parameter = without_memory(WaitingParameter, recipe.view, requires_grad)
        parameter.waits_for = recipe
        return parameter

    def follow(
        self, name: str = "a parameter", device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        """Makes the values, and becomes an ordinary parameter.

        Args:
            name: Name of the parameter in messages.
            device: Device of the values. ``None``: the device on which the constructor made the parameter.
            dtype: Type of a floating-point parameter. ``None``: its present type.

        Peak memory: the values, and twice that if device, type or strides differ from those of the recipe.
        """
        with _LOCK, unrecorded(), undisturbed():
            if type(self) is not WaitingParameter:
                return  # Another thread that runs the same module has made the values.
            values = self.waits_for.make()
            target = dtype if dtype is not None and self.is_floating_point() else self.dtype
            device = values.device if device is None else device
            if (values.device, values.dtype, values.stride()) != (device, target, self.stride()):
                values = empty_on(self, device, dtype).copy_(values)
            self.take_memory(values)

    def take_memory(self, new: torch.Tensor) -> None:
        """Becomes an ordinary parameter in other memory, in place of the values of the recipe."""
        with _LOCK:
            memory: FutureMemory | None = vars(self).get("memory")
            _become_ordinary(self, new.data)  # .data has a version of its own: 0, as that of this parameter.
            if memory is not None:
                with without_overrides():
                    memory.parameter, memory.values = None, self.detach()

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        # As in torch: a copy does not get the attributes of the parameter, but a pickle does.
        if id(self) not in memo:
            memo[id(self)] = WaitingParameter.of(self.waits_for, self.requires_grad)
        copied: nn.Parameter = memo[id(self)]
        return copied

    def __copy__(self) -> Any:
        return _with_values(self, lambda: copy.copy(self))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _with_values(self, lambda: self.__reduce_ex__(protocol))


class WaitingAlias(_Seen):
    """The result of ``detach()``, ``data`` or a conversion of a waiting parameter, in a state dict for example.

    Attributes:
        memory: The future memory, which other aliases and the parameter may share.
        waits_for: The recipe of the values of the parameter.
        is_data: Whether changes of its values leave the version of the parameter alone, as with ``data``.
    """

    memory: FutureMemory
    waits_for: Recipe
    is_data: bool

    @staticmethod
    def of(memory: FutureMemory, recipe: Recipe, *, is_data: bool = False) -> WaitingAlias:
        """Makes an alias of memory, which is viewed as ``recipe.view`` says."""
        alias = without_memory(WaitingAlias, recipe.view, False)
        vars(alias).update(memory=memory, waits_for=recipe, is_data=is_data)
        return alias

    def follow(self) -> None:
        """Becomes an ordinary tensor: an alias of the parameter, which gets its values, or a tensor of its own."""
        with _LOCK, unrecorded(), undisturbed():
            if type(self) is WaitingAlias:
                values = self.memory.make()
                self.take_memory(values.data if self.is_data else values.detach())

    def take_memory(self, new: torch.Tensor) -> None:
        """Becomes an ordinary tensor in this memory."""
        _become_ordinary(self, new)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _with_values(self, lambda: self.__reduce_ex__(protocol))

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return _with_values(self, lambda: self.__deepcopy__(memo))


class _Filled(_Seen):
    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        if id(self) not in memo:
            memo[id(self)] = _ordinary_alias(self).__deepcopy__(memo)
        copied: torch.Tensor = memo[id(self)]
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _ordinary_alias(self).__reduce_ex__(protocol)


class FilledParameter(_Filled, nn.Parameter):
    """A parameter with values that other code referred to when it got them. It becomes an ordinary one when it can."""


class FilledAlias(_Filled):
    """An alias with values that other code referred to when it got them. It becomes an ordinary one when it can."""


_WAITING = (WaitingParameter, WaitingAlias)
_FILLED = (FilledParameter, FilledAlias)


def settle(tensor: torch.Tensor) -> None:
    """Turns a filled tensor into an ordinary one, if other code refers to it no more. Others are left alone."""
    with _LOCK, without_overrides():
        if isinstance(tensor, _FILLED) and is_free(tensor):
            torch.utils.swap_tensors(tensor, _ordinary_alias(tensor))


def give_memory(parameter: WaitingParameter) -> None:
    """Turns a waiting parameter into an ordinary one, with memory but without values, which are about to be written."""
    with unrecorded(), undisturbed():
        parameter.take_memory(empty_on(parameter, parameter.waits_for.contents.device, None))


# Calls from Python ----------------------------------------------------------------------------------------------------


def _on_call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if [*map(type, args)] == [WaitingParameter] and func in questions.WITHOUT_VALUES and not kwargs:
        with without_overrides():  # the most frequent case: a restore asks ten such questions
            return func(*args)
    caller = calling_frame(__name__)
    # nn.Parameter(...) detaches its argument, and refuses results of another class.
    is_made = caller is not None and caller.f_code is nn.Parameter.__new__.__code__
    tensors = tensors_in((args, kwargs))
    for tensor in tensors:
        if isinstance(tensor, WaitingAlias) and tensor.memory.values is not None and not is_made:
            tensor.follow()  # The values have been made since the alias was made.
    waiting = [tensor for tensor in tensors if isinstance(tensor, _WAITING)]
    if func in questions.WITHOUT_VALUES or not waiting:
        return _run(func, args, kwargs, is_made)
    first = args[0] if args and isinstance(args[0], _WAITING) else None
    if func == questions.IS_META:
        return caller.f_globals is not nn.init.__dict__  # torch.nn.init leaves tensors on meta alone.
    if first is not None:
        result = _answer(func, first, args[1:], kwargs, is_made)
        if result is not None:
            return result
        if func == questions.SET_DATA and isinstance(first, WaitingParameter):
            return _set_data(first, args[1])
    if func in questions.LIKE_FIRST or (func in questions.LIKE_OTHERS and first is None):
        args = tuple(stand_in(value, _device_of(value)) if isinstance(value, _WAITING) else value for value in args)
    waiting = [tensor for tensor in tensors_in((args, kwargs)) if isinstance(tensor, _WAITING)]
    if waiting:
        _follow_all(waiting)
    return _run(func, args, kwargs, is_made)


def _answer(
    func: Any, first: WaitingParameter | WaitingAlias, rest: tuple[Any, ...], kwargs: dict[str, Any], is_made: bool
) -> Any:
    """The result of a method of a waiting tensor; ``None`` if the call has to run."""
    if func in questions.ABOUT_DEVICE:
        return func(torch.empty(0, device=first.waits_for.contents.device))
    if func in (questions.DETACH, questions.DATA):
        if is_made and isinstance(first, WaitingParameter):
            alias = WaitingParameter.of(first.waits_for, False)
            vars(alias)["memory"] = _memory_of(first)
            return alias
        return WaitingAlias.of(_memory_of(first), first.waits_for, is_data=func == questions.DATA)
    is_only = not any(isinstance(tensor, _WAITING) for tensor in tensors_in((rest, kwargs)))
    if func in questions.CONVERSIONS and is_only:
        result = questions.converted(func, first, first.waits_for, rest, kwargs)
        if isinstance(result, Recipe):
            return first if result is first.waits_for else WaitingAlias.of(FutureMemory(None, result), result)
        return result
    if func is torch.Tensor.copy_ and is_only and rest and questions.is_copyable(first, rest[0]):
        _give_memory_to(first)  # and the copy then overwrites all of it
    return None


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], is_made: bool) -> Any:
    if func not in questions.WITHOUT_VALUES:
        for tensor in tensors_in((args, kwargs)):
            settle(tensor)
    with without_overrides():
        if func in questions.ON_ORDINARY and isinstance(args[0], _FILLED):
            args = (_ordinary_alias(args[0]), *args[1:])
        result = func(*args, **kwargs)
        if is_made and func is questions.DETACH and isinstance(args[0], _FILLED):
            return make_subclass(type(args[0]), result)
        return result


def _follow_all(waiting: Collection[torch.Tensor]) -> None:
    warnings.warn(
        "A parameter that was built under meta_init is used before a checkpoint is restored. It gets the initial "
        "values that its constructor made, in memory.",
        stacklevel=5,
    )
    for tensor in waiting:
        if isinstance(tensor, _WAITING):  # An earlier follow() may have changed its class.
            tensor.follow()


def _set_data(parameter: WaitingParameter, new: torch.Tensor) -> None:
    """Runs ``parameter.data = new``: aliases keep the old memory, and the parameter shares the new memory."""
    memory = _memory_of(new) if isinstance(new, _WAITING) else None
    if memory is not None and memory is vars(parameter).get("memory"):
        return
    if memory is not None and memory.parameter is not None:
        _follow_all([new])
    elif memory is None and new.is_meta:
        parameter.follow()
        parameter.data = new
        return
    with _LOCK:
        if "memory" in vars(parameter):
            old: FutureMemory = vars(parameter).pop("memory")
            old.parameter, old.recipe = None, parameter.waits_for
        if not isinstance(new, _WAITING) or memory is None or memory.recipe is None:
            with without_overrides():
                parameter.take_memory(new.detach())
            return
        vars(parameter).update(waits_for=memory.recipe, memory=memory)
        memory.parameter, memory.recipe = parameter, None
        set_in_place(parameter, without_memory(WaitingAlias, parameter.waits_for.view, False))


def _give_memory_to(target: WaitingParameter | WaitingAlias) -> None:
    """Gives a tensor that is about to be overwritten memory without values, if a parameter has this memory."""
    parameter = target.memory.parameter if isinstance(target, WaitingAlias) else target
    if type(parameter) is WaitingParameter:
        give_memory(parameter)
        if isinstance(target, WaitingAlias):
            target.follow()  # into that memory


# Operations -----------------------------------------------------------------------------------------------------------


def _on_operation(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if operator is _DEVICE:
        return _device_of(args[0])
    if operator is IS_COMPATIBLE and "_is_set" in vars(args[0]):
        return True
    waiting = [tensor for tensor in tensors_in((args, kwargs)) if isinstance(tensor, _WAITING)]
    if waiting and kind_of_call(operator, args, kwargs) in (OperationKind.EMPTY, OperationKind.FILLED):
        args = tuple(stand_in(value, _device_of(value)) if isinstance(value, _WAITING) else value for value in args)
    elif waiting:
        _follow_all(waiting)
    with without_torch_dispatch(), without_overrides():
        return operator(*args, **kwargs)


def _device_of(tensor: torch.Tensor) -> torch.device:
    if isinstance(tensor, _WAITING) and "_is_set" not in vars(tensor):
        return tensor.waits_for.contents.device
    with without_overrides():
        return tensor.untyped_storage().device


def _memory_of(tensor: WaitingParameter | WaitingAlias) -> FutureMemory:
    if isinstance(tensor, WaitingAlias):
        return tensor.memory
    memory: FutureMemory = vars(tensor).setdefault("memory", FutureMemory(tensor, None))
    return memory


def _with_values(tensor: torch.Tensor, call: Callable[[], _T]) -> _T:
    """Calls a method of an ordinary tensor on a waiting one."""
    if isinstance(tensor, _WAITING):
        _follow_all([tensor])
    return call()


def _become_ordinary(tensor: WaitingParameter | WaitingAlias, new: torch.Tensor) -> None:
    with without_overrides():
        others = {key: value for key, value in vars(tensor).items() if key not in OWN_ATTRIBUTES}
        if is_free(tensor):
            ordinary = with_other_memory(tensor, new)
            torch.utils.swap_tensors(tensor, ordinary)
        else:
            set_in_place(tensor, new)
            tensor.__class__ = FilledParameter if isinstance(tensor, WaitingParameter) else FilledAlias  # type: ignore
        vars(tensor).clear()
        vars(tensor).update(others)


def _ordinary_alias(tensor: torch.Tensor) -> torch.Tensor:
    """An ordinary tensor in the memory of a filled one."""
    with without_overrides():
        return with_other_memory(tensor, tensor.detach())
