"""``read="stripes"`` on two GPUs with NCCL: values as stock, memory of a GPU within the budget, and failures."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.fresh_process import run_program
from tests.plugins.restored import flip_byte

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two CUDA devices"),
]

PROGRAM = Path(__file__).parent.parent / "plugins" / "shared_fits.py"
BUDGET_MIB = 16


def run(name: str, folder: Path) -> str:
    arguments = json.dumps([name, str(folder)])
    done = run_program(PROGRAM, 240, MEMLOAD_TEST_ARGUMENTS=arguments, MEMLOAD_TEST_ACCELERATOR="gpu")
    return f"{done.returncode} {done.stdout[-2000:]} {done.stderr[-8000:]}"


def results(folder: Path, name: str, printed: str) -> list[dict[str, Any]]:
    files = [folder / f"{name}.{rank}.json" for rank in range(2)]
    assert all(file.exists() for file in files), printed
    return [json.loads(file.read_text()) for file in files]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stripes")
    run("write", folder)
    for rank in range(2):
        (folder / f"damage{rank}").mkdir()
        shutil.copyfile(folder / "last.ckpt", folder / f"damage{rank}/last.ckpt")
    for number in range(4):
        flip_byte(folder / "damage1/last.ckpt", f"state_dict.middle.{number}.weight")
    return folder


def test_ranks_resume_as_stock(folder: Path) -> None:
    printed = run("gpus", folder)
    stock = results(folder, "stock", printed)
    for name in ("each", "stripes", "directory"):
        for expected, result in zip(stock, results(folder, name, printed), strict=True):
            assert result.get("error") is None, (name, printed)
            assert result["digest"] == expected["digest"], name
            assert result["report"]["read"] == ("each" if name == "each" else "stripes")
    first, second = results(folder, "stripes", printed)
    # The optimizer's steps on the CPU are read by each rank.
    assert abs(first["report"]["bytes_received"] - second["report"]["total"]["bytes_read"]) < 64 << 10
    each = results(folder, "each", printed)
    for alone, shared in zip(each, (first, second), strict=True):
        peaks = [r["report"]["total"]["peaks"]["cuda_allocated_peak_bytes"] for r in (alone, shared)]
        assert peaks[1] - peaks[0] <= (BUDGET_MIB + 2) << 20


def test_damage_of_one_rank_is_raised_on_both(folder: Path) -> None:
    printed = run("gpu_damage", folder)
    for result in results(folder, "damage", printed):
        assert result["type"] == "ChecksumError"
        assert f"{folder}/damage1/last.ckpt is damaged" in result["error"]


def test_killed_rank_is_named(folder: Path) -> None:
    """NCCL itself would wait for the dead rank."""
    printed = run("kill", folder)
    assert (folder / "killed.0.json").exists(), printed
    result = json.loads((folder / "killed.0.json").read_text())
    assert result["type"] == "MemloadError"
    assert "rank 1 failed, or was silent" in result["error"]
    assert result["seconds"] < 30
