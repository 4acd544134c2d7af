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
import functools
import sys
import threading
import warnings
from collections.abc import Callable, Collection
from multiprocessing.reduction import ForkingPickler
from typing import Any, TypeVar

import torch
from torch import nn

from lightning_memload.checkpoint import span_bytes
from lightning_memload.restore.allocation import SharedMemory, empty_on, is_free, with_other_memory
from lightning_memload.restore.operations import Kind, kind_of_call, tensors_in
from lightning_memload.restore.questions import (
    ABOUT_DEVICE,
    CONVERSIONS,
    DATA,
    DETACH,
    IS_META,
    LIKE_FIRST,
    LIKE_OTHERS,
    ON_ORDINARY,
    SET_DATA,
    WITHOUT_VALUES,
    is_copyable,
    names_meta,
)
from lightning_memload.restore.recording import unrecorded
from lightning_memload.restore.tape import Contents, Own, Read, Step, undisturbed

__all__ = ["FilledAlias", "FilledParameter", "WaitingAlias", "WaitingParameter", "give_memory", "settle"]

_T = TypeVar("_T")
_Tensor = TypeVar("_Tensor", bound=torch.Tensor)
# Attributes of waiting tensors that ordinary tensors do not have.
_OWN = ("waits_for", "memory", "is_data")
# Two threads that run one module need its values at once.
_LOCK = threading.RLock()
_IS_COMPATIBLE = torch.ops.aten._has_compatible_shallow_copy_type.default
_DEVICE = torch.ops.prim.device.default


class _Seen(torch.Tensor):
    """The two places that see every call."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs a call from Python, after making the values that it needs."""
        return _untraced(_on_call)(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs an operation, after making the values unless it only allocates memory."""
        return _untraced(_on_operation)(func, args, kwargs or {})

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
            with torch._C.DisableTorchFunctionSubclass():
                torch.utils.swap_tensors(self, torch.Tensor._make_subclass(made, values, self.requires_grad))


def _untraced(call: Callable[..., _T]) -> Callable[..., _T]:
    """The same function, which ``torch.compile`` runs and does not compile."""
    # Without torch.compile in use there is nothing to prevent, and its import takes 2 s.
    return _disabled(call) if "torch._dynamo.eval_frame" in sys.modules else call


@functools.cache
def _disabled(call: Callable[..., _T]) -> Callable[..., _T]:
    return torch.compiler.disable(call)  # type: ignore[no-any-return]


class WaitingParameter(_Seen, nn.Parameter):
    """A parameter without memory that gets memory and values at the first call that needs them.

    It then becomes an ordinary parameter. Before that, its module can be copied and sent to other processes.

    Attributes:
        waits_for: The recipe of its values.
    """

    waits_for: Read

    @staticmethod
    def of(read: Read, requires_grad: bool) -> WaitingParameter:
        """Makes a parameter that waits for these values."""
        parameter = _without_memory(WaitingParameter, read, requires_grad)
        parameter.waits_for = read
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
                return  # another thread has made the values
            values = self.waits_for.make()
            target = dtype if dtype is not None and self.is_floating_point() else self.dtype
            device = values.device if device is None else device
            if (values.device, values.dtype, values.stride()) != (device, target, self.stride()):
                values = empty_on(self, device, dtype).copy_(values)
            self.take_memory(values)

    def take_memory(self, new: torch.Tensor) -> None:
        """Becomes an ordinary parameter in other memory, in place of the values of the recipe."""
        with _LOCK:
            memory: SharedMemory | None = vars(self).get("memory")
            _become_ordinary(self, new.data)  # .data has a version of its own: 0, as that of this parameter.
            if memory is not None:
                with torch._C.DisableTorchFunctionSubclass():
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

    memory: SharedMemory
    waits_for: Read
    is_data: bool

    @staticmethod
    def of(memory: SharedMemory, read: Read, *, is_data: bool = False) -> WaitingAlias:
        """Makes an alias of memory, which is read as ``read.view`` says."""
        alias = _without_memory(WaitingAlias, read, False)
        vars(alias).update(memory=memory, waits_for=read, is_data=is_data)
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


class FilledParameter(_Seen, nn.Parameter):
    """A parameter with values that other code referred to when it got them. It becomes an ordinary one when it can."""

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        if id(self) not in memo:
            memo[id(self)] = _ordinary_alias(self).__deepcopy__(memo)
        copied: nn.Parameter = memo[id(self)]
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _ordinary_alias(self).__reduce_ex__(protocol)


class FilledAlias(_Seen):
    """An alias with values that other code referred to when it got them. It becomes an ordinary one when it can."""

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        if id(self) not in memo:
            memo[id(self)] = _ordinary_alias(self).__deepcopy__(memo)
        copied: torch.Tensor = memo[id(self)]
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _ordinary_alias(self).__reduce_ex__(protocol)


def _recipe_of(parameter: WaitingParameter) -> tuple[Any, ...]:
    attributes = {key: value for key, value in vars(parameter).items() if key not in _OWN}
    return _with_recipe, (parameter.waits_for, parameter.requires_grad, attributes)


def _with_recipe(read: Read, requires_grad: bool, attributes: dict[str, Any]) -> WaitingParameter:
    parameter = WaitingParameter.of(read, requires_grad)
    vars(parameter).update(attributes)
    return parameter


# Another process gets the recipe. A file gets the values: it must be readable without this package.
ForkingPickler.register(WaitingParameter, _recipe_of)

_WAITING = (WaitingParameter, WaitingAlias)
_FILLED = (FilledParameter, FilledAlias)


def settle(tensor: torch.Tensor) -> None:
    """Turns a filled tensor into an ordinary one, if other code refers to it no more. Others are left alone."""
    with _LOCK, torch._C.DisableTorchFunctionSubclass():
        if isinstance(tensor, _FILLED) and is_free(tensor):
            torch.utils.swap_tensors(tensor, _ordinary_alias(tensor))


def give_memory(parameter: WaitingParameter) -> None:
    """Turns a waiting parameter into an ordinary one, with memory but without values, which are about to be written."""
    with unrecorded(), undisturbed():
        parameter.take_memory(empty_on(parameter, parameter.waits_for.contents.device, None))


# Calls from Python ----------------------------------------------------------------------------------------------------


def _on_call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    # nn.Parameter(...) detaches its argument, and refuses results of another class.
    caller = _caller()
    is_made = caller is not None and caller.f_code is nn.Parameter.__new__.__code__
    tensors = tensors_in((args, kwargs))
    for tensor in tensors:
        if isinstance(tensor, WaitingAlias) and tensor.memory.values is not None and not is_made:
            tensor.follow()  # The values have been made since the alias was made.
    waiting = [tensor for tensor in tensors if isinstance(tensor, _WAITING)]
    first = args[0] if args else None
    if func in WITHOUT_VALUES or not waiting:
        return _run(func, args, kwargs, is_made)
    if isinstance(first, _WAITING):
        if func in ABOUT_DEVICE:
            return func(torch.empty(0, device=first.waits_for.contents.device))
        if func == IS_META:
            return caller.f_globals is not nn.init.__dict__  # torch.nn.init leaves tensors on meta alone.
        if func in (DETACH, DATA):
            if is_made and isinstance(first, WaitingParameter):
                return _with_recipe(first.waits_for, False, {"memory": _memory_of(first)})
            return WaitingAlias.of(_memory_of(first), first.waits_for, is_data=func == DATA)
        if func in CONVERSIONS and len(waiting) == 1:
            converted = _converted(func, first, args[1:], kwargs)
            if converted is not None:
                return converted
        if func == SET_DATA and isinstance(first, WaitingParameter):
            return _set_data(first, args[1])
        if func is torch.Tensor.copy_ and len(waiting) == 1 and is_copyable(*args[:2]) and _is_overwritten(first):
            return _run(func, args, kwargs, is_made)
    if func in LIKE_FIRST or (func in LIKE_OTHERS and not isinstance(first, _WAITING)):
        args = tuple(_stand_in(value) if isinstance(value, _WAITING) else value for value in args)
        if not any(isinstance(tensor, _WAITING) for tensor in tensors_in((args, kwargs))):
            return _run(func, args, kwargs, is_made)
    _follow_all(waiting)
    return _run(func, args, kwargs, is_made)


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], is_made: bool) -> Any:
    if func not in WITHOUT_VALUES:
        for tensor in tensors_in((args, kwargs)):
            settle(tensor)
    with torch._C.DisableTorchFunctionSubclass():
        if func in ON_ORDINARY and isinstance(args[0], _FILLED):
            args = (_ordinary_alias(args[0]), *args[1:])
        result = func(*args, **kwargs)
        if is_made and func is DETACH and isinstance(args[0], _FILLED):
            return torch.Tensor._make_subclass(type(args[0]), result)
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


def _caller() -> Any:
    """The frame of the function that called a function of torch with a waiting tensor."""
    frame: Any = sys._getframe(2)  # Frames in between: _on_call, __torch_function__, those of _untraced.
    while frame is not None and frame.f_globals["__name__"].startswith((__name__, "torch._dynamo.")):
        frame = frame.f_back
    return frame


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
            old: SharedMemory = vars(parameter).pop("memory")
            old.parameter, old.read = None, parameter.waits_for
        if not isinstance(new, _WAITING) or memory is None or memory.read is None:
            with torch._C.DisableTorchFunctionSubclass():
                parameter.take_memory(new.detach())
            return
        vars(parameter).update(waits_for=memory.read, memory=memory)
        memory.parameter, memory.read = parameter, None
        _set_in_place(parameter, _without_memory(WaitingAlias, parameter.waits_for, False))


def _is_overwritten(target: WaitingParameter | WaitingAlias) -> bool:
    """Gives a tensor that is about to be overwritten memory without values. Returns whether this was possible."""
    parameter = target.memory.parameter if isinstance(target, WaitingAlias) else target
    if type(parameter) is not WaitingParameter:
        return False
    give_memory(parameter)
    if isinstance(target, WaitingAlias):
        target.follow()  # into that memory
    return True


def _converted(
    func: Any, tensor: WaitingParameter | WaitingAlias, rest: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """The result of a conversion to another type; ``None`` if it needs values."""
    if tensor.requires_grad and torch.is_grad_enabled():
        return None  # The result is part of a graph.
    shape = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    try:
        result = func(shape, *rest, **kwargs)
    except NotImplementedError:
        return None  # a conversion to another device
    if not isinstance(result, torch.Tensor):
        return None
    if names_meta((rest, kwargs)) or not result.is_meta:
        return result if result.is_meta else None
    if result is shape:
        return tensor
    read = tensor.waits_for
    view = Own(result.dtype, tuple(result.shape), result.stride(), 0)
    step = Step("aten._to_copy.default", (read,), {"dtype": result.dtype}, None, view)
    read = Read(Contents(span_bytes(result), read.contents.device, step), view)
    return WaitingAlias.of(SharedMemory(None, read), read)


# Operations -----------------------------------------------------------------------------------------------------------


def _on_operation(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if operator is _DEVICE:
        return _device_of(args[0])
    if operator is _IS_COMPATIBLE and "_is_set" in vars(args[0]):
        return True
    waiting = [tensor for tensor in tensors_in((args, kwargs)) if isinstance(tensor, _WAITING)]
    if waiting and kind_of_call(operator, args, kwargs) in (Kind.EMPTY, Kind.FILLED):
        args = tuple(_stand_in(value) if isinstance(value, _WAITING) else value for value in args)
    elif waiting:
        _follow_all(waiting)
    with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunctionSubclass():
        return operator(*args, **kwargs)


def _stand_in(tensor: WaitingParameter | WaitingAlias) -> torch.Tensor:
    """Memory without values, which is read like a waiting tensor. It costs nothing but on another device."""
    if _device_of(tensor).type != "cpu":
        return tensor
    with unrecorded(), undisturbed(), torch._C.DisableTorchFunctionSubclass():
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")


def _device_of(tensor: torch.Tensor) -> torch.device:
    if isinstance(tensor, _WAITING) and "_is_set" not in vars(tensor):
        return tensor.waits_for.contents.device
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.untyped_storage().device


# Memory ---------------------------------------------------------------------------------------------------------------


def _memory_of(tensor: WaitingParameter | WaitingAlias) -> SharedMemory:
    if isinstance(tensor, WaitingAlias):
        return tensor.memory
    memory: SharedMemory = vars(tensor).setdefault("memory", SharedMemory(tensor, None))
    return memory


def _without_memory(kind: type[_Tensor], read: Read, requires_grad: bool) -> _Tensor:
    view = read.view
    # On meta, torch refuses to share its memory with an ordinary tensor: it has none. It tells the device of its future
    # memory (prim.device), so that a gradient on that device fits.
    return torch.Tensor._make_wrapper_subclass(
        kind, view.size, strides=view.stride, storage_offset=view.offset, dtype=view.dtype,
        device=torch.device("meta"), requires_grad=requires_grad, dispatch_device=True,
    )  # fmt: skip


def _with_values(tensor: torch.Tensor, call: Callable[[], _T]) -> _T:
    """Calls a method of an ordinary tensor on a waiting one."""
    if isinstance(tensor, _WAITING):
        _follow_all([tensor])
    return call()


def _become_ordinary(tensor: WaitingParameter | WaitingAlias, new: torch.Tensor) -> None:
    with torch._C.DisableTorchFunctionSubclass():
        others = {key: value for key, value in vars(tensor).items() if key not in _OWN}
        if is_free(tensor):
            ordinary = with_other_memory(tensor, new)
            torch.utils.swap_tensors(tensor, ordinary)
        else:
            _set_in_place(tensor, new)
            filled: Any = FilledParameter if isinstance(tensor, WaitingParameter) else FilledAlias
            tensor.__class__ = filled
        vars(tensor).clear()
        vars(tensor).update(others)


def _set_in_place(tensor: torch.Tensor, new: torch.Tensor) -> None:
    # torch asks whether this is possible from meta. Below autograd the question arrives in _on_operation.
    with torch._C.DisableTorchFunctionSubclass(), torch._C._AutoDispatchBelowAutograd():
        vars(tensor)["_is_set"] = True
        tensor.data = new
        del vars(tensor)["_is_set"]


def _ordinary_alias(tensor: torch.Tensor) -> torch.Tensor:
    """An ordinary tensor in the memory of a filled one."""
    with torch._C.DisableTorchFunctionSubclass():
        return with_other_memory(tensor, tensor.detach())
