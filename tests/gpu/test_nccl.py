"""Two GPUs with NCCL, one process for each: ranks train as stock, and none waits for one that takes no part."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.fresh_process import run_program

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two CUDA devices"),
]

# Run as __main__ by both ranks. All fits share one process group; what stock does comes first.
PROGRAM = """
import json
import os
import pathlib
import warnings

warnings.simplefilter("ignore")
import torch

from lightning_memload import MemoryEfficientRestore, meta_init
from tests.plugins.harness import TRUSTED, TinyModule, adamw, make_trainer

FOLDER = pathlib.Path(os.environ["MEMLOAD_TEST_FOLDER"])
RANK = int(os.environ.get("LOCAL_RANK", 0))


def fit(name, restore, *, meta=False, path="last.ckpt", save=None, **options):
    torch.manual_seed(2)
    with meta_init(enabled=meta):
        module = TinyModule(adamw)
    torch.manual_seed(3)  # meta_init draws nothing
    trainer = make_trainer(
        FOLDER, [restore] if restore else [], accelerator="gpu", devices=2, strategy="ddp", max_epochs=2, **options
    )
    trainer.fit(module, ckpt_path=path and FOLDER / path, **TRUSTED)
    if save:
        trainer.save_checkpoint(FOLDER / save)
    result = {
        "losses": [loss.item().hex() for loss in module.losses],
        "weights": [p.detach().flatten()[0].item().hex() for p in module.parameters()],
        "report": restore and restore.report and restore.report.as_dict(),
        "seen": bool(save) and (FOLDER / save).exists(),
    }
    (FOLDER / f"{name}.{RANK}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    fit("stock", None)
    fit("callback", MemoryEfficientRestore())
    fit("meta_init", MemoryEfficientRestore(), meta=True)
    fit("rank 0 only", MemoryEfficientRestore() if RANK == 0 else None)
    fit("rank 1 only", MemoryEfficientRestore() if RANK == 1 else None)
    fit("damaged", MemoryEfficientRestore(on_corrupt="previous"), path="damaged.ckpt")
    fit("asynchronous", MemoryEfficientRestore(asynchronous_save=True), save="saved.ckpt")
"""


def test_ranks_train_as_stock(tmp_path: Path) -> None:
    """Callback on all ranks or on one, ``meta_init``, a damaged file, a save at the end."""
    from tests.plugins.harness import Case, TinyModule, adamw, write_checkpoint
    from tests.plugins.restored import flip_byte

    path = write_checkpoint(Case(lambda: TinyModule(adamw)), tmp_path)
    (tmp_path / "damaged.ckpt").write_bytes(path.read_bytes())
    flip_byte(tmp_path / "damaged.ckpt", "state_dict.second.weight")
    path.rename(tmp_path / "last.ckpt")
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    done = run_program(program, timeout_seconds=240, MEMLOAD_TEST_FOLDER=str(tmp_path))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]

    def results(name: str) -> list[dict[str, Any]]:
        return [json.loads((tmp_path / f"{name}.{rank}.json").read_text()) for rank in range(2)]

    stock = results("stock")
    reporting = {"callback": [0, 1], "meta_init": [0, 1], "rank 0 only": [0], "rank 1 only": [1], "damaged": [0, 1]}
    for name, ranks in {**reporting, "asynchronous": [0, 1]}.items():
        for rank, (expected, actual) in enumerate(zip(stock, results(name), strict=True)):
            assert expected["losses"]
            assert actual["losses"] == expected["losses"], name
            assert actual["weights"] == expected["weights"], name
            assert (actual["report"] is not None) is (rank in ranks), name
            if rank in ranks:
                assert actual["report"]["maxima_ranks"] == ranks, name
    assert [result["seen"] for result in results("asynchronous")] == [True, True]
