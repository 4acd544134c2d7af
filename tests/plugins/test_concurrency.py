"""Several at once: processes on one file while another saves beside it, and Trainers in threads of one process."""

from __future__ import annotations

import os
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_memload import MemoryEfficientRestore
from tests.fresh_process import run_fresh
from tests.plugins.harness import TRUSTED, Case, TinyModule, adamw, make_trainer, write_checkpoint

RESUME = """
import os, time, warnings
warnings.simplefilter("ignore")
import torch
from lightning_memload import MemoryEfficientRestore, verify_checkpoint
from tests.plugins.harness import TRUSTED, TinyModule, adamw, make_trainer
RESULT = []
folder = __import__("pathlib").Path(ARGS["folder"])
(folder / f"ready-{os.getpid()}").touch()
while len(list(folder.glob("ready-*"))) < 3:
    time.sleep(0.01)
for _ in range(8):
    if ARGS["saves"]:
        from lightning_memload.save import save_torch
        # Beside it, and in its place: the same content, another file.
        state = torch.load(ARGS["path"], weights_only=False)
        for name in ("beside.ckpt", "checkpoint.ckpt"):
            save_torch(state, folder / name)
        RESULT.append(verify_checkpoint(folder / "beside.ckpt").is_verified)
        continue
    torch.manual_seed(0)
    module, restore = TinyModule(adamw), MemoryEfficientRestore()
    trainer = make_trainer(folder, [restore], max_epochs=1)
    trainer.fit(module, ckpt_path=ARGS["path"], **TRUSTED)
    RESULT.append([loss.item().hex() for loss in module.losses])
"""


def test_two_resume_while_a_third_saves(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.ckpt"
    os.replace(write_checkpoint(Case(lambda: TinyModule(adamw)), tmp_path), path)
    with ThreadPoolExecutor(3) as pool:
        futures = [
            pool.submit(run_fresh, RESUME, path=path, folder=tmp_path, saves=number == 2, timeout_seconds=120)
            for number in range(3)
        ]
        first, second, saver = [future.result().result for future in futures]
    assert saver == [True] * 8
    # Every resume saw the whole of one file or of the other, which hold the same.
    assert {tuple(losses) for losses in first} == {tuple(losses) for losses in second}
    assert len({tuple(losses) for losses in first}) == 1
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]


@pytest.mark.parametrize("same_file", [True, False])
def test_two_trainers_in_threads(same_file: bool, tmp_path: Path) -> None:
    paths = []
    for number, steps in enumerate((3, 5)):
        (tmp_path / str(number)).mkdir()
        paths.append(write_checkpoint(Case(lambda: TinyModule(adamw), save_after=steps), tmp_path / str(number)))
    if same_file:
        paths[1] = paths[0]
    barrier = threading.Barrier(2)

    def fit(path: Path) -> tuple[dict[str, Any], list[float], MemoryEfficientRestore]:
        module, restore = TinyModule(adamw), MemoryEfficientRestore()
        module.drop.p = 0.0  # the generator of random numbers belongs to the process
        trainer = make_trainer(path.parent, [restore], max_epochs=1)
        trainer.fit(module, ckpt_path=path, **TRUSTED)
        return dict(module.state_dict()), [loss.item() for loss in module.losses], restore

    def together(path: Path) -> Any:
        barrier.wait()
        return fit(path)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = [fit(path) for path in paths]
        with ThreadPoolExecutor(2) as pool:
            actual = list(pool.map(together, paths))
    for path, (state, losses, _), (other, other_losses, restore) in zip(paths, expected, actual, strict=True):
        assert other_losses == losses
        assert all(torch.equal(state[name], other[name]) for name in state)
        assert restore.report is not None
        assert restore.report.path == str(path)
