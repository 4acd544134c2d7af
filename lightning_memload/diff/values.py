"""Compares the elements of two tensors of one dtype: in how many they differ, and by how much.

Two elements are equal in value if they are equal numbers, or both NaN. 0.0 and -0.0 are equal in value and differ in
bits, and so do two NaNs with different bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["TensorDiff", "add_up", "compare_values"]

# If only one in so many elements differs, the others are not looked at any further.
_FEW = 16
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}


@dataclass(frozen=True, slots=True)
class TensorDiff:
    """The differences between two tensors of the same name, shape and dtype.

    Attributes:
        name: Their name.
        num_values: Number of elements of each.
        num_different: Number of elements that differ in value.
        num_different_bits: Number of elements that differ in bits. It includes those that differ in value.
        num_nan: Number of elements that are NaN in one of the tensors only. They differ in value.
        max_abs: Largest absolute difference of two elements, without those in ``num_nan``. ``inf`` if one is infinite.
        max_relative: Largest absolute difference divided by the larger absolute value, in the same way.
    """

    name: str
    num_values: int
    num_different: int = 0
    num_different_bits: int = 0
    num_nan: int = 0
    max_abs: float = 0.0
    max_relative: float = 0.0


def add_up(first: TensorDiff, second: TensorDiff) -> TensorDiff:
    """The differences of two parts of one tensor together."""
    return TensorDiff(
        first.name,
        first.num_values + second.num_values,
        first.num_different + second.num_different,
        first.num_different_bits + second.num_different_bits,
        first.num_nan + second.num_nan,
        max(first.max_abs, second.max_abs),
        max(first.max_relative, second.max_relative),
    )


def compare_values(name: str, first: torch.Tensor, second: torch.Tensor) -> TensorDiff:
    """Compares two 1-D tensors of one dtype and length on the CPU.

    Peak memory: some 60 bytes for each element.
    """
    bits = [tensor.view(_INTEGERS[tensor.dtype.itemsize]) for tensor in (first, second)]
    if torch.equal(*bits):
        return TensorDiff(name, first.numel())
    differs = bits[0] != bits[1]
    if first.dtype.itemsize == 16:
        differs = differs.view(-1, 2).any(1)
    num_bits = int(differs.sum())
    if num_bits < first.numel() // _FEW:
        # Indexing is not implemented for all dtypes. A choice of their bits is.
        positions = differs.nonzero().flatten()
        first, second = (bit.view(len(differs), -1)[positions].flatten().view(first.dtype) for bit in bits)
    a, b = _widened(first), _widened(second)
    distance = (a - b).abs()
    different = a != b
    only_one = None
    if bool(distance.isnan().any()):  # of NaN, or of two infinities
        are_nan = a.isnan(), b.isnan()
        only_one = are_nan[0] ^ are_nan[1]
        different &= ~(are_nan[0] & are_nan[1])
        distance = torch.where(different & ~only_one, distance, 0.0)
    scale = torch.maximum(a.abs(), b.abs())
    relative = torch.where(distance.isinf() | (distance == 0), distance, distance / scale)
    return TensorDiff(
        name,
        len(differs),
        int(different.sum()),
        num_bits,
        0 if only_one is None else int(only_one.sum()),
        float(distance.max()),
        float(relative.max()),
    )


def _widened(values: torch.Tensor) -> torch.Tensor:
    """The values in a type in which they can be subtracted. Integers above 2**53 are rounded."""
    if values.dtype.is_complex:
        return values.to(torch.complex128)
    return values.to(torch.float64)
