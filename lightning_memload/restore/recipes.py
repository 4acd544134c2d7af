"""The recipes of parameters on meta: how to make their initial values if no checkpoint fills them.

``meta_init`` turns such a parameter into a :class:`WaitingParameter`: the same object, on meta, with the recipe of its
values. It makes the values when they are needed. A restore fills it with other values, and it becomes an ordinary
parameter again.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from lightning_memload.checkpoint import span_bytes
from lightning_memload.restore.allocation import SharedMemory, empty_on, replace_data
from lightning_memload.restore.operations import tensors_in
from lightning_memload.restore.recording import unrecorded
from lightning_memload.restore.tape import Contents, Own, Read, Step, holds_data

__all__ = [
    "WaitingParameter",
    "fill_before_load",
    "follow_recipes",
    "let_wait",
    "names_of_data",
    "remove_load_hooks",
]


def _getters(*names: str) -> set[Any]:
    return {getattr(torch.Tensor, name).__get__ for name in names if hasattr(torch.Tensor, name)}


def _methods(*names: str) -> set[Any]:
    return {getattr(torch.Tensor, name) for name in names if hasattr(torch.Tensor, name)}


# Methods and attributes of a parameter that do not need its values.
_WITHOUT_VALUES = _getters(
    "_backward_hooks", "_base", "_grad", "_post_accumulate_grad_hooks", "_version", "device", "dtype", "grad",
    "grad_fn", "is_cpu", "is_cuda", "is_leaf", "is_meta", "is_mkldnn", "is_mps", "is_nested", "is_quantized",
    "is_sparse", "is_sparse_csr", "is_xpu", "itemsize", "layout", "name", "names", "nbytes", "ndim", "output_nr",
    "requires_grad", "retains_grad", "shape", "volatile",
) | _methods(
    "__hash__", "__len__", "_is_view", "dim", "element_size", "get_device", "is_complex", "is_conj", "is_contiguous",
    "is_floating_point", "is_inference", "is_neg", "is_signed", "ndimension", "nelement", "numel",
    "register_hook", "register_post_accumulate_grad_hook", "requires_grad_", "size", "storage_offset", "stride",
) | {
    getattr(torch.Tensor, name).__set__
    for name in ("_backward_hooks", "_post_accumulate_grad_hooks", "grad", "requires_grad")
}  # fmt: skip
# Conversions that work on meta, unless they go to another device.
_CONVERSIONS = _methods("bfloat16", "double", "float", "half", "to", "type")
_ALIASES = {torch.Tensor.detach, torch.Tensor.data.__get__}  # type: ignore[attr-defined]
_SET_DATA = torch.Tensor.data.__set__  # type: ignore[attr-defined]


def _call_when_ready(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Runs a call, after making the values that it needs. Questions about shape and type need none."""
    makes_parameter = _makes_parameter()
    for tensor in tensors_in((args, kwargs)):
        if isinstance(tensor, WaitingAlias) and tensor.memory.values is not None and not makes_parameter:
            tensor.follow()  # The values have been made since the alias was made.
    waiting = [tensor for tensor in tensors_in((args, kwargs)) if isinstance(tensor, (WaitingParameter, WaitingAlias))]
    with torch._C.DisableTorchFunctionSubclass():
        if func in _WITHOUT_VALUES:
            return func(*args, **kwargs)
        # to_empty() asks this. Memory on any device may replace a waiting tensor.
        if func is torch._has_compatible_shallow_copy_type:
            return func(*(_in_memory(tensor) for tensor in args))
        if func is torch.empty_like and kwargs.get("device") is not None:
            return func(*args, **kwargs)
        if func in _ALIASES and waiting and not (isinstance(args[0], WaitingParameter) and makes_parameter):
            return WaitingAlias.of(args[0].data, _memory_of(args[0]))
        if func in _CONVERSIONS and isinstance(args[0], (WaitingParameter, WaitingAlias)):
            try:
                result = func(*args, **kwargs)
                if not isinstance(result, torch.Tensor) or isinstance(result, (WaitingParameter, WaitingAlias)):
                    return result
                return WaitingAlias.of(result, SharedMemory(None, _converted(_read_of(args[0]), result)))
            except NotImplementedError:
                pass  # a conversion to another device
    if func == _SET_DATA and isinstance(args[0], WaitingParameter):
        return _set_data(args[0], args[1])
    if waiting and not (func is torch.Tensor.copy_ and len(waiting) == 1 and _is_overwritten(*args[:1])):
        _follow_all(waiting)
    with torch._C.DisableTorchFunctionSubclass():
        result = func(*args, **kwargs)
        return nn.Parameter(result, requires_grad=False) if waiting and makes_parameter else result


def _follow_all(waiting: Collection[WaitingParameter | WaitingAlias]) -> None:
    warnings.warn(
        "A parameter that was built under meta_init is used before a checkpoint is restored. It gets the initial "
        "values that its constructor made, in memory.",
        stacklevel=4,
    )
    for tensor in waiting:
        if isinstance(tensor, (WaitingParameter, WaitingAlias)):  # an earlier follow() may have changed its class
            tensor.follow()


def _set_data(parameter: WaitingParameter, new: torch.Tensor) -> None:
    """Runs ``parameter.data = new``: aliases keep the old memory, and the parameter shares the new memory."""
    memory = _memory_of(new) if isinstance(new, (WaitingParameter, WaitingAlias)) else None
    if memory is not None and memory is _memory_of(parameter):
        return
    if memory is not None and memory.parameter is not None:
        _follow_all([new])  # type: ignore[list-item]
    if "memory" in vars(parameter):
        old: SharedMemory = vars(parameter).pop("memory")
        old.parameter, old.read = None, parameter.waits_for
    with torch._C.DisableTorchFunctionSubclass():
        if not new.is_meta:
            replace_data(parameter, new.detach(), name="a parameter")
            return
        if memory is not None and memory.read is not None:
            vars(parameter).update(waits_for=memory.read, memory=memory)
            memory.parameter, memory.read = parameter, None
        _SET_DATA(parameter, new)


def _makes_parameter() -> bool:
    """Whether the caller is ``nn.Parameter(...)``: it detaches its argument, and refuses results of another class."""
    # Frames in between: _call_when_ready, __torch_function__.
    return sys._getframe(3).f_code is nn.Parameter.__new__.__code__


def _in_memory(tensor: torch.Tensor) -> torch.Tensor:
    """An empty tensor on the device on which the constructor made a waiting parameter; other tensors unchanged."""
    if not isinstance(tensor, (WaitingParameter, WaitingAlias)):
        return tensor
    return torch.empty(0, dtype=tensor.dtype, device=_read_of(tensor).contents.device)


def _is_overwritten(target: torch.Tensor) -> bool:
    """Gives a tensor that is about to be overwritten memory without values. Returns whether this was possible."""
    parameter = target.memory.parameter if isinstance(target, WaitingAlias) else target
    if type(parameter) is not WaitingParameter:
        return False
    _give_memory(parameter, "a parameter")
    if isinstance(target, WaitingAlias):
        target.follow()  # into that memory
    return True


def _give_memory(parameter: WaitingParameter, name: str) -> None:
    with unrecorded(), torch.inference_mode(False):
        replace_data(parameter, empty_on(parameter, parameter.waits_for.contents.device, None), name=name)


def _memory_of(tensor: WaitingParameter | WaitingAlias) -> SharedMemory:
    if isinstance(tensor, WaitingAlias):
        return tensor.memory
    memory: SharedMemory = vars(tensor).setdefault("memory", SharedMemory(tensor, None))
    return memory


def _read_of(tensor: WaitingParameter | WaitingAlias) -> Read:
    if isinstance(tensor, WaitingAlias) and tensor.memory.read is not None:
        return tensor.memory.read
    parameter = tensor.memory.parameter if isinstance(tensor, WaitingAlias) else tensor
    assert parameter is not None
    return parameter.waits_for


def _converted(read: Read, like: torch.Tensor) -> Read:
    """The same values in the type and with the strides of a tensor on meta."""
    view = Own(like.dtype, tuple(like.shape), like.stride(), 0)
    step = Step("aten._to_copy.default", (read,), {"dtype": like.dtype}, None, view)
    return Read(Contents(span_bytes(like), read.contents.device, step), view)


class WaitingAlias(torch.Tensor):
    """The result of ``detach()``, ``data`` or a conversion of a waiting parameter, in a state dict for example.

    Attributes:
        memory: The future memory, which other aliases and the parameter may share.
    """

    memory: SharedMemory

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """See :meth:`WaitingParameter.__torch_function__`."""
        return _call_when_ready(func, args, kwargs or {})

    @classmethod
    def of(cls, tensor: torch.Tensor, memory: SharedMemory) -> torch.Tensor:
        """Turns a tensor on meta into an alias."""
        tensor.__class__ = cls
        vars(tensor)["memory"] = memory
        return tensor

    def follow(self) -> None:
        """Becomes an ordinary tensor: an alias of the parameter, which gets its values, or a tensor of its own."""
        values = self.memory.make().detach()
        with torch._C.DisableTorchFunctionSubclass():
            torch.utils.swap_tensors(self, values)

    @property
    def _is_param(self) -> bool:
        return False

    @_is_param.setter
    def _is_param(self, value: bool) -> None:
        """Becomes a parameter: ``nn.Parameter(alias)`` sets this attribute on another alias of the same memory."""
        with torch._C.DisableTorchFunctionSubclass():
            requires_grad = self.requires_grad
        _follow_all([self])
        with torch._C.DisableTorchFunctionSubclass():
            torch.utils.swap_tensors(self, nn.Parameter(self.detach(), requires_grad=requires_grad))

    def __reduce_ex__(self, protocol: Any) -> Any:
        self.follow()
        return self.__reduce_ex__(protocol)  # the method of an ordinary tensor now

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        self.follow()
        return self.__deepcopy__(memo)  # the method of an ordinary tensor now


class WaitingParameter(nn.Parameter):
    """A parameter on meta that gets memory and values at the first call that needs them.

    It then becomes an ordinary parameter. Before that, its module can be copied, pickled and sent to other processes.

    Attributes:
        waits_for: The recipe of its values.
    """

    waits_for: Read

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs a call, after making the values unless the call only asks about shape and type."""
        return _call_when_ready(func, args, kwargs or {})

    def follow(
        self, name: str = "a parameter", device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        """Makes the values, and becomes an ordinary parameter.

        Args:
            name: Name of the parameter in messages.
            device: Device of the values. ``None``: the device on which the constructor made the parameter.
            dtype: Type of a floating-point parameter. ``None``: its present type.

        Raises:
            MetaTensorError: The parameter cannot get memory, since a reference to it forbids that.

        Peak memory: the values, and twice that if device, type or strides differ from those of the recipe.
        """
        with unrecorded(), torch.no_grad(), torch.inference_mode(False):
            values = self.waits_for.make()
            target = dtype if dtype is not None and self.is_floating_point() else self.dtype
            device = values.device if device is None else device
            if (values.device, values.dtype, values.stride()) != (device, target, self.stride()):
                values = empty_on(self, device, dtype).copy_(values)
            replace_data(self, values, name=name)

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        # As in torch: a copy does not get the attributes of the parameter, but a pickle does.
        if id(self) not in memo:
            attributes = {"waits_for": self.waits_for}
            memo[id(self)] = _rebuild(tuple(self.shape), self.stride(), self.dtype, self.requires_grad, attributes)
        copy: nn.Parameter = memo[id(self)]
        return copy

    def __reduce_ex__(self, protocol: Any) -> Any:
        attributes = {key: value for key, value in vars(self).items() if key != "memory"}
        return _rebuild, (tuple(self.shape), self.stride(), self.dtype, self.requires_grad, attributes)


def _rebuild(
    size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype, requires_grad: bool, attributes: dict[str, Any]
) -> nn.Parameter:
    empty = torch.empty_strided(size, stride, dtype=dtype, device="meta")
    parameter = nn.Parameter(empty, requires_grad=requires_grad)
    parameter.__class__ = WaitingParameter
    vars(parameter).update(attributes)
    return parameter


def let_wait(parameter: nn.Parameter, modules: Collection[nn.Module], read: Read) -> None:
    """Moves a parameter to meta and turns it into a :class:`WaitingParameter`. It stays the same object.

    Args:
        parameter: The parameter.
        modules: The modules that have it.
        read: The recipe of its values.

    Raises:
        MetaTensorError: A reference to the parameter would forbid to give it memory later. It is unchanged.
    """
    view = read.view
    empty = torch.empty_strided(view.size, view.stride, dtype=view.dtype, device="meta")
    replace_data(parameter, empty, name="")
    parameter.__class__ = WaitingParameter
    vars(parameter)["waits_for"] = read
    for module in modules:
        if not any(_is_ours(hook) for hook in module._load_state_dict_pre_hooks.values()):
            module.register_load_state_dict_pre_hook(fill_before_load)


def fill_before_load(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *_: Any
) -> None:
    """The load_state_dict pre-hook of a module with waiting parameters. torch cannot copy into tensors on meta.

    A parameter gets memory if the state dict has a value for it, and the values of its constructor if not.
    """
    for name, parameter in module._parameters.items():
        if type(parameter) is WaitingParameter:
            value = state_dict.get(f"{prefix}{name}")
            if isinstance(value, (WaitingParameter, WaitingAlias)):
                value.follow()  # The value may come from state_dict() of the same module.
            if not isinstance(parameter, WaitingParameter):
                continue
            if not isinstance(value, torch.Tensor) or value.shape != parameter.shape:
                parameter.follow(f"{prefix}{name}")
            elif not local_metadata.get("assign_to_params_buffers", False):
                _give_memory(parameter, f"{prefix}{name}")


def remove_load_hooks(root: nn.Module) -> None:
    """Removes the hooks from modules without waiting parameters. A copied module has no handles for that."""
    for module in root.modules():
        hooks = module._load_state_dict_pre_hooks  # torch (2.13) has no public name for this dict.
        ours = [key for key, hook in hooks.items() if _is_ours(hook)]
        if ours and not any(type(parameter) is WaitingParameter for parameter in module._parameters.values()):
            for key in ours:
                del hooks[key]


def follow_recipes(
    root: nn.Module,
    names: Collection[str] | None = None,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Gives waiting parameters the values that their constructors made, one parameter after the other.

    Args:
        root: The module.
        names: Names of the parameters. ``None``: all parameters.
        device: Device of the values. ``None``: the device on which the constructor made each parameter.
        dtype: Type of floating-point parameters. ``None``: their present type.

    Raises:
        MetaTensorError: A parameter cannot get memory, since a reference to it forbids that.

    Peak memory: the values, and one parameter twice if device, type or strides differ from those of its recipe.
    """
    for name, parameter in root.named_parameters(remove_duplicate=False):
        if type(parameter) is WaitingParameter and (names is None or name in names):
            parameter.follow(name, device, dtype)
    for _, buffer in root.named_buffers():
        if isinstance(buffer, WaitingAlias):
            buffer.follow()
    remove_load_hooks(root)


def names_of_data(root: nn.Module) -> list[str]:
    """Names of the waiting parameters whose recipe contains data that a constructor loaded, not only initialisers."""
    return [
        name
        for name, parameter in root.named_parameters(remove_duplicate=False)
        if type(parameter) is WaitingParameter and holds_data(parameter.waits_for.contents)
    ]


def _is_ours(hook: Any) -> bool:
    return getattr(hook, "hook", hook) is fill_before_load  # torch wraps each pre-hook.
