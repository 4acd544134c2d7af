"""On a real GPU: what ``fit`` leaves on the device, and what that spares the host."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import tests.lightning as L
from lightning_memload import MemoryEfficientRestore
from tests.fresh_process import run_fresh

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]

WIDTH = 4096
NUM_LAYERS = 8
# Weights and two states of AdamW.
STATE_BYTES = 3 * NUM_LAYERS * WIDTH * WIDTH * 4


class Net(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(NUM_LAYERS)))

    def configure_model(self) -> None:
        self.to("cuda")

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.layers(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters())


def measure(folder: str, *, keep: bool) -> dict[str, Any]:
    """Trains two steps; tells where everything is, and what the teardown added to the memory of the host."""
    import warnings

    from lightning_memload.memory.host import read_status

    warnings.simplefilter("ignore")
    before = 0

    class Look(L.Callback):
        # Lightning's teardown comes before the callbacks'.
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            nonlocal before
            before = read_status().anonymous_bytes or 0

    data: Any = torch.utils.data.DataLoader(torch.randn(4, WIDTH), batch_size=2)  # type: ignore[arg-type]
    trainer = L.Trainer(
        max_steps=2, accelerator="gpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        default_root_dir=folder, callbacks=[MemoryEfficientRestore(keep_on_device=keep), Look()],
    )  # fmt: skip
    module = Net()
    trainer.fit(module, data)
    states = [value for state in trainer.optimizers[0].state.values() for value in state.values() if value.dim()]
    result = {
        "grown_bytes": (read_status().anonymous_bytes or 0) - before,
        "devices": sorted({tensor.device.type for tensor in [*module.parameters(), *states]}),
    }
    trainer.save_checkpoint(Path(folder, "after.ckpt"))
    return result


def test_teardown_takes_host_memory_unless_told_otherwise(tmp_path: Path) -> None:
    stock, ours = (
        run_fresh("tests.gpu.test_teardown_gpu:measure", folder=tmp_path, keep=keep).result for keep in (False, True)
    )
    assert stock["devices"] == ["cpu"]
    assert stock["grown_bytes"] > 0.9 * STATE_BYTES
    assert ours["devices"] == ["cuda"]
    assert ours["grown_bytes"] < 64 << 20
