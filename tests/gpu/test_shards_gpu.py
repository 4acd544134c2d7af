"""Two GPUs with NCCL under ModelParallelStrategy: each rank restores its shards, as stock does, with less memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_memload import open_checkpoint
from tests.plugins.sharded_ranks import run_ranks, write_single

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two CUDA devices"),
]
MIB = 1 << 20


def test_ranks_train_as_stock_from_less_memory(tmp_path: Path) -> None:
    for kind in ("plain", "large"):
        write_single(tmp_path / f"{kind}.ckpt", kind)
    large = {"dp": 2, "path": tmp_path / "large.ckpt", "kind": "large", "memory": True}
    runs: list[dict[str, Any]] = [
        {"name": "memory", "ours": {"host_budget_mib": 16}, **large},
        {"name": "memory stock", **large},
    ]
    for name, sizes in {"fsdp": {"dp": 2}, "tp": {"tp": 2}}.items():
        runs.append({"name": f"{name} stock", "path": tmp_path / "plain.ckpt", **sizes})
        runs.append({"name": name, "path": tmp_path / "plain.ckpt", "ours": {}, **sizes})
    common = {"max_epochs": 2, "accelerator": "gpu"}
    results = run_ranks(tmp_path / "two", [{**common, **arguments} for arguments in runs], 2)
    for name in ("fsdp", "tp"):
        for ours, stock in zip(results[name], results[f"{name} stock"], strict=True):
            assert ours["error"] is None
            assert ours["warnings"] == []
            for part in ("weights", "states", "groups", "losses"):
                assert ours[part] == stock[part], (name, part)
    nbytes = sum(storage.nbytes for storage in open_checkpoint(tmp_path / "plain.ckpt").storages)
    assert sum(result["report"]["total"]["bytes_read"] for result in results["fsdp"]) <= 1.02 * nbytes
    states = 2 * 32 * MIB
    for ours, stock in zip(results["memory"], results["memory stock"], strict=True):
        assert ours["above_start"] <= (16 + 64) * MIB
        assert ours["gpu_above_start"] <= 1.02 * states + 4 * MIB
        assert stock["gpu_above_start"] > 1.3 * states
