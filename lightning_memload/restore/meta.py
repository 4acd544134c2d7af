"""Building a module without memory for its parameters.

``torch.device("meta")`` as a context empties every tensor, non-persistent buffers too, which no checkpoint holds. Here
only parameters go to meta, one by one as they are registered (torch's public registration hook), so buffers keep their
values; and initialisation of meta parameters is skipped, which is where building a large model spends its time.

What a constructor does with a parameter beyond initialising it either works without values (shapes, copies, views,
conversions, further parameters made of it), or ends in an error that names the parameter. Nothing is made up.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.overrides import TorchFunctionMode

from lightning_memload.errors import MetaTensorError, listed
from lightning_memload.restore.allocation import replace_data

__all__ = ["meta_init"]

_P = ParamSpec("_P")
_T = TypeVar("_T")


class meta_init:
    """Within, modules are built with their parameters on the meta device: no memory, no initialisation.

    Buffers are built as always. Parameter objects, ties between them, ``requires_grad`` and attributes set on them are
    kept. The parameters get memory and values when a checkpoint is restored into the module. Affects the current thread
    only.

    A constructor may ask for shapes, convert, copy or combine its parameters, even run a forward to learn a shape. One
    that needs the *value* of a parameter cannot be served: a number (``.item()``), a condition, an array, a buffer that
    no checkpoint holds. In a ``with`` block that raises; a block cannot be run twice. Name the class in ``exclude``, or
    use ``meta_init`` as a decorator, which does that by itself: it warns, and runs the function again.

    Recurrent layers (``torch.nn.RNNBase``), lazy parameters and subclasses of ``Parameter`` are built as always. The
    random number generator advances less than in an ordinary construction, since initialisation is skipped.

    Args:
        enabled: ``False`` makes the context do nothing, for scripts that decide at run time.
        exclude: Module classes to build as always, with everything their ``__init__`` builds; one, or several.

    Raises:
        MetaTensorError: A value was needed. Names the parameter, and the class to exclude.
        TypeError: Something in ``exclude`` is no class.

    Example:
        >>> with meta_init():
        ...     model = LitGPT(config)
        >>> trainer.fit(model, ckpt_path="last.ckpt")
    """

    def __init__(self, enabled: bool = True, *, exclude: type[nn.Module] | Iterable[type[nn.Module]] = ()) -> None:
        self._enabled = enabled
        self._exclude = (exclude,) if isinstance(exclude, type) else tuple(exclude)
        for excluded in self._exclude:
            if not isinstance(excluded, type):
                raise TypeError(f"meta_init(exclude=...) takes module classes, got {excluded!r}.")
        self._entered: list[contextlib.ExitStack] = []

    def __enter__(self) -> None:
        stack = contextlib.ExitStack()
        if self._enabled:
            stack.enter_context(_construct_on_meta(_Construction(self._exclude)))
        self._entered.append(stack)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        return self._entered.pop().__exit__(kind, error, traceback)

    def __call__(self, build: Callable[_P, _T]) -> Callable[_P, _T]:
        """The function that builds on meta what it can, and the rest as always.

        Args:
            build: Is run again when a class turns out to need values.
        """

        @functools.wraps(build)
        def built(*args: _P.args, **kwargs: _P.kwargs) -> _T:
            if not self._enabled:
                return build(*args, **kwargs)
            exclude = self._exclude
            reasons: list[str] = []
            while True:
                construction = _Construction(exclude)
                try:
                    with _construct_on_meta(construction):
                        result = build(*args, **kwargs)
                    break
                except MetaTensorError as error:
                    if error.module_class is None or error.module_class in exclude:
                        raise
                    exclude = (*exclude, error.module_class)
                    needed = ", ".join(error.names) or "a tensor on meta"
                    reasons.append(f"{error.module_class.__name__} needs the value of {needed}")
                except RuntimeError as error:
                    if not construction.took_memory:
                        raise
                    # torch refuses in words of its own what cannot be done without values, and does not say to whom.
                    result = build(*args, **kwargs)
                    warnings.warn(
                        f"Built everything in memory, since under meta_init it fails: {type(error).__name__}: {error}. "
                        "The restore fills it in place, as any module.",
                        stacklevel=2,
                    )
                    return result
            if reasons:
                excluded_bytes = sum(construction.excluded_bytes.values())
                warnings.warn(
                    f"Built {excluded_bytes / 2**20:.1f} MiB of parameters in memory despite meta_init: "
                    f"{'; '.join(reasons)}. The restore fills them in place, as in any module.",
                    stacklevel=2,
                )
            return result

        return built


class _Active(threading.local):
    """The constructions that are going on in this thread, the innermost last."""

    def __init__(self) -> None:
        self.constructions: list[_Construction] = []


_ACTIVE = _Active()
_HOOKS_LOCK = threading.Lock()


@functools.cache
def _install_hooks() -> None:
    """Registers the hooks, once and for good: every thread that builds a module runs through torch's dict of them."""
    register_module_parameter_registration_hook(_on_parameter)
    register_module_buffer_registration_hook(_on_part)
    register_module_module_registration_hook(_on_part)


def _on_parameter(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
    if _ACTIVE.constructions:
        _ACTIVE.constructions[-1].on_parameter(module, name, parameter)


def _on_part(module: nn.Module, name: str, part: object) -> None:
    if _ACTIVE.constructions:
        _ACTIVE.constructions[-1].on_part(module, name, part)


@contextlib.contextmanager
def _construct_on_meta(construction: _Construction) -> Iterator[None]:
    with _HOOKS_LOCK:
        _install_hooks()
    outer = _ACTIVE.constructions[-1] if _ACTIVE.constructions else None
    _ACTIVE.constructions.append(construction)
    try:
        with construction:
            yield
        construction.check()
        if outer is not None:
            outer.adopt(construction)
    finally:
        _ACTIVE.constructions.pop()
        # Weak references to a tensor forbid to give it memory later.
        construction.forget()


@dataclass(frozen=True, slots=True)
class _Origin:
    """Which parameter a tensor on meta is, or was computed from.

    Attributes:
        module_class: Class of the module it belongs to.
        name: Its name there.
        device: Where it would be.
    """

    module_class: type[nn.Module]
    name: str
    device: torch.device

    def __str__(self) -> str:
        return f"{self.module_class.__name__}.{self.name}"


# In-place operations that change what a tensor is, not what it contains.
_NOT_WRITING = {
    "as_strided_", "detach_", "rename_", "requires_grad_", "resize_", "resize_as_", "set_", "squeeze_", "swapaxes_",
    "swapdims_", "t_", "transpose_", "unsqueeze_"
}  # fmt: skip
_WRITING = {
    "__setitem__", "__iadd__", "__iand__", "__ifloordiv__", "__ilshift__", "__imod__", "__imul__", "__ior__",
    "__ipow__", "__irshift__", "__isub__", "__itruediv__", "__ixor__"
}  # fmt: skip
# What these return needs a parameter's shape only: it is as real as it always was. Not the uninitialised ones: they are
# the first step of initialisers (torch.nn.init.orthogonal_).
_LIKE = {
    "full_like", "new_full", "new_ones", "new_tensor", "new_zeros", "ones_like", "rand_like", "randint_like",
    "randn_like", "zeros_like"
}  # fmt: skip
_GET_DEVICE = torch.Tensor.device.__get__
_SET_DATA = torch.Tensor.data.__set__  # type: ignore[attr-defined]


class _Construction(TorchFunctionMode):
    """What happens to parameters, and to what is computed from them, while modules are built.

    Writing into a tensor on meta does nothing: values do not exist there, and the first use of many meta kernels
    imports half of torch (seconds, and 70 MB). What is computed from one is on meta too.

    Args:
        exclude: Module classes to build as always.
    """

    def __init__(self, exclude: tuple[type[nn.Module], ...]) -> None:
        super().__init__()
        # One within another one builds in memory what either is to.
        outer = _ACTIVE.constructions[-1]._exclude if _ACTIVE.constructions else ()
        self._exclude: tuple[type[nn.Module], ...] = (*outer, *exclude)
        self._origins: dict[int, tuple[weakref.ref[torch.Tensor], _Origin]] = {}
        self._modules: dict[int, weakref.ref[nn.Module]] = {}
        # The memory that each parameter had. A storage that is referred to weakly keeps its identity for itself.
        self._storages: dict[int, StorageWeakRef] = {}
        self._registering = False
        self.took_memory = False
        # By identity: a tied parameter is registered twice. What the excluded classes cost.
        self.excluded_bytes: dict[int, int] = {}

    def on_parameter(self, module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        """Takes a parameter its memory when it is registered. It stays the same object."""
        self.on_part(module, name, parameter)
        if type(parameter) is not nn.Parameter or self._origin(parameter) is not None:
            return
        self._registering = True
        try:
            device = torch.get_default_device() if parameter.is_meta else parameter.device
            if parameter.is_meta or self._take_memory(module, parameter):
                self._origins[id(parameter)] = (weakref.ref(parameter), _Origin(type(module), name, device))
        finally:
            self._registering = False

    def _take_memory(self, module: nn.Module, parameter: nn.Parameter) -> bool:
        # RNNBase keeps weak references to its weights (torch 2.13), which forbid to give them memory later.
        if isinstance(module, nn.RNNBase) or parameter.layout is not torch.strided or parameter.is_quantized:
            return False
        if self._exclude and (
            isinstance(module, self._exclude) or any(isinstance(m, self._exclude) for m in _under_construction())
        ):
            self.excluded_bytes[id(parameter)] = parameter.nbytes
            return False
        self._storages[id(parameter)] = StorageWeakRef(parameter.untyped_storage())
        self.took_memory = True
        empty = torch.empty_strided(parameter.shape, parameter.stride(), dtype=parameter.dtype, device="meta")
        try:
            replace_data(parameter, empty, name="")
        except MetaTensorError:
            # Somebody has a weak reference to it, or an autograd graph: it stays as it is, which is right, if not free.
            return False
        return True

    def on_part(self, module: nn.Module, name: str, part: object) -> None:
        """Remembers a module, for :meth:`check`."""
        self._modules[id(module)] = weakref.ref(module)

    def adopt(self, inner: _Construction) -> None:
        """Goes on with what was built in a construction within this one."""
        self._origins |= inner._origins
        self._modules |= inner._modules
        self._storages |= inner._storages
        self.excluded_bytes |= inner.excluded_bytes

    def forget(self) -> None:
        """Ends all references."""
        self._origins.clear()
        self._modules.clear()
        self._storages.clear()

    def check(self) -> None:
        """Looks for what giving each parameter memory of its own is not going to make right.

        Raises:
            MetaTensorError: A buffer that no checkpoint holds, or an attribute, was computed from a parameter on meta,
                a parameter on meta shares its memory, or belongs to what torch.jit compiled.
        """
        self._check_values()
        self._check_sharing()
        self._check_scripts()

    def _alive(self) -> list[nn.Module]:
        return [module for reference in self._modules.values() if (module := reference()) is not None]

    def _check_sharing(self) -> None:
        owners: dict[int, dict[int, tuple[nn.Module, str, torch.Tensor]]] = {}
        modules = self._alive()
        for module in modules:
            for name, tensor in (*module._parameters.items(), *module._buffers.items(), *_attributes(module).items()):
                if type(tensor) not in (torch.Tensor, nn.Parameter):
                    continue
                if tensor.layout is not torch.strided or not tensor.numel():
                    continue
                storages = [StorageWeakRef(tensor.untyped_storage())]
                if id(tensor) in self._storages and tensor.is_meta:
                    storages.append(self._storages[id(tensor)])
                for storage in storages:
                    owners.setdefault(storage.cdata, {})[id(tensor)] = (module, name, tensor)
        for group in owners.values():
            if len(group) < 2 or not any(tensor.is_meta for *_, tensor in group.values()):
                continue
            holders = {id(module) for module, *_ in group.values()}
            around = [(len(below), module) for module in modules if holders <= (below := {*map(id, module.modules())})]
            own = [(size, type(module)) for size, module in around if not type(module).__module__.startswith("torch.")]
            owner = min(own, key=lambda item: item[0])[1] if own else None
            names = tuple(f"{type(module).__name__}.{name}" for module, name, _ in group.values())
            raise MetaTensorError(
                f"{' and '.join(names[:10])} share memory without being one parameter, which cannot be kept without "
                f"memory. To tie two parameters assign the same object to both. {_advice(owner)}",
                names=names,
                module_class=owner,
            )

    def _check_scripts(self) -> None:
        for module in self._alive():
            for name, part in module._modules.items():
                if isinstance(part, torch.jit.ScriptModule) and any(value.is_meta for value in part.parameters()):
                    raise MetaTensorError(
                        f"{type(module).__name__}.{name} was compiled by torch.jit, whose parameters can be given no "
                        f"memory later. {_advice(type(module))}",
                        names=(f"{type(module).__name__}.{name}",),
                        module_class=type(module),
                    )

    def _check_values(self) -> None:
        found: list[tuple[str, nn.Module, _Origin]] = []
        for module in self._alive():
            # torch (2.13) has no public name for them.
            unsaved = {name: module._buffers.get(name) for name in module._non_persistent_buffers_set}
            for name, value in (*unsaved.items(), *_attributes(module).items()):
                if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter):
                    origin = self._origin(value)
                    if origin is not None:
                        found.append((name, module, origin))
        if found:
            parts = listed(f"{type(module).__name__}.{name} (from {origin})" for name, module, origin in found)
            owner = type(found[0][1])
            raise MetaTensorError(
                f"No checkpoint holds {parts}, computed from parameters that have no values under meta_init. "
                f"{_advice(owner)}",
                names=tuple(dict.fromkeys(str(origin) for *_, origin in found)),
                module_class=owner,
            )

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._registering or self is not _ACTIVE.constructions[-1]:
            return func(*args, **kwargs)
        on_meta = [tensor for tensor in _tensors((*args, *kwargs.values())) if tensor.is_meta]
        if not on_meta:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        target: Any = args[0] if args else kwargs.get("tensor", kwargs.get("self", kwargs.get("input")))
        origin = next((known for known in map(self._origin, on_meta) if known is not None), None)
        if func == _GET_DEVICE:
            # Buffers that are made "where the weights are" must be real.
            if origin is None:
                return torch.get_default_device() if isinstance(target, nn.Parameter) else target.device
            return origin.device
        if name in _WRITING or (name.endswith("_") and not name.endswith("__") and name not in _NOT_WRITING):
            if all(tensor.is_meta for tensor in _tensors(target)):
                return target
            raise self._error(on_meta, f"{name}() writes it into a tensor that has memory")
        if func == _SET_DATA:
            if not target.is_meta:
                raise self._error(on_meta, "it becomes the data of a tensor that has memory")
        elif origin is not None and target is on_meta[0]:
            if name in _LIKE:
                kwargs = {"device": origin.device, **kwargs}
            elif name in ("to", "cpu", "cuda"):
                # The restore is what moves parameters to a device. Their type changes as always.
                kwargs = _conversion(args, kwargs) if name == "to" else {}
                if not kwargs:
                    return target
                func, args = torch.Tensor.to, (target,)
        if isinstance(kwargs.get("out"), torch.Tensor) and not kwargs["out"].is_meta:
            raise self._error(on_meta, f"{name}() writes it into a tensor that has memory")
        try:
            # torch (2.13) computes nonsense in silence for some mixtures (linear, convolution), and refuses others. An
            # autograd graph that somebody keeps (torch.nn.utils.weight_norm) would forbid to give parameters memory.
            with torch.no_grad():
                result = func(*_on_meta(args), **{key: _on_meta(value) for key, value in kwargs.items()})
        except (RuntimeError, TypeError) as error:
            if "meta" not in str(error).lower() or isinstance(error, MetaTensorError):
                raise
            raise self._error(on_meta, str(error).partition("\n")[0].rstrip(".")) from error
        if origin is not None:
            for tensor in _tensors(result):
                if tensor.is_meta and self._origin(tensor) is None:
                    self._origins[id(tensor)] = (weakref.ref(tensor), origin)
        return result

    def _origin(self, tensor: torch.Tensor) -> _Origin | None:
        known = self._origins.get(id(tensor))
        return known[1] if known is not None and known[0]() is tensor else None

    def _error(self, tensors: list[torch.Tensor], what: str) -> MetaTensorError:
        origins = [origin for origin in map(self._origin, tensors) if origin is not None]
        names = tuple(dict.fromkeys(map(str, origins)))
        # The class that needs the value, rather than what torch builds on its behalf (parametrizations).
        readers = (
            type(module)
            for module in _under_construction()
            if not type(module).__module__.startswith("torch.") and not isinstance(module, self._exclude)
        )
        owner = next(readers, origins[0].module_class if origins else None)
        return MetaTensorError(
            f"The value of {', '.join(names) or 'a tensor on meta'} is needed, which has none under meta_init: {what}. "
            f"{_advice(owner)}",
            names=names,
            module_class=owner,
        )


def _attributes(module: nn.Module) -> dict[str, Any]:
    """What hangs on a module, without what is made anew before every forward.

    That is what the old weight_norm, spectral_norm and prune do (torch 2.13, torch.nn.utils). A module's hooks have no
    public name.
    """
    hooks = module._forward_pre_hooks.values()
    made_anew = {getattr(hook, key, None) for hook in hooks for key in ("name", "_tensor_name")}
    return {name: value for name, value in vars(module).items() if name not in made_anew}


def _advice(owner: type | None) -> str:
    if owner is None:
        return "Do this outside meta_init."
    name = owner.__name__
    return f"Build {name} as always, in memory: meta_init(exclude=({name},)), or use meta_init as a decorator."


def _under_construction() -> Iterator[nn.Module]:
    """The modules whose ``__init__`` is running in this thread, innermost first."""
    frame = inspect.currentframe()
    while frame is not None:
        code = frame.f_code
        if code.co_name == "__init__" and code.co_argcount:
            module = frame.f_locals.get(code.co_varnames[0])
            if isinstance(module, nn.Module):
                yield module
        frame = frame.f_back


def _tensors(value: Any) -> list[torch.Tensor]:
    # Not in dicts: the only one that torch passes is the memo of a deep copy.
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for item in value for tensor in _tensors(item)] if isinstance(value, (tuple, list)) else []


def _on_meta(value: Any) -> Any:
    """The same arguments, with shapes instead of values."""
    if isinstance(value, torch.Tensor):
        if value.is_meta or value.layout is not torch.strided:
            return value
        empty = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
        return empty.requires_grad_(value.requires_grad)
    if type(value) in (tuple, list):
        return type(value)(_on_meta(item) for item in value)
    return value


def _conversion(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """What the arguments of ``Tensor.to`` say but for the device; ``to(other)`` means the other's dtype."""
    dtypes = (value.dtype if isinstance(value, torch.Tensor) else value for value in (*args[1:], *kwargs.values()))
    dtype = next((value for value in dtypes if isinstance(value, torch.dtype)), None)
    memory_format = kwargs.get("memory_format")
    return {
        **({} if dtype is None else {"dtype": dtype}),
        **({} if memory_format is None else {"memory_format": memory_format}),
    }
