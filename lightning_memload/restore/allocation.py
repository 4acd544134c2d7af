"""Gives parameters and buffers new memory. Each stays the same object.

Only the contents of an object are exchanged, so ties, references of users and optimizers, hooks and attributes stay
valid. The values come from a checkpoint, or from the module's own ``reset_parameters``.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import nn

from lightning_memload.errors import MetaTensorError
from lightning_memload.restore.tape import Recipe, StridedView, undisturbed
from lightning_memload.torch_private import below_autograd, make_wrapper_subclass, without_overrides

__all__ = [
    "FutureMemory",
    "carry_over",
    "empty_on",
    "is_free",
    "materialize",
    "meta_names",
    "replace_data",
    "set_in_place",
    "stand_in",
    "tensors_of",
    "with_other_memory",
    "without_memory",
    "without_weak_references",
]


_Tensor = TypeVar("_Tensor", bound=torch.Tensor)


class FutureMemory:
    """The memory that a parameter on meta and its aliases share as soon as it is allocated.

    Attributes:
        parameter: The parameter. Its ``follow`` makes the values. ``None`` if there is none, or if it has other memory.
        recipe: The recipe of the values, if there is no parameter.
        values: The tensor in this memory. ``None`` before the allocation.
    """

    __slots__ = ("parameter", "recipe", "values")

    def __init__(self, parameter: Any, recipe: Recipe | None) -> None:
        self.parameter = parameter
        self.recipe = recipe
        self.values: torch.Tensor | None = None

    def make(self) -> torch.Tensor:
        """The tensor in this memory, with its values."""
        if self.parameter is not None and self.values is None:
            self.parameter.follow()
        if self.values is None and self.recipe is not None:
            self.values = self.recipe.make()
        assert self.values is not None
        return self.values


def replace_data(tensor: torch.Tensor, new: torch.Tensor, *, name: str) -> torch.Tensor:
    """Gives a parameter or buffer other memory and keeps the object, so that ties and references stay valid.

    Args:
        tensor: The parameter or buffer. Attributes set on it are kept.
        new: Memory of the same shape.
        name: Its name in messages.

    Returns:
        A tensor with the memory that was replaced.

    Raises:
        MetaTensorError: Something holds a weak reference to the tensor, or an autograd graph does: memory cannot be
            exchanged then from or to meta.
    """
    if hasattr(tensor, "take_memory"):  # It waits for values, and gets them here.
        tensor.take_memory(new)
        return torch.empty(0, dtype=new.dtype, device=new.device)
    if tensor.is_meta == new.is_meta:
        old = tensor.data
        tensor.data = new
        return old
    # Between meta and a real device ``.data`` cannot be set; swap_tensors exchanges the contents of two objects.
    new = with_other_memory(tensor, new)
    try:
        torch.utils.swap_tensors(tensor, new)
    except RuntimeError as error:
        raise MetaTensorError(
            f"Cannot give {name} memory: {error}. Build it on a real device instead of on meta.", names=(name,)
        ) from error
    return new.detach()


def with_other_memory(tensor: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """Makes an ordinary tensor in other memory, with the gradient, the hooks and the attributes of a tensor."""
    if isinstance(tensor, nn.Parameter):
        new = nn.Parameter(new, requires_grad=tensor.requires_grad)
    elif tensor.requires_grad:
        new = new.detach().requires_grad_()
    return carry_over(tensor, new)


def carry_over(tensor: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """Gives a tensor the gradient, the hooks and the attributes of another one, and returns it."""
    new.__dict__.update(tensor.__dict__)
    grad = tensor.grad if tensor.is_leaf else None
    if grad is not None and not grad.is_meta:
        new.grad = grad if (grad.device, grad.dtype) == (new.device, new.dtype) else grad.to(new.device, new.dtype)
    # The very dicts, so that the handles that a user has can still remove a hook. They have no public names.
    for key in ("_backward_hooks", "_post_accumulate_grad_hooks"):
        if getattr(tensor, key):
            setattr(new, key, getattr(tensor, key))
    return new


def is_free(tensor: torch.Tensor) -> bool:
    """Whether ``swap_tensors`` can exchange the contents of this object without an effect on other code.

    It refuses tensors with weak references and tensors that C++ code refers to. If a graph refers to the tensor, it
    succeeds, but then this graph can run no backward pass.
    """
    return tensor._use_count() == 1 and not weakref.getweakrefs(tensor)  # type: ignore[attr-defined]


@contextlib.contextmanager
def without_weak_references(root: nn.Module) -> Iterator[None]:
    """Removes the weak references that recurrent layers on meta have to their weights, and makes new ones afterwards.

    The layers use them to detect replaced weights (torch 2.13). The method that makes them has no public name. torch's
    own ``_apply`` calls it too.
    """
    layers = [module for module in root.modules() if isinstance(module, nn.RNNBase)]
    layers = [layer for layer in layers if any(parameter.is_meta for parameter in layer.parameters())]
    for layer in layers:
        layer._flat_weight_refs = []
    try:
        yield
    finally:
        for layer in layers:
            layer._init_flat_weights()


def tensors_of(root: nn.Module) -> Iterator[torch.Tensor]:
    """All parameters and buffers of a module and its submodules. Their names take several times as long."""
    for module in root.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                yield tensor


def meta_names(module: nn.Module) -> tuple[list[str], list[str]]:
    """Names of the parameters and of the buffers of a module that are still on the meta device."""
    if not any(tensor.is_meta for tensor in tensors_of(module)):
        return [], []
    return (
        [name for name, parameter in module.named_parameters() if parameter.is_meta],
        [name for name, buffer in module.named_buffers() if buffer.is_meta],
    )


def materialize(root: nn.Module, keys: Iterable[str], device: torch.device, dtype: torch.dtype | None) -> None:
    """Gives meta parameters that the checkpoint lacks memory, and initial values from their own modules.

    The module's ``reset_parameters`` initialises them. The other parameters of the module keep their values.

    Args:
        root: The module that the keys belong to.
        keys: Names of parameters and persistent buffers, those that are not on meta are skipped.
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
        tensors = (*module._parameters.items(), *module._buffers.items())
        own = {name: tensor for name, tensor in tensors if tensor is not None}
        empty = {name: own[name] for name in names if name in own and own[name].is_meta}
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
        kept = {name: tensor.detach().clone() for name, tensor in own.items() if name not in empty}
        for name, tensor in empty.items():
            replace_data(tensor, empty_on(tensor, device, dtype), name=f"{prefix}.{name}")
        reset()
        with torch.no_grad():
            for name, value in kept.items():
                own[name].copy_(value)


def empty_on(tensor: torch.Tensor, device: torch.device, dtype: torch.dtype | None) -> torch.Tensor:
    """Uninitialised memory for a tensor, with its strides.

    Args:
        tensor: The tensor whose shape and strides the memory gets.
        device: The device of the memory.
        dtype: Type for floating-point tensors, ``None`` for the tensor's own. Others keep theirs.
    """
    target = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
    if tensor.is_contiguous():
        # Of a tensor on meta empty_like is written in Python (torch 2.13), 25 us a call, and its first call imports
        # sympy: 0.3 s on a warm disk.
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=target, device=device)
    # Untouched memory costs nothing.
    like = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
    return torch.empty_like(like, dtype=target, device=device, memory_format=torch.preserve_format)


def without_memory(kind: type[_Tensor], view: StridedView, requires_grad: bool) -> _Tensor:
    """Makes a tensor of a class of waiting tensors (waiting.py)."""
    # On meta, torch refuses to share its memory with an ordinary tensor: it has none. It tells the device of its future
    # memory (prim.device), so that a gradient on that device fits.
    return make_wrapper_subclass(
        kind, view.size, strides=view.stride, storage_offset=view.offset, dtype=view.dtype,
        device=torch.device("meta"), requires_grad=requires_grad, dispatch_device=True,
    )  # fmt: skip


def set_in_place(tensor: torch.Tensor, new: torch.Tensor) -> None:
    """Gives a waiting tensor other memory in place. All references to the tensor, from C++ too, see this memory."""
    # torch asks whether this is possible from meta. Below autograd the question arrives in _on_operation.
    with without_overrides(), below_autograd():
        vars(tensor)["_is_set"] = True
        tensor.data = new
        del vars(tensor)["_is_set"]


def stand_in(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Untouched memory that costs nothing, for calls that ask a waiting tensor only for shape, type and device.

    Returns:
        An ordinary tensor. The tensor itself for a device where memory costs something.
    """
    if device.type != "cpu":
        return tensor
    with undisturbed(), without_overrides():
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
