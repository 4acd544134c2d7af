"""Restores under ModelParallelStrategy in several processes, stock or with the callback: FSDP2, tensor parallel, both.

One program makes many runs in one process group, since a start of the ranks takes seconds.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tests.lightning as L
from lightning_memload import MemoryMonitor
from lightning_memload.errors import CheckpointReadError
from lightning_memload.restore import session
from tests.fresh_process import run_program
from tests.plugins.harness import TRUSTED, make_trainer

PROGRAM = """
from tests.plugins.sharded_ranks import main

if __name__ == "__main__":
    main()
"""
WIDTH, HIDDEN = 256, 514


class Net(L.LightningModule):
    """Uneven rows, a parameter smaller than the mesh, frozen ones, and buffers. The frozen ones come last: stock counts
    the parameters of an optimizer in the order of the module.

    Args:
        kind: ``"tied"``: two layers share a weight. ``"groups"``: two groups, not in the order of the module.
            ``"two"``: two optimizers. ``"unused"``: a parameter without gradient. ``"hooks"``: a module with a hook.
            ``"bad hooks"``: it fails on one rank. ``"hybrid"``: two replicas, each sharded over two ranks.
            ``"columns"``: tensor parallel alone, also on a mesh with rows.
            ``"large"``: a weight of 64 MiB. ``"new"``: a layer that no checkpoint has. ``"lax"``: the same, without
            strict loading. ``"wrapped"``, ``"compiled"``: a layer has another name, without strict loading.
    """

    def __init__(self, kind: str = "plain") -> None:
        super().__init__()
        self.kind = kind
        self.strict_loading = kind not in ("lax", "wrapped", "compiled")
        self.automatic_optimization = kind != "two"
        self.losses: list[str] = []
        self.seen: list[str] = []
        self.norm = nn.LayerNorm(WIDTH)
        self.first = nn.Linear(WIDTH, HIDDEN)
        self.second: Any = nn.Linear(HIDDEN, 7)
        self.tiny = nn.Parameter(torch.ones(1))
        if kind == "tied":
            self.twin = nn.Linear(HIDDEN, 7, bias=False)
            self.twin.weight = self.second.weight
        if kind == "unused":
            self.idle = nn.Linear(4, 6)
        if kind == "large":
            self.large = nn.Linear(4096, 4096, bias=False)
        if kind in ("new", "lax"):
            self.new = nn.Linear(5, 3).requires_grad_(False)
        if kind in ("hooks", "bad hooks"):
            self.first._register_load_state_dict_pre_hook(self.see)
        self.frozen = nn.Linear(WIDTH, 64).requires_grad_(False)
        self.register_buffer("scale", torch.rand(3))
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("ramp", torch.arange(5.0), persistent=False)

    def see(self, *_: Any) -> None:
        self.seen.append("first")
        if self.kind == "bad hooks" and self.global_rank == 0:
            raise RuntimeError("the hook of rank 0")

    def configure_model(self) -> None:
        if self.device_mesh is None:
            return
        from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

        if self.kind == "hybrid":
            fully_shard(self.first, mesh=self.device_mesh)
            fully_shard(self, mesh=self.device_mesh)
            return
        rows, columns = self.device_mesh["data_parallel"], self.device_mesh["tensor_parallel"]
        if columns.size() > 1:
            parallelize_module(self, columns, {"first": ColwiseParallel(), "second": RowwiseParallel()})
        if rows.size() > 1 and self.kind != "columns":
            fully_shard(self.first, mesh=rows)
            if self.kind == "wrapped":
                self.second = checkpoint_wrapper(self.second)
            if self.kind == "compiled":
                self.second = torch.compile(self.second, backend="eager")
            fully_shard(self, mesh=rows)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.first(self.norm(x)).relu()
        out = self.second(hidden) * self.tiny + self.ramp.sum() * self.scale[0]
        if self.kind == "large":
            out = out + self.large.weight.mean()
        if self.kind == "tied":
            out = out + self.twin(hidden)
        return out + self.frozen(x).mean()

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> Any:
        self.count += 1
        loss = self(batch).pow(2).mean()
        self.losses.append(loss.detach().item().hex())
        if not self.automatic_optimization:
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()
            return None
        return loss

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.losses.append(self(batch).sum().item().hex())

    def train_dataloader(self) -> Any:
        rows: Any = torch.randn(12, WIDTH, generator=torch.Generator().manual_seed(1))
        return torch.utils.data.DataLoader(rows, batch_size=4)

    val_dataloader = train_dataloader

    def configure_optimizers(self) -> Any:
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        if self.kind == "groups":
            groups = [
                {"params": [p for p in reversed(trained) if p.dim() > 1], "weight_decay": 0.1},
                {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0, "lr": 0.01},
            ]
            return torch.optim.AdamW(groups, lr=1e-3)
        if self.kind == "two":
            return [torch.optim.AdamW(self.first.parameters()), torch.optim.SGD(self.second.parameters(), 0.1, 0.9)]
        return torch.optim.AdamW(trained, lr=1e-3)


class Seeing(L.Callback):
    """Notes what was restored, when training or evaluation begins.

    Args:
        measures: Whether to measure the host memory of the load.
    """

    def __init__(self, measures: bool) -> None:
        self.measures = measures
        self.monitor: MemoryMonitor | None = None
        self.gpu_bytes = 0
        self.weights: dict[str, Any] = {}
        self.states: list[dict[str, Any]] = []
        self.groups: list[Any] = []

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        if self.measures:
            device = trainer.strategy.root_device
            self.gpu_bytes = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
            self.monitor = MemoryMonitor(device)
            self.monitor.start()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if self.monitor is not None:
            self.monitor.stop()
        if self.weights or self.monitor is not None:
            return
        self.weights = {
            name: described(value) for name, value in (*pl_module.named_parameters(), *pl_module.named_buffers())
        }
        names = {id(parameter): name for name, parameter in pl_module.named_parameters()}
        for optimizer in trainer.strategy.optimizers:
            self.states.append(
                {
                    f"{names[id(parameter)]}.{key}": described(value)
                    for parameter, state in optimizer.state.items()
                    for key, value in state.items()
                }
            )
            self.groups.append([{**group, "params": len(group["params"])} for group in optimizer.param_groups])

    on_validation_start = on_train_start

    def memory(self) -> dict[str, int | None]:
        if self.monitor is None:
            return {}
        peaks = self.monitor.peaks
        gpu = peaks.cuda_allocated_peak_bytes
        return {
            "above_start": peaks.anonymous_above_start_bytes,
            "gpu_above_start": None if gpu is None else gpu - self.gpu_bytes,
        }


def described(value: Any) -> list[Any]:
    """Kind, type, sizes, strides and a hash of the bytes of this rank's part."""
    local = value.to_local() if hasattr(value, "to_local") else value
    data = local.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    kind = f"{type(value).__name__} {getattr(value, 'placements', '')}"
    place = [kind, str(value.dtype), value.device.type, list(local.shape), list(local.stride())]
    return [*place, hashlib.sha256(data).hexdigest()]


def mappings(path: Any) -> set[str]:
    return {line for line in Path("/proc/self/maps").read_text().splitlines() if str(path) in line}


def run(folder: Path, rank: int, restore: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    from tests.lightning.pytorch.strategies import ModelParallelStrategy

    gc.collect()  # what an earlier run has left, which would count as the start of a measurement
    options = dict(arguments)
    dp, tp, stage = options.pop("dp", 1), options.pop("tp", 1), options.pop("stage", "fit")
    path, save, name = options.pop("path"), options.pop("save", None), options.pop("name")
    torch.manual_seed(7)
    module = Net(options.pop("kind", "plain"))
    seeing = Seeing(options.pop("memory", False))
    strategy = ModelParallelStrategy(dp, tp, save_distributed_checkpoint=options.pop("shards", False))
    trainer = make_trainer(
        folder,
        [*([restore] if restore is not None else []), seeing],
        strategy=strategy,
        devices=dp * tp,
        use_distributed_sampler=False,
        **options,
    )
    started, error = time.monotonic(), None
    before = mappings(path)  # Stock keeps some.
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            entry = trainer.fit if stage == "fit" else trainer.validate
            entry(module, ckpt_path=path, **TRUSTED)
        except Exception as raised:
            error = [type(raised).__name__, str(raised), time.monotonic() - started]
    if save and error is None:
        trainer.save_checkpoint(save)
    report = restore is not None and restore.report
    result = {
        "losses": module.losses,
        **seeing.memory(),
        "seen": sorted(set(module.seen)),
        "weights": seeing.weights,
        "states": seeing.states,
        "groups": seeing.groups,
        "report": report.as_dict() if report else None,
        "table": report.table() if report else None,
        "warnings": [str(item.message) for item in caught if "MemoryEfficientRestore" in str(item.message)],
        "error": error,
        "held": sorted(mappings(path) - before),
        "own": "load_checkpoint" in vars(strategy),
    }
    (folder / f"{name}.{rank}.json").write_text(json.dumps(result))
    return result


def fail(*_: Any, **__: Any) -> Any:
    raise CheckpointReadError("The disk is gone.", path="?", key=None, offset=0)


def main() -> None:
    from lightning_memload import MemoryEfficientRestore

    folder, rank = Path(os.environ["MEMLOAD_TEST_FOLDER"]), int(os.environ.get("LOCAL_RANK", 0))
    for arguments in json.loads((folder / "runs.json").read_text()):
        ours, other, failing = (arguments.pop(name, None) for name in ("ours", "other", "failing"))
        if other is not None and rank == 1:
            arguments["path"] = other
        has = ours is not None and arguments.pop("only", rank) == rank
        with pytest.MonkeyPatch.context() as patch:
            if failing == rank:
                patch.setattr(session, "transfer", fail)
            run(folder, rank, MemoryEfficientRestore(**ours) if has else None, arguments)


def run_ranks(folder: Path, runs: Sequence[dict[str, Any]], num_ranks: int) -> dict[str, list[dict[str, Any]]]:
    """Makes runs one after the other in the same ranks. Returns the results of each, by its name and the rank."""
    folder.mkdir(exist_ok=True)
    (folder / "program.py").write_text(PROGRAM)
    (folder / "runs.json").write_text(json.dumps(runs, default=str))
    done = run_program(folder / "program.py", MEMLOAD_TEST_FOLDER=str(folder))
    words = done.stdout[-2000:] + done.stderr[-6000:]
    assert all((folder / f"{runs[-1]['name']}.{rank}.json").exists() for rank in range(num_ranks)), words
    names = [arguments["name"] for arguments in runs]
    return {
        name: [json.loads((folder / f"{name}.{rank}.json").read_text()) for rank in range(num_ranks)] for name in names
    }


def write_single(path: Path, kind: str = "plain") -> Path:
    """A checkpoint of one device after the first of two epochs."""
    torch.manual_seed(5)
    trainer = make_trainer(path.parent, max_epochs=1)
    trainer.fit(Net(kind))
    trainer.save_checkpoint(path)
    return path
