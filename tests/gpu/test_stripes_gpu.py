"""``read="stripes"`` on two GPUs with NCCL: values as stock, memory of a GPU within the budget, and failures."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.plugins.restored import flip_byte
from tests.plugins.shared_runs import results_of, run_two_ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two CUDA devices"),
]

BUDGET_MIB = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stripes")
    run_two_ranks("write", folder, "gpu")
    for rank in range(2):
        (folder / f"damage{rank}").mkdir()
        shutil.copyfile(folder / "last.ckpt", folder / f"damage{rank}/last.ckpt")
    for number in range(4):
        flip_byte(folder / "damage1/last.ckpt", f"state_dict.middle.{number}.weight")
    return folder


def test_ranks_resume_as_stock(folder: Path) -> None:
    printed = run_two_ranks("gpus", folder, "gpu")
    stock = results_of(folder, "stock", printed)
    for name in ("each", "stripes", "directory"):
        for expected, result in zip(stock, results_of(folder, name, printed), strict=True):
            assert result.get("error") is None, (name, printed)
            assert result["digest"] == expected["digest"], name
            assert result["report"]["read"] == ("each" if name == "each" else "stripes")
    first, second = results_of(folder, "stripes", printed)
    # The optimizer's steps on the CPU are read by each rank.
    assert abs(first["report"]["bytes_received"] - second["report"]["total"]["bytes_read"]) < 64 << 10
    each = results_of(folder, "each", printed)
    for alone, shared in zip(each, (first, second), strict=True):
        peaks = [r["report"]["total"]["peaks"]["cuda_allocated_peak_bytes"] for r in (alone, shared)]
        assert peaks[1] - peaks[0] <= (BUDGET_MIB + 2) << 20


def test_damage_of_one_rank_is_raised_on_both(folder: Path) -> None:
    printed = run_two_ranks("gpu_damage", folder, "gpu")
    for result in results_of(folder, "damage", printed):
        assert result["type"] == "ChecksumError"
        assert f"{folder}/damage1/last.ckpt is damaged" in result["error"]


def test_killed_rank_is_named(folder: Path) -> None:
    """NCCL itself would wait for the dead rank."""
    printed = run_two_ranks("kill", folder, "gpu")
    assert (folder / "killed.0.json").exists(), printed
    result = json.loads((folder / "killed.0.json").read_text())
    assert result["type"] == "MemloadError"
    assert "rank 1 failed, or was silent" in result["error"]
    assert result["seconds"] < 30
