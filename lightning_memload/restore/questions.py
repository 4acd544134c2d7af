"""The calls on tensors that can be answered without their values."""

from __future__ import annotations

from typing import Any

import torch

from lightning_memload.checkpoint import span_bytes
from lightning_memload.restore.tape import Contents, Recipe, Step, StridedView
from lightning_memload.torch_private import HAS_COMPATIBLE_TYPE

__all__ = [
    "ABOUT_DEVICE",
    "CONVERSIONS",
    "DATA",
    "DETACH",
    "IS_META",
    "LIKE_FIRST",
    "LIKE_OTHERS",
    "ON_ORDINARY",
    "SET_DATA",
    "WITHOUT_VALUES",
    "converted",
    "is_copyable",
]


def _getters(*names: str) -> set[Any]:
    return {getattr(torch.Tensor, name).__get__ for name in names if hasattr(torch.Tensor, name)}


def _methods(*names: str) -> set[Any]:
    return {getattr(torch.Tensor, name) for name in names if hasattr(torch.Tensor, name)}


# Methods and attributes that do not need values.
WITHOUT_VALUES = _getters(
    "_backward_hooks", "_base", "_grad", "_post_accumulate_grad_hooks", "_version", "dtype", "grad",
    "grad_fn", "is_leaf", "is_mkldnn", "is_nested", "is_quantized", "is_sparse", "is_sparse_csr", "itemsize", "layout",
    "name", "names", "nbytes", "ndim", "output_nr",
    "requires_grad", "retains_grad", "shape", "volatile",
) | _methods(
    "__hash__", "__len__", "_is_view", "dim", "element_size", "is_complex", "is_conj", "is_contiguous",
    "is_floating_point", "is_inference", "is_neg", "is_signed", "ndimension", "nelement", "numel",
    "register_hook", "register_post_accumulate_grad_hook", "requires_grad_", "size", "storage_offset", "stride",
) | {
    getattr(torch.Tensor, name).__set__
    for name in ("_backward_hooks", "_post_accumulate_grad_hooks", "grad", "requires_grad")
}  # fmt: skip
# Questions whose answers follow from the device.
ABOUT_DEVICE = _getters("device", "is_cpu", "is_cuda", "is_mps", "is_xpu") | _methods("get_device")
IS_META = torch.Tensor.is_meta.__get__  # type: ignore[attr-defined]
DETACH, DATA = torch.Tensor.detach, torch.Tensor.data.__get__  # type: ignore[attr-defined]
SET_DATA = torch.Tensor.data.__set__  # type: ignore[attr-defined]
# Functions that take only shape, type and device from their tensors. to_empty() asks whether memory may be exchanged.
LIKE_FIRST = _methods("new_empty", "new_full", "new_ones", "new_tensor", "new_zeros") | {
    torch.empty_like, torch.full_like, torch.ones_like, torch.zeros_like, torch.rand_like, torch.randn_like,
    HAS_COMPATIBLE_TYPE,
}  # fmt: skip
# Methods that take only shape, type and device from all their tensors but the first.
LIKE_OTHERS = _methods("expand_as", "reshape_as", "to", "type_as", "view_as")
# Conversions that work on meta, unless they go to another device.
CONVERSIONS = _methods("bfloat16", "double", "float", "half", "to", "type")
# Methods that torch refuses for subclasses of Tensor.
ON_ORDINARY = _methods("numpy", "__array__", "__dlpack__", "__repr__", "__reduce_ex__", "tolist")


def is_copyable(target: torch.Tensor, source: Any) -> bool:
    """Whether ``target.copy_(source)`` overwrites every value of the target, without an error."""
    if not isinstance(source, torch.Tensor) or source.layout is not torch.strided or source.is_quantized:
        return False
    if source.is_meta or (target.requires_grad and torch.is_grad_enabled()):
        return False
    sizes = zip(reversed(source.shape), reversed(target.shape), strict=False)
    return source.dim() <= target.dim() and all(size in (1, wanted) for size, wanted in sizes)


def converted(
    func: Any, tensor: torch.Tensor, recipe: Recipe, rest: tuple[Any, ...], kwargs: dict[str, Any]
) -> Recipe | torch.Tensor | None:
    """Finds the result of a conversion to another type.

    Args:
        func: The function, one of :data:`CONVERSIONS`.
        tensor: Its first argument.
        recipe: The recipe of the values of this tensor.
        rest: The other positional arguments.
        kwargs: Keyword arguments.

    Returns:
        The recipe of the result, which is ``recipe`` if the result is the tensor itself. A tensor for a conversion to
        meta. ``None`` if the conversion needs values.
    """
    if tensor.requires_grad and torch.is_grad_enabled():
        return None  # The result is part of a graph.
    shape = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    try:
        result = func(shape, *rest, **kwargs)
    except NotImplementedError:
        return None  # a conversion to another device
    if not isinstance(result, torch.Tensor) or not result.is_meta:
        return None
    if _names_meta((rest, kwargs)):
        return result
    if result is shape:
        return recipe
    view = StridedView(result.dtype, tuple(result.shape), result.stride(), 0)
    step = Step("aten._to_copy.default", (recipe,), {"dtype": result.dtype}, None, view)
    return Recipe(Contents(span_bytes(result), recipe.contents.device, step), view)


def _names_meta(value: Any) -> bool:
    """Whether the device meta is among the arguments of a call."""
    if isinstance(value, (tuple, list)):
        return any(_names_meta(item) for item in value)
    if isinstance(value, dict):
        return any(_names_meta(item) for item in value.values())
    if isinstance(value, torch.Tensor):
        return value.is_meta
    return isinstance(value, (str, torch.device)) and str(value) == "meta"
