"""Building a module without memory for its parameters, and giving such parameters memory later.

``torch.device("meta")`` as a context empties every tensor, non-persistent buffers too, which no checkpoint holds. Here
only parameters go to meta, one by one as they are registered (torch's public registration hook), so buffers keep their
values; and initialisation of meta parameters is skipped, which is where building a large model spends its time.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

from lightning_memload.errors import MetaTensorError

__all__ = ["materialize", "meta_init", "meta_names", "replace_data"]


@contextlib.contextmanager
def meta_init(enabled: bool = True) -> Iterator[None]:
    """Within, modules are built with their parameters on the meta device: no memory, no initialisation.

    Buffers are built as always. Ties between parameters, ``requires_grad`` and attributes set on parameters are kept.
    The parameters get memory and values when a checkpoint is restored into the module. Affects the current thread only.

    The random number generator advances less than in an ordinary construction, since initialisation is skipped.

    Args:
        enabled: ``False`` makes the context do nothing, for scripts that decide at run time.

    Example:
        >>> with meta_init():
        ...     model = LitGPT(config)
        >>> trainer.fit(model, ckpt_path="last.ckpt")
    """
    if not enabled:
        yield
        return
    thread = threading.get_ident()
    # A parameter registered under two names must become one meta parameter. Weak: the original's memory goes at once.
    replaced: dict[int, tuple[weakref.ref[nn.Parameter], nn.Parameter]] = {}

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if threading.get_ident() != thread or type(parameter) is not nn.Parameter or parameter.is_meta:
            return None
        if isinstance(module, nn.RNNBase):
            # Keeps weak references to its weights (torch 2.13), which forbid to exchange them later.
            return None
        known = replaced.get(id(parameter))
        if known is not None and known[0]() is parameter:
            return known[1]
        empty = torch.empty_strided(parameter.shape, parameter.stride(), dtype=parameter.dtype, device="meta")
        meta = nn.Parameter(empty, requires_grad=parameter.requires_grad)
        meta.__dict__.update(parameter.__dict__)
        replaced[id(parameter)] = (weakref.ref(parameter), meta)
        return meta

    handle = register_module_parameter_registration_hook(to_meta)  # type: ignore[arg-type]
    try:
        with _SkipMetaInitialisation():
            yield
    finally:
        handle.remove()


class _SkipMetaInitialisation(TorchFunctionMode):
    """Turns in-place operations on meta tensors into nothing.

    Values do not exist there, and the first use of many meta kernels imports half of torch (seconds, and 70 MB).
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name.endswith("_") and not name.startswith("_"):
            target = args[0] if args else kwargs.get("tensor", kwargs.get("self"))
            if isinstance(target, torch.Tensor) and target.is_meta and name != "requires_grad_":
                return target
        return func(*args, **kwargs)


def replace_data(tensor: torch.Tensor, new: torch.Tensor, *, name: str) -> torch.Tensor:
    """Gives a parameter or buffer other memory and keeps the object, so that ties and references to it stay right.

    Args:
        tensor: The parameter or buffer. Attributes set on it are kept.
        new: Memory of the same shape.
        name: What to call it in messages.

    Returns:
        A tensor with the memory that was replaced.

    Raises:
        MetaTensorError: Something holds a weak reference to a meta tensor, which cannot be replaced then.
    """
    if not tensor.is_meta:
        old = tensor.data
        tensor.data = new
        return old
    # Between meta and a real device ``.data`` cannot be set; swap_tensors exchanges the contents of two objects.
    if isinstance(tensor, nn.Parameter):
        new = nn.Parameter(new, requires_grad=tensor.requires_grad)
    new.__dict__.update(tensor.__dict__)
    try:
        torch.utils.swap_tensors(tensor, new)
    except RuntimeError as error:
        raise MetaTensorError(
            f"Cannot give {name} memory: {error}. Build it on a real device instead of under meta_init.", names=(name,)
        ) from error
    return new.detach()


def meta_names(module: nn.Module) -> tuple[list[str], list[str]]:
    """Names of the parameters and of the buffers of a module that are still on the meta device."""
    return (
        [name for name, parameter in module.named_parameters() if parameter.is_meta],
        [name for name, buffer in module.named_buffers() if buffer.is_meta],
    )


def materialize(root: nn.Module, keys: Iterable[str], device: torch.device, dtype: torch.dtype | None) -> None:
    """Gives meta parameters that no checkpoint supplied memory, and initial values from their own modules.

    A module that supplies ``reset_parameters`` initialises what is missing; its other parameters keep their values.

    Args:
        root: The module that the keys belong to.
        keys: Names of parameters and persistent buffers, those that are not on meta are passed over.
        device: Where to allocate.
        dtype: Floating-point type to allocate with, ``None`` for each tensor's own.

    Raises:
        MetaTensorError: A module with missing tensors has no ``reset_parameters``.
    """
    missing: dict[str, list[str]] = {}
    for key in keys:
        prefix, _, name = key.rpartition(".")
        missing.setdefault(prefix, []).append(name)
    for prefix, names in missing.items():
        module = root.get_submodule(prefix)
        own = {**module._parameters, **module._buffers}
        empty = {name: own[name] for name in names if (tensor := own.get(name)) is not None and tensor.is_meta}
        if not empty:
            continue
        reset = getattr(module, "reset_parameters", None)
        if not callable(reset):
            full = tuple(f"{prefix}.{name}".removeprefix(".") for name in empty)
            raise MetaTensorError(
                f"The checkpoint lacks {', '.join(full)}, and {type(module).__name__} has no reset_parameters() that "
                "would initialise it. Build this module outside meta_init, or give it reset_parameters().",
                names=full,
            )
        kept = {
            name: tensor.detach().clone() for name, tensor in own.items() if tensor is not None and name not in empty
        }
        for name, tensor in empty.items():
            assert tensor is not None
            replace_data(tensor, empty_on(tensor, device, dtype), name=f"{prefix}.{name}")
        reset()
        with torch.no_grad():
            for name, value in kept.items():
                tensor = own[name]
                assert tensor is not None
                tensor.copy_(value)


def empty_on(tensor: torch.Tensor, device: torch.device, dtype: torch.dtype | None) -> torch.Tensor:
    """Uninitialised memory for a tensor, with its strides.

    Args:
        tensor: Whose shape and strides to take.
        device: Where to allocate.
        dtype: Type for floating-point tensors, ``None`` for the tensor's own. Others keep theirs.
    """
    target = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
    return torch.empty_like(tensor.detach(), dtype=target, device=device, memory_format=torch.preserve_format)
