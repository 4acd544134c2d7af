"""On a machine with two GPUs: work on the second GPU does not use the first one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.fresh_process import run_fresh

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two CUDA devices"),
]


def use_the_second(folder: str) -> dict[str, Any]:
    """Saves and loads on the second GPU, as a rank of a training does; tells whether the first one got a context."""
    from lightning_memload import load_weights
    from lightning_memload.save import BackgroundSave, plan_torch_save, save_torch

    path = Path(folder, "weights.pt")
    # Not the device of this thread, so not that of any other one either.
    module = torch.nn.Sequential(*(torch.nn.Linear(1000, 1000) for _ in range(8))).to("cuda:1")
    expected = {name: value.cpu() for name, value in module.state_dict().items()}
    found: dict[str, Any] = {"before": torch._C._cuda_hasPrimaryContext(0)}
    save_torch(module.state_dict(), path)
    BackgroundSave(plan_torch_save(module.state_dict(), path)).result()
    for dtype in (torch.float32, torch.bfloat16):
        loaded = torch.nn.Sequential(*(torch.nn.Linear(1000, 1000) for _ in range(8)))
        load_weights(loaded, path, device="cuda:1", dtype=dtype)
        found[str(dtype)] = all(
            torch.equal(value.cpu(), expected[name].to(dtype)) for name, value in loaded.state_dict().items()
        )
    found["devices"] = sorted({str(parameter.device) for parameter in loaded.parameters()})
    found["after"] = torch._C._cuda_hasPrimaryContext(0)
    return found


def test_the_first_gpu_gets_no_context(tmp_path: Path) -> None:
    """Some 500 MiB of it, for every process that trains on another one."""
    assert run_fresh("tests.gpu.test_gpus_apart:use_the_second", folder=tmp_path).result == {
        "before": False,
        "torch.float32": True,
        "torch.bfloat16": True,
        "devices": ["cuda:1"],
        "after": False,
    }
