"""The regions of every placement, against torch's own distribution of a tensor. One process plays every rank."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from lightning_memload.distributed.shards import Region, are_rows, local_regions, local_shape, regions_of


def strided(dim: int, split_factor: int) -> Any:
    from torch.distributed.tensor.placement_types import _StridedShard

    return _StridedShard(dim, split_factor=split_factor)


def reference(full: torch.Tensor, mesh_shape: Sequence[int], coordinate: Sequence[int], placements: Any) -> Any:
    """The local tensor as torch cuts it, one placement after the other."""
    for size, position, placement in zip(mesh_shape, coordinate, placements, strict=True):
        if not placement.is_replicate():
            parts, _ = placement._split_tensor(full, size, with_padding=False, contiguous=False)
            full = parts[position]
    return full


def assemble(full: torch.Tensor, regions: Sequence[Region], shape: Sequence[int]) -> torch.Tensor:
    local = torch.full(tuple(shape), -1)
    for region in regions:
        there = tuple(slice(start, start + n) for start, n in zip(region.starts, region.shape, strict=True))
        here = tuple(slice(start, start + n) for start, n in zip(region.local_starts, region.shape, strict=True))
        local[here] = full[there]
    return local


S0, S1, R = Shard(0), Shard(1), Replicate()
PLACEMENTS = {
    "rows": ((2,), (S0,)),
    "rows of four": ((4,), (S0,)),
    "columns": ((3,), (S1,)),
    "replicas": ((2,), (R,)),
    "rows and columns": ((2, 2), (S0, S1)),
    "rows twice": ((2, 2), (S0, S0)),
    "rows of replicas": ((2, 3), (R, S0)),
    "columns twice": ((2, 2), (S1, S1)),
    "fsdp of columns": ((2, 2), (strided(0, 2), S0)),
    "fsdp of many columns": ((2, 3), (strided(0, 3), S0)),
    "strided alone": ((2,), (strided(0, 2),)),
    "strided columns": ((2, 2), (strided(1, 2), R)),
    "three dimensions": ((2, 2, 2), (strided(0, 2), S0, S1)),
}
SHAPES = ((8, 6), (7, 5), (5, 1), (1, 3), (3, 0), (2, 9, 2), (12, 12))


@pytest.mark.parametrize("name", PLACEMENTS)
def test_regions_are_those_of_torch(name: str) -> None:
    mesh_shape, placements = PLACEMENTS[name]
    for shape in SHAPES:
        full = torch.arange(math.prod(shape)).view(shape)
        for coordinate in itertools.product(*map(range, mesh_shape)):
            where = (shape, mesh_shape, coordinate, placements)
            regions, sizes = local_regions(*where), local_shape(*where)
            expected = reference(full, mesh_shape, coordinate, placements)
            assert regions is not None
            assert sizes == tuple(expected.shape), where
            assert torch.equal(assemble(full, regions, sizes), expected), where
            assert sum(math.prod(region.shape) for region in regions) == expected.numel()


def test_scalars_are_one_region() -> None:
    assert local_regions((), (2,), (1,), (R,)) == (Region((), (), ()),)
    assert local_shape((), (2,), (1,), (R,)) == ()


def test_unknown_placements_have_no_regions() -> None:
    assert local_regions((4,), (2,), (0,), (Partial(),)) is None
    assert local_shape((4,), (2,), (0,), (Partial(),)) is None


@pytest.mark.parametrize(
    ("shape", "mesh_shape", "placements", "expected"),
    [
        ((8, 4), (2,), (S0,), True),
        ((8, 4), (2,), (S1,), False),
        ((1, 4), (2,), (S1,), True),
        ((8, 4), (2, 1), (S0, S1), True),
        ((8, 4), (2, 2), (S0, R), True),
        ((8, 4), (2, 2), (strided(0, 2), S0), True),
        ((8, 4), (2, 2), (S0, S1), False),
        ((8, 4), (2,), (R,), True),
    ],
)
def test_rows_are_contiguous(
    shape: tuple[int, ...], mesh_shape: tuple[int, ...], placements: Any, expected: bool
) -> None:
    assert are_rows(shape, mesh_shape, placements) is expected


def test_of_a_distributed_tensor() -> None:
    """Against ``distribute_tensor`` on a real mesh, for every rank of a process group that sends nothing."""
    full = torch.arange(35).view(7, 5)
    for rank in range(4):
        torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=4)
        try:
            mesh = DeviceMesh("cpu", torch.arange(4).view(2, 2))
            for placements in ((S0, S1), (R, S0), (S0, S0), (S1, R)):
                tensor = distribute_tensor(full, mesh, placements, src_data_rank=None)
                regions = regions_of(tensor)
                assert regions is not None
                local = tensor.to_local()
                assert torch.equal(assemble(full, regions, local.shape), local)
            inner = DeviceMesh("cpu", [(rank + 1) % 4])
            assert regions_of(distribute_tensor(full, inner, [S0], src_data_rank=None)) is None
        finally:
            torch.distributed.destroy_process_group()
