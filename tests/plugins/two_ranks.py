"""A training of two processes with gloo, stock or with the callback."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.fresh_process import run_program

# Run as __main__, so that every rank finds the classes again.
PROGRAM = """
import json
import os
import pathlib
import warnings

warnings.simplefilter("ignore")
import tests.lightning as L
import torch

from lightning_memload import MemoryEfficientRestore
from lightning_memload.restore import striping
from tests.plugins.harness import TRUSTED, TinyModule, adamw, make_trainer


class Writing(L.Callback):
    def __init__(self, folder, restore):
        self.folder, self.restore = folder, restore

    def on_train_end(self, trainer, pl_module):
        report = self.restore and self.restore.report
        result = {
            "losses": [loss.item().hex() for loss in pl_module.losses],
            "weights": [p.detach().flatten()[0].item().hex() for p in pl_module.parameters()],
            "report": report and report.as_dict(),
            "held": sum(ARGUMENTS["path"] in line for line in open("/proc/self/maps")),
            "ours": type(trainer.strategy.checkpoint_io).__name__,
        }
        (pathlib.Path(self.folder) / f"{trainer.global_rank}.json").write_text(json.dumps(result))


def main(path, folder, strategy, ours, worth_bytes=None, **options):
    if worth_bytes is not None:
        striping._WORTH_BYTES = worth_bytes
    torch.manual_seed(2)
    module = TinyModule(adamw)
    restore = MemoryEfficientRestore(**options) if ours else None
    callbacks = [Writing(folder, restore), *([restore] if ours else [])]
    trainer = make_trainer(folder, callbacks, max_epochs=2, devices=2, strategy=strategy)
    trainer.fit(module, ckpt_path=path, **TRUSTED)
    if strategy != "ddp":
        weights = [p.detach().flatten()[0].item().hex() for p in module.parameters()]
        (pathlib.Path(folder) / "main.json").write_text(json.dumps(weights))


ARGUMENTS = json.loads(os.environ["MEMLOAD_TEST_ARGUMENTS"])
if __name__ == "__main__":
    main(**ARGUMENTS)
"""


def ranks(path: Path, folder: Path, strategy: str, *, ours: bool, **options: Any) -> list[dict[str, Any]]:
    folder.mkdir()
    program = folder / "program.py"
    program.write_text(PROGRAM)
    arguments = {"path": str(path), "folder": str(folder), "strategy": strategy, "ours": ours, **options}
    done = run_program(program, MEMLOAD_TEST_ARGUMENTS=json.dumps(arguments))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]
