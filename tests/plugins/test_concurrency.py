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
from lightning_memload.save import save_directory, save_torch
from tests.fresh_process import run_fresh
from tests.plugins.harness import TRUSTED, Case, TinyModule, adamw, make_trainer, write_checkpoint

RESUME = """
import os, time, warnings
warnings.simplefilter("ignore")
import torch
from lightning_memload import MemoryEfficientRestore, verify_checkpoint
from lightning_memload.save import save_directory, save_torch
from tests.plugins.harness import TRUSTED, TinyModule, adamw, make_trainer
RESULT = []
folder = __import__("pathlib").Path(ARGS["folder"])
save = {"torch": save_torch, "directory": save_directory}[ARGS["format"]]
(folder / f"ready-{os.getpid()}").touch()
while len(list(folder.glob("ready-*"))) < ARGS["others"]:
    time.sleep(0.01)
for number in range(ARGS["times"]):
    if ARGS["saves"]:
        # Beside it, and in its place: two states of the same sizes in turn.
        state = torch.load(ARGS["states"][number % 2], weights_only=False)
        for name in ("beside.ckpt", "last.ckpt"):
            save(state, folder / name)
        RESULT.append(verify_checkpoint(folder / "beside.ckpt").is_verified)
        continue
    torch.manual_seed(0)
    module, restore = TinyModule(adamw), MemoryEfficientRestore()
    trainer = make_trainer(folder, [restore], max_epochs=1)
    trainer.fit(module, ckpt_path=folder / "last.ckpt", **TRUSTED)
    RESULT.append([loss.item().hex() for loss in module.losses])
"""


@pytest.mark.first("format")
@pytest.mark.parametrize("format", ["torch", "directory"])
@pytest.mark.lightning_only
@pytest.mark.long
def test_two_resume_while_a_third_saves(format: str, tmp_path: Path) -> None:
    states, expected = [], []
    for steps in (3, 5):
        (tmp_path / str(steps)).mkdir()
        path = write_checkpoint(Case(lambda: TinyModule(adamw), save_after=steps), tmp_path / str(steps))
        states.append(str(path))
        torch.manual_seed(0)
        module = TinyModule(adamw)
        make_trainer(tmp_path, max_epochs=1).fit(module, ckpt_path=path, **TRUSTED)
        expected.append([loss.item().hex() for loss in module.losses])
    save = {"torch": save_torch, "directory": save_directory}[format]
    save(torch.load(states[0], weights_only=False), tmp_path / "last.ckpt")
    arguments: dict[str, Any] = {"folder": tmp_path, "states": states, "format": format, "others": 3}
    with ThreadPoolExecutor(3) as pool:
        futures = [
            pool.submit(run_fresh, RESUME, **arguments, saves=saves, times=30 if saves else 8, timeout_seconds=120)
            for saves in (False, False, True)
        ]
        first, second, saver = [future.result().result for future in futures]
    assert saver == [True] * 30
    # Every resume saw the whole of one state or of the other.
    assert len(first) == len(second) == 8
    assert all(losses in expected for losses in (*first, *second))
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
