"""The kinds of torch's operations, derived from their schemas: which of them need values, and which can be recorded.

Operators are those of torch's dispatcher (``torch.ops.aten``), below autograd: every call of torch from Python or C++
ends there.
"""

from __future__ import annotations

import enum
import functools
from typing import Any

import torch

__all__ = [
    "OperationKind",
    "draws",
    "draws_from_user",
    "empty_call",
    "fits",
    "kind_of_call",
    "make_like_result",
    "name_of",
    "overwrites",
    "tensors_in",
    "written_in",
]

_ATEN = torch.ops.aten


class OperationKind(enum.Enum):
    """What an operation does with the values of its tensors."""

    VIEW = "neither reads nor writes values: makes a view, or gives an object other memory"
    EMPTY = "allocates memory without values"
    FILLED = "allocates memory with values that do not depend on other tensors"
    IN_PLACE = "writes its first argument"
    NEW = "makes tensors from other tensors"
    OTHER = "writes several tensors, or needs values at once"


_EMPTY = {"empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "empty_permuted"}
# Operators that allocate memory with values, and the operator in place, with its overload, that writes these values.
_FILLED = {
    "zeros": ("zero_", "default"), "zeros_like": ("zero_", "default"), "new_zeros": ("zero_", "default"),
    "ones": ("fill_", "Scalar"), "ones_like": ("fill_", "Scalar"), "new_ones": ("fill_", "Scalar"),
    "full": ("fill_", "Scalar"), "full_like": ("fill_", "Scalar"), "new_full": ("fill_", "Scalar"),
    "rand": ("uniform_", "default"), "rand_like": ("uniform_", "default"),
    "randn": ("normal_", "default"), "randn_like": ("normal_", "default"),
}  # fmt: skip
_OVERWRITING = {
    "bernoulli_", "cauchy_", "copy_", "exponential_", "eye", "fill_", "geometric_", "log_normal_", "normal_",
    "random_", "uniform_", "zero_"
}  # fmt: skip
# Operators in place whose tensors must fit the shape of the first one.
_BROADCASTING = {
    "add_", "addcdiv_", "addcmul_", "copy_", "div_", "fmod_", "lerp_", "masked_fill_", "mul_", "pow_", "remainder_",
    "sub_"
}  # fmt: skip
_SIMPLE = {int, float, bool, str, torch.dtype, torch.device, torch.layout}
_ARITHMETIC = {"add", "sub", "mul", "div"}


@functools.cache
def name_of(operator: Any) -> str:
    """The name of an operator without namespace and overload."""
    return str(operator._schema.name).rpartition("::")[2]


@functools.cache
def _kind_of(operator: Any) -> OperationKind:
    """The kind of an operator."""
    schema, tags, name = operator._schema, operator.tags, name_of(operator)
    aten = operator.namespace == "aten"
    written = [argument for argument in schema.arguments if argument.alias_info and argument.alias_info.is_write]
    if aten and name in _EMPTY and not written:
        return OperationKind.EMPTY
    if aten and name in _FILLED and operator._overloadname in ("default", "memory_format"):
        return OperationKind.FILLED
    if torch.Tag.inplace_view in tags:
        return OperationKind.OTHER if name in ("resize_", "resize_as_") else OperationKind.VIEW
    if written:
        first = schema.arguments[0]
        is_first = len(written) == 1 and written[0].name == first.name and str(first.type) == "Tensor"
        if name == "eye":  # torch.nn.init.eye_
            return OperationKind.IN_PLACE
        return (
            OperationKind.IN_PLACE
            if is_first and name.endswith("_") and len(schema.returns) == 1
            else OperationKind.OTHER
        )
    if name == "_unsafe_view" or any(result.alias_info for result in schema.returns):
        return OperationKind.VIEW
    if torch.Tag.data_dependent_output in tags or torch.Tag.dynamic_output_shape in tags:
        return OperationKind.OTHER
    types = {str(result.type) for result in schema.returns}
    return OperationKind.NEW if types and types <= {"Tensor", "List[Tensor]", "Tensor[]"} else OperationKind.OTHER


def kind_of_call(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> OperationKind:
    """The kind of a call. For some operators it depends on the arguments."""
    kind = _kind_of(operator)
    if kind is OperationKind.OTHER and _indexes_by_position(operator, args):
        return OperationKind.NEW
    return OperationKind.OTHER if kind is OperationKind.NEW and _updated_in(operator, args, kwargs) else kind


def _indexes_by_position(operator: Any, args: tuple[Any, ...]) -> bool:
    """Whether a call is ``tensor[indices]``, and the shape of its result does not depend on the values of indices."""
    if operator is not _ATEN.index.Tensor:
        return False
    return all(tensor.dtype not in (torch.bool, torch.uint8) for tensor in tensors_in(args[1]))


def written_in(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """The tensors that a call writes."""
    found: list[torch.Tensor] = []
    for position, argument in enumerate(operator._schema.arguments):
        if argument.alias_info and argument.alias_info.is_write:
            found += tensors_in(args[position] if position < len(args) else kwargs.get(argument.name))
    return found + _updated_in(operator, args, kwargs)


def _updated_in(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """The running statistics that a batch norm updates, which its schema does not mark as written."""
    positions = _statistics(operator)
    if not positions:
        return []
    named = {name: args[at] if at < len(args) else kwargs.get(name) for name, at in positions.items()}
    is_training = named.pop("training", True)
    return tensors_in(list(named.values())) if is_training else []


@functools.cache
def _statistics(operator: Any) -> dict[str, int]:
    """Positions of the running statistics and the training flag in a batch norm's arguments; else empty."""
    arguments = operator._schema.arguments
    # native_batch_norm and the operators of cuDNN, MIOpen and SyncBatchNorm do not mark them (torch 2.6 to 2.14).
    if "batch_norm" not in name_of(operator) or name_of(operator).endswith("_backward"):
        return {}
    names = ("running_mean", "running_var", "training")
    found = {item.name: at for at, item in enumerate(arguments) if item.name in names and not item.alias_info}
    return found if "running_mean" in found else {}


@functools.cache
def draws(operator: Any) -> bool:
    """Whether an operation draws random numbers."""
    return torch.Tag.nondeterministic_seeded in operator.tags


def draws_from_user(kwargs: dict[str, Any]) -> bool:
    """Whether random numbers come from a generator of the user, whose order must be kept."""
    return kwargs.get("generator") is not None


@functools.cache
def overwrites(operator: Any) -> bool:
    """Whether an operation in place overwrites every value without reading it."""
    return name_of(operator) in _OVERWRITING


def fits(operator: Any, target: torch.Tensor, others: list[torch.Tensor]) -> bool:
    """Whether an operation in place accepts the shapes of its other tensors, as far as that is known."""
    if name_of(operator) not in _BROADCASTING:
        return True
    return all(_broadcasts(other.shape, target.shape) for other in others)


def _broadcasts(shape: torch.Size, to: torch.Size) -> bool:
    sizes = zip(reversed(shape), reversed(to), strict=False)
    return len(shape) <= len(to) and all(size in (1, wanted) for size, wanted in sizes)


def empty_call(
    operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, tuple[Any, ...], dict[str, Any], str, tuple[Any, ...]] | None:
    """Splits a :attr:`OperationKind.FILLED` call: one call allocates the memory, one writes the values in place.

    Returns:
        The operator that allocates the memory, its positional and keyword arguments, the name of the operator in place,
        and its arguments after the first. ``None`` if the type of the result depends on the value.
    """
    name = name_of(operator)
    in_place, overload = _FILLED[name]
    value: tuple[Any, ...] = (1,) if name.endswith("ones") or name == "ones_like" else ()
    rest = args
    if name in ("full", "full_like", "new_full"):
        position = 2 if name == "new_full" else 1
        value, rest = (args[position],), (*args[:position], *args[position + 1 :])
        if name == "full" and kwargs.get("dtype") is None and type(args[1]) is not float:
            return None
    if name.endswith("_like"):
        make = _ATEN.empty_like.default
    elif name.startswith("new_"):
        make = _ATEN.new_empty.default
    else:
        make = _ATEN.empty.memory_format
    return make, rest, kwargs, f"aten.{in_place}.{overload}", value


def make_like_result(
    operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, infer: bool
) -> list[torch.Tensor] | None:
    """Allocates the results of a :attr:`OperationKind.NEW` call, with shapes, strides and types, but without values.

    Args:
        operator: The operator.
        args: Positional arguments.
        kwargs: Keyword arguments.
        infer: Whether to use the operator's meta kernel. For many operators, the first use imports half of torch: it
            takes seconds, and 70 MB.

    Returns:
        The results; ``None`` if their shapes, strides and types cannot be known without values.
    """
    name = name_of(operator)
    inputs = tensors_in((args, kwargs))
    first = inputs[0]
    if name == "clone":
        return [torch.empty_like(first, memory_format=kwargs.get("memory_format") or torch.preserve_format)]
    if name == "_to_copy":
        if kwargs.get("layout") not in (None, torch.strided) or kwargs.get("pin_memory"):
            return None
        how = {key: kwargs[key] for key in ("dtype", "device") if kwargs.get(key) is not None}
        return [torch.empty_like(first, memory_format=kwargs.get("memory_format") or torch.preserve_format, **how)]
    # The layout comes first: is_contiguous() fails for sparse tensors.
    plain = first.layout is torch.strided and first.is_floating_point() and first.is_contiguous()
    if name in _ARITHMETIC and plain and len(inputs) == 1 and not kwargs:
        if all(type(value) in (int, float) for value in args[1:]):
            return [torch.empty_strided(first.shape, first.stride(), dtype=first.dtype, device=first.device)]
    elif name == "neg" and plain:
        return [torch.empty_strided(first.shape, first.stride(), dtype=first.dtype, device=first.device)]
    if not infer or "quantize" in name:
        return None
    if name.lstrip("_").startswith(("linalg_", "fft_")) and name != "linalg_vector_norm":
        return None  # The strides of decompositions differ from those of their meta kernels.
    return _inferred(operator, args, kwargs, inputs)


def _inferred(
    operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any], inputs: list[torch.Tensor]
) -> list[torch.Tensor] | None:
    devices = {tensor.device for tensor in inputs if tensor.dim()} or {inputs[0].device}
    if len(devices) > 1 or kwargs.get("device") not in (None, *devices):
        return None
    if any(tensor.layout is not torch.strided or tensor.is_quantized for tensor in inputs):
        return None
    kwargs = {key: value for key, value in kwargs.items() if key != "device"}
    try:
        result = operator(*_on_meta(args), **_on_meta(kwargs))
    except Exception:
        # The operator has no meta kernel, needs values, or checks its arguments in another way (cholesky in torch 2.6
        # with an assert). An error of the user's code is raised again by the real call.
        return None
    made = []
    for shape in tensors_in(result):
        if type(shape) is not torch.Tensor or not shape.is_meta or shape.layout is not torch.strided:
            return None
        if shape.is_conj() or shape.is_neg():
            return None
        made.append(torch.empty_strided(shape.shape, shape.stride(), dtype=shape.dtype, device=next(iter(devices))))
    # Some operators return None for results that are not asked for (output_mask of a backward).
    return made if len(made) == (len(result) if isinstance(result, (tuple, list)) else 1) else None


def _on_meta(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    if isinstance(value, dict):
        return {key: _on_meta(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_on_meta(item) for item in value)
    return value


def tensors_in(value: Any) -> list[torch.Tensor]:
    """The tensors among arguments or results."""
    found: list[torch.Tensor] = []
    _collect(value, found)
    return found


def _collect(value: Any, found: list[torch.Tensor]) -> None:
    if value is None or type(value) in _SIMPLE:
        return
    if isinstance(value, torch.Tensor):
        found.append(value)
    elif isinstance(value, (tuple, list)):
        for item in value:
            _collect(item, found)
    elif isinstance(value, dict):
        for item in value.values():
            _collect(item, found)
