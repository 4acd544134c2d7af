"""Shards of a file, read rank by rank: the values, the checksums of all ranks together, and the order of optimizers.

The ranks are played one after the other, in a process group that sends nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from lightning_memload import save_directory
from lightning_memload.errors import ChecksumError
from lightning_memload.formats import load_mapped
from lightning_memload.restore import (
    RestoreSession,
    ShardedOptimizer,
    ShardReader,
    ShardTarget,
    Unshardable,
    plan_sharded_weights,
)
from lightning_memload.transfer import LazyRing, choose_layout
from tests.formats.files import save_dcp

S0, S1, R = Shard(0), Shard(1), Replicate()
MIB = 1 << 20


@contextmanager
def played(rank: int, world_size: int) -> Iterator[None]:
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def session_of(path: Path, **options: Any) -> tuple[Any, RestoreSession]:
    loaded, mapped = load_mapped(path, weights_only=True)
    ring = LazyRing(choose_layout(16 * MIB, 2), pinned=False)
    return loaded, RestoreSession(mapped, device=torch.device("cpu"), ring=ring, **options)


def strided(dim: int, split_factor: int) -> Any:
    from torch.distributed.tensor.placement_types import _StridedShard

    return _StridedShard(dim, split_factor=split_factor)


BASE = torch.randn(9, 6)
VALUES = {
    "matrix": torch.randn(37, 30),
    "columns": torch.randn(64, 33, dtype=torch.float64),
    "row": torch.randn(1, 129),
    "half": torch.randn(50, 3, 2).half(),
    "turned": torch.randn(21, 40).t(),
    "part": BASE[2:5],
    "other part": BASE[4:],
    "scalar": torch.tensor(3.5),
    "small": torch.arange(3),
}
LAYOUTS: dict[str, tuple[tuple[int, ...], Callable[[torch.Tensor], Any]]] = {
    "rows": ((2,), lambda value: [S0]),
    "columns": ((2,), lambda value: [Shard(value.dim() - 1)]),
    "both": ((2, 2), lambda value: [S0, Shard(value.dim() - 1)]),
    "replicas": ((2, 2), lambda value: [R, S0]),
    "strided": ((2, 2), lambda value: [strided(0, 2), S0]),
    "whole": ((3,), lambda value: [R]),
}


def write(path: Path, form: str) -> None:
    if form == "zip":
        torch.save(VALUES, path)
    elif form == "directory":
        save_directory(VALUES, path)
    else:
        save_dcp(dict(VALUES), path)


@pytest.mark.parametrize("form", ["zip", "directory", "dcp"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_rank_gets_its_values(layout: str, form: str, tmp_path: Path) -> None:
    write(tmp_path / "state", form)
    sizes, place = LAYOUTS[layout]
    num_ranks = int(torch.tensor(sizes).prod())
    told, readers = {}, []
    for rank in range(num_ranks):
        with played(rank, num_ranks):
            mesh = DeviceMesh("cpu", torch.arange(num_ranks).view(sizes))
            loaded, session = session_of(tmp_path / "state")
            expected = {
                name: distribute_tensor(value, mesh, place(value), src_data_rank=None) if value.dim() else value
                for name, value in VALUES.items()
            }
            tensors = {
                name: distribute_tensor(zeros, mesh, place(zeros), src_data_rank=None) if zeros.dim() else zeros
                for name, zeros in {n: torch.zeros_like(v, dtype=torch.float64) for n, v in VALUES.items()}.items()
            }
            reader = ShardReader(session, rank, num_ranks)
            told[rank] = reader.read([ShardTarget.of(name, loaded[name], tensors[name]) for name in VALUES])
            readers.append(reader)
            for name, value in expected.items():
                found, wanted = (v.to_local() if isinstance(v, DTensor) else v for v in (tensors[name], value))
                assert torch.equal(found, wanted.double()), name
            assert session.bytes_copied_ordinarily == 0
            session.close()
    for reader in readers:
        reader.compare(told)
        assert reader.unverified_bytes == 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_damage_anywhere_is_found_by_all_ranks_together(layout: str, tmp_path: Path) -> None:
    torch.save(VALUES, tmp_path / "state")
    _, mapped = load_mapped(tmp_path / "state", weights_only=True)
    sizes, place = LAYOUTS[layout]
    num_ranks = int(torch.tensor(sizes).prod())
    data = (tmp_path / "state").read_bytes()
    for tensor in mapped.index:
        for position in {0, tensor.storage.nbytes // 2, tensor.storage.nbytes - 1}:
            damaged = bytearray(data)
            damaged[tensor.storage.offset + position] ^= 1
            (tmp_path / "state").write_bytes(damaged)
            told, readers, alone = {}, [], 0
            for rank in range(num_ranks):
                with played(rank, num_ranks):
                    mesh = DeviceMesh("cpu", torch.arange(num_ranks).view(sizes))
                    loaded, session = session_of(tmp_path / "state")
                    value = VALUES[tensor.name]
                    whole = torch.zeros_like(value)
                    target = distribute_tensor(whole, mesh, place(value), src_data_rank=None) if value.dim() else whole
                    readers.append(ShardReader(session, rank, num_ranks))
                    try:
                        told[rank] = readers[-1].read([ShardTarget.of(tensor.name, loaded[tensor.name], target)])
                    except ChecksumError:
                        alone += 1
            if alone:
                assert alone == num_ranks
                continue
            for reader in readers:
                with pytest.raises(ChecksumError, match=r"is damaged: .* Read in parts by rank"):
                    reader.compare(told)


def test_a_replica_that_read_other_bytes_is_damage(tmp_path: Path) -> None:
    torch.save(VALUES, tmp_path / "state")
    told = {}
    for rank in range(4):
        with played(rank, 4):
            mesh = DeviceMesh("cpu", torch.arange(4).view(2, 2))
            loaded, session = session_of(tmp_path / "state")
            target = distribute_tensor(torch.zeros(37, 30), mesh, [R, S0], src_data_rank=None)
            reader = ShardReader(session, rank, 4)
            told[rank] = reader.read([ShardTarget.of("matrix", loaded["matrix"], target)])
    ((offset, nbytes, crc32),) = told[3]
    assert told[1] == told[3]
    with pytest.raises(ChecksumError, match="matrix"):
        reader.compare({**told, 3: [(offset, nbytes, crc32 ^ 1)]})


def test_what_no_rank_has_read_is_counted(tmp_path: Path) -> None:
    torch.save(VALUES, tmp_path / "state")
    with played(0, 2):
        mesh = DeviceMesh("cpu", torch.arange(2))
        loaded, session = session_of(tmp_path / "state")
        target = distribute_tensor(torch.zeros(37, 30), mesh, [S0], src_data_rank=None)
        reader = ShardReader(session, 0, 2)
        reader.compare({0: reader.read([ShardTarget.of("matrix", loaded["matrix"], target)])})
        assert reader.unverified_bytes == 37 * 30 * 4


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 8)
        self.frozen = nn.Linear(3, 4).requires_grad_(False)
        self.second = nn.Linear(8, 2)

    def shard(self, position: int = 0) -> Mixed:
        """Shards the module for rank 0, at a position of the mesh. torch caches specifications of equal meshes."""
        mesh = DeviceMesh("cpu", torch.arange(2).roll(position))
        for child in (self.first, self.frozen, self.second):
            for name, parameter in list(child.named_parameters()):
                value = distribute_tensor(parameter.detach(), mesh, [S0], src_data_rank=None)
                setattr(child, name, nn.Parameter(value, parameter.requires_grad))
        return self


def trained(module: nn.Module, groups: Callable[[nn.Module], Any]) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(groups(module))
    for parameter in module.parameters():
        parameter.grad = torch.randn_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    return optimizer


def in_order(module: Any) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def mixed_groups(module: Any) -> list[dict[str, Any]]:
    return [
        {"params": [module.second.weight, module.first.weight], "weight_decay": 0.5},
        {"params": [module.first.bias, module.second.bias], "weight_decay": 0.0},
    ]


def by_module(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """As Lightning's ModelParallelStrategy numbers the states of a file of its own."""
    saved = optimizer.state_dict()
    place = {id(parameter): number for number, parameter in enumerate(module.parameters())}
    numbers = [place[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
    return {
        "state": {numbers[key]: value for key, value in saved["state"].items()},
        "param_groups": [
            {**group, "params": sorted(numbers[key] for key in group["params"])} for group in saved["param_groups"]
        ],
    }


def by_name(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    saved = optimizer.state_dict()
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    keys = [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
    return {
        "state": {keys[key]: value for key, value in saved["state"].items()},
        "param_groups": [
            {**group, "params": [keys[key] for key in reversed(group["params"])]} for group in saved["param_groups"]
        ],
    }


@pytest.mark.parametrize("numbered", [lambda module, optimizer: optimizer.state_dict(), by_module, by_name])
@pytest.mark.parametrize("groups", [in_order, mixed_groups])
def test_states_belong_to_their_parameters(numbered: Any, groups: Any, tmp_path: Path) -> None:
    torch.manual_seed(1)
    whole = Mixed()
    optimizer = trained(whole, groups)
    torch.save({"states": numbered(whole, optimizer)}, tmp_path / "state")
    for rank in range(2):
        with played(0, 2):
            module = Mixed().shard(rank)
            loaded, session = session_of(tmp_path / "state")
            sharded = torch.optim.AdamW(groups(module))
            plan = ShardedOptimizer(sharded, loaded["states"], module, name="optimizer", strict=True)
            assert plan.needed_bytes[torch.device("cpu")] > 0
            ShardReader(session, rank, 2).read(plan.allocate())
            plan.load()
            session.close()
            assert [group["weight_decay"] for group in sharded.param_groups] == [
                group["weight_decay"] for group in optimizer.param_groups
            ]
            for parameter, like in zip(module.parameters(), whole.parameters(), strict=True):
                state, expected = sharded.state.get(parameter, {}), optimizer.state.get(like, {})
                assert state.keys() == expected.keys()
                for key, value in state.items():
                    part = value.to_local() if isinstance(value, DTensor) else value
                    wanted = torch.chunk(expected[key], 2)[rank] if expected[key].dim() else expected[key]
                    assert torch.equal(part, wanted)


class Own(torch.optim.SGD):
    def load_state_dict(self, state_dict: Any) -> None:
        super().load_state_dict(state_dict)


class Narrow(torch.optim.SGD):
    """Its states have another shape than its parameters."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["rows"] = torch.ones(parameter.shape[0] + 1)


@pytest.mark.parametrize(
    ("make", "saved", "reason"),
    [
        (Own, None, "has a load_state_dict of its own"),
        (Narrow, None, r"has shape \(9,\), its parameter \(8, 3\)"),
        (torch.optim.SGD, {"state": {}, "param_groups": [{"params": [0, 1]}]}, "other groups of parameters"),
        (torch.optim.SGD, {"state": {}, "param_groups": [{"params": ["first.weight"]}]}, "does not list first.bias"),
        (torch.optim.SGD, {"state": {}, "param_groups": [{"params": [0, "first.bias"]}]}, "by names and by numbers"),
    ],
)
def test_what_is_left_to_stock(make: Any, saved: Any, reason: str) -> None:
    whole = Mixed()
    optimizer = make(in_order(whole), 0.1)
    optimizer.step()
    saved = saved or optimizer.state_dict()
    with played(0, 2):
        module = Mixed().shard()
        with pytest.raises(Unshardable, match=reason):
            ShardedOptimizer(make(in_order(module), 0.1), saved, module, name="optimizer", strict=True)


def test_an_order_that_may_be_two_is_left_to_stock() -> None:
    whole = Mixed()
    del whole.frozen
    optimizer = torch.optim.SGD([*whole.parameters()][::-1], 0.1)
    with played(0, 2), pytest.raises(Unshardable, match="in the order of the module or in that of the optimizer"):
        ShardedOptimizer(optimizer, optimizer.state_dict(), whole, name="optimizer", strict=True)


def test_without_strict_loading_stock_fills_in_missing_states() -> None:
    whole = Mixed()
    optimizer = torch.optim.SGD(in_order(whole), 0.1, 0.9)
    with played(0, 2), pytest.raises(Unshardable, match=r"has no state of first\.weight"):
        ShardedOptimizer(optimizer, optimizer.state_dict(), whole, name="optimizer", strict=False)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda module, weights: weights.update({"first.weight": torch.ones(4)}), r"\(4,\) on disk and \(8, 3\) here"),
        (lambda module, weights: weights.update({"first.weight": 5}), "is a int"),
        (lambda module, weights: module.register_buffer("view", module.plain[1:]), "share memory"),
        (lambda module, weights: partial(module), "not supported"),
    ],
)
def test_weights_that_are_left_to_stock(change: Any, reason: str) -> None:
    with played(0, 2):
        module = Mixed().shard()
        module.register_buffer("plain", torch.zeros(5))
        weights = {name: torch.zeros(value.shape) for name, value in module.state_dict().items()}
        weights["view"] = torch.zeros(4)
        change(module, weights)
        with pytest.raises(Unshardable, match=reason):
            plan_sharded_weights(module, weights, strict=True)


def partial(module: Any) -> None:
    value = DTensor.from_local(torch.zeros(8, 3), DeviceMesh("cpu", torch.arange(2)), [Partial()])
    module.first.weight = nn.Parameter(value)


def test_a_module_without_shards_is_left_to_stock() -> None:
    with pytest.raises(Unshardable, match="no parameter is a DTensor"):
        plan_sharded_weights(nn.Linear(2, 2), {}, strict=True)
