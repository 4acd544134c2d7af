"""The host memory of a conversion, beside that of the ordinary way: load all, change it, save it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.formats.dcp_shards import sharded, write_shards
from tests.fresh_process import run_fresh

MEASURE = """
import torch
from lightning_memload import MemoryMonitor, convert_checkpoint
for name in ("small.pt", "small.safetensors"):
    convert_checkpoint(ARGS["small"], ARGS["target"] + name, dtype=torch.bfloat16)
with MemoryMonitor() as monitor:
    if ARGS["way"] == "stock":
        state = torch.load(ARGS["origin"], mmap=False, weights_only=True)
        torch.save(state, ARGS["target"])
    else:
        dtype = torch.bfloat16 if ARGS["way"] == "dtype" else None
        options = {"shard_bytes": 50 << 20} if ARGS["way"] == "shards" else {}
        convert_checkpoint(ARGS["origin"], ARGS["target"], dtype=dtype, **options)
RESULT = monitor.peaks.anonymous_above_start_bytes
"""


@pytest.mark.memory
@pytest.mark.parametrize("kind", ["torch", "turned", "dcp"])
@pytest.mark.first("kind")
def test_memory_is_bounded(kind: str, tmp_path: Path) -> None:
    weights = {f"layer{number}": torch.randn(4 << 20).view(2048, -1) for number in range(12)}  # 192 MiB
    total = sum(tensor.nbytes for tensor in weights.values())
    source = tmp_path / "source.pt"
    if kind == "dcp":
        write_shards(tmp_path / "source", {name: sharded(tensor, 2, 2) for name, tensor in weights.items()})
        source = tmp_path / "source"
    else:
        torch.save({name: tensor.t() if kind == "turned" else tensor for name, tensor in weights.items()}, source)
    torch.save({"layer": torch.ones(4)}, tmp_path / "small.pt")
    paths: dict[str, Any] = {"origin": source, "small": tmp_path / "small.pt"}
    if kind == "torch":
        assert run_fresh(MEASURE, way="stock", target=tmp_path / "stock.pt", **paths).result > total
    ways = [("plain", "a.pt"), ("dtype", "b.safetensors")]
    for way, target in ways + [("dtype", "c.pt"), ("shards", "d")] * (kind == "torch"):
        peak = run_fresh(MEASURE, way=way, target=str(tmp_path / target), **paths).result
        # Some MiB for each thread, and what the allocator keeps of them.
        assert peak < total / 2, (way, target)


CONVERT = """
from lightning_memload import convert_checkpoint
convert_checkpoint(ARGS["origin"], ARGS["target"])
RESULT = True
"""
# What `python -m lightning.fabric.utilities.consolidate_checkpoint` does.
CONSOLIDATE = """
import pathlib
import torch
from tests.lightning.fabric.utilities.load import _load_distributed_checkpoint
torch.save(_load_distributed_checkpoint(pathlib.Path(ARGS["origin"])), ARGS["target"])
RESULT = True
"""


@pytest.mark.memory
@pytest.mark.cgroup
@pytest.mark.long
def test_consolidates_under_a_memory_limit(tmp_path: Path) -> None:
    weights = {f"layer{number}": torch.randn(16 << 20) for number in range(10)}  # 640 MiB
    write_shards(tmp_path / "source", {name: sharded(tensor, 2) for name, tensor in weights.items()})
    paths: dict[str, Any] = {"origin": tmp_path / "source", "memory_limit_bytes": 600 << 20}
    assert run_fresh(CONSOLIDATE, target=tmp_path / "stock.pt", **paths).killed
    assert run_fresh(CONVERT, target=tmp_path / "ours.pt", **paths).result is True
    found = torch.load(tmp_path / "ours.pt", mmap=True)
    assert all(torch.equal(found[name], tensor) for name, tensor in weights.items())
