"""The part of a tensor that one rank holds of a ``DTensor``: where it lies in the whole tensor, without any value.

Pure arithmetic on shapes, meshes and placements. It follows ``torch.distributed.tensor.distribute_tensor``: the
placements are applied one after the other, ``Shard`` cuts like ``torch.chunk``, and ``_StridedShard`` as torch itself
does. A part may consist of several regions. Other placements (``Partial``) are unknown.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from lightning_memload.torch_private import is_strided_shard, split_indices

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

__all__ = ["Region", "are_rows", "first_dimension", "local_regions", "local_shape", "regions_of"]


class Region(NamedTuple):
    """A box of elements that a rank holds.

    Attributes:
        starts: Position of its first element in the whole tensor, for every dimension.
        local_starts: Position of its first element in the local tensor.
        shape: Sizes of the box.
    """

    starts: tuple[int, ...]
    local_starts: tuple[int, ...]
    shape: tuple[int, ...]


class _Run(NamedTuple):
    """Consecutive indices of one dimension."""

    start: int
    length: int


def local_regions(
    shape: Sequence[int], mesh_shape: Sequence[int], coordinate: Sequence[int], placements: Sequence[Any]
) -> tuple[Region, ...] | None:
    """The regions that one rank holds of a distributed tensor.

    Args:
        shape: Sizes of the whole tensor.
        mesh_shape: Sizes of the device mesh.
        coordinate: The rank's position in the mesh.
        placements: The placement of the tensor on each dimension of the mesh.

    Returns:
        The regions, which do not overlap. Together they are the local tensor. Empty if the rank holds no element.
        ``None`` if a placement is unknown.
    """
    runs = _local_runs(shape, mesh_shape, coordinate, placements)
    if runs is None:
        return None
    local_starts = [list(itertools.accumulate((run.length for run in of), initial=0)) for of in runs]
    pieces = [list(zip(of, starts, strict=False)) for of, starts in zip(runs, local_starts, strict=True)]
    regions = [
        Region(
            starts=tuple(run.start for run, _ in box),
            local_starts=tuple(start for _, start in box),
            shape=tuple(run.length for run, _ in box),
        )
        for box in itertools.product(*pieces)
    ]
    return tuple(region for region in regions if math.prod(region.shape))


def local_shape(
    shape: Sequence[int], mesh_shape: Sequence[int], coordinate: Sequence[int], placements: Sequence[Any]
) -> tuple[int, ...] | None:
    """Sizes of the tensor that one rank holds. ``None`` if a placement is unknown. For the arguments see above."""
    runs = _local_runs(shape, mesh_shape, coordinate, placements)
    return None if runs is None else tuple(sum(run.length for run in of_dimension) for of_dimension in runs)


def regions_of(tensor: DTensor) -> tuple[Region, ...] | None:
    """The regions that this rank holds of a ``DTensor``, see :func:`local_regions`.

    Returns:
        ``None`` if a placement is unknown, if this rank is not in the mesh, or if the local tensor has other sizes than
        the placements say.
    """
    mesh = tensor.device_mesh
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return None
    where = tuple(tensor.shape), tuple(mesh.shape), coordinate, tensor.placements
    if local_shape(*where) != tuple(tensor.to_local().shape):
        return None
    return local_regions(*where)


def are_rows(shape: Sequence[int], mesh_shape: Sequence[int], placements: Sequence[Any]) -> bool:
    """Whether the regions of every rank are contiguous in a contiguous whole tensor: only its first dimension is cut.

    Args:
        shape: Sizes of the whole tensor.
        mesh_shape: Sizes of the device mesh.
        placements: The placement of the tensor on each dimension of the mesh.
    """
    first = first_dimension(shape)
    return all(
        size == 1 or placement.is_replicate() or placement.dim == first
        for size, placement in zip(mesh_shape, placements, strict=True)
    )


def first_dimension(shape: Sequence[int]) -> int:
    """The first dimension with more than one element, whose indices are the rows of a contiguous tensor."""
    return next((number for number, size in enumerate(shape) if size > 1), 0)


def _local_runs(
    shape: Sequence[int], mesh_shape: Sequence[int], coordinate: Sequence[int], placements: Sequence[Any]
) -> list[list[_Run]] | None:
    """For each dimension the runs of indices that the rank holds."""
    runs = [[_Run(0, size)] for size in shape]
    for size, position, placement in zip(mesh_shape, coordinate, placements, strict=True):
        if placement.is_replicate():
            continue
        is_strided = is_strided_shard(placement)  # With older versions of torch it is a shard too.
        if not is_strided and not placement.is_shard():
            return None
        of_dimension = runs[placement.dim]
        length = _count(of_dimension)
        if is_strided:
            runs[placement.dim] = _take(of_dimension, split_indices(placement, length, size)[position])
        else:
            chunk = -(-length // size)
            start = min(chunk * position, length)
            runs[placement.dim] = _cut(of_dimension, start, min(chunk, length - start))
    return runs


def _count(runs: Sequence[_Run]) -> int:
    return sum(run.length for run in runs)


def _cut(runs: Sequence[_Run], start: int, length: int) -> list[_Run]:
    """The runs of ``length`` indices from the one at ``start`` on."""
    found: list[_Run] = []
    for run in runs:
        low, high = max(start, 0), min(start + length, run.length)
        if low < high:
            found.append(_Run(run.start + low, high - low))
        start -= run.length
    return found


def _take(runs: Sequence[_Run], positions: torch.Tensor) -> list[_Run]:
    """The runs of the indices at some positions, in their order."""
    if not positions.numel():
        return []
    breaks = torch.nonzero(positions.diff() != 1).flatten() + 1
    found: list[_Run] = []
    for part in torch.tensor_split(positions, breaks.tolist()):
        for run in _cut(runs, int(part[0]), part.numel()):
            last = found[-1] if found else None
            if last is not None and last.start + last.length == run.start:
                found[-1] = _Run(last.start, last.length + run.length)
            else:
                found.append(run)
    return found
