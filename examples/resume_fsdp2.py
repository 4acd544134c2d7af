"""Resume a GPT of one device on several, sharded with FSDP2, with stock Lightning and with one more callback.

A first process trains on one device and saves an ordinary checkpoint. Then the ranks of ``ModelParallelStrategy``
resume it, once with stock Lightning and once with ``MemoryEfficientRestore`` among the callbacks. Stock sends every
whole tensor to every rank, and makes an optimizer step to create the states. With the callback each rank reads only its
own shards. The exit status is 0 only if all ranks have the same losses, weights and optimizer states both ways, bit for
bit.

    python examples/resume_fsdp2.py
    python examples/resume_fsdp2.py --size gpt2-xl --accelerator gpu --devices 8
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from gpt import GPT, SIZES, StandardLibrary
from lightning.pytorch.strategies import ModelParallelStrategy
from resume_pretraining import HARMLESS_WARNINGS, Losses, digest, mib, quiet_construction
from torch.distributed.fsdp import fully_shard

from lightning_memload import MemoryEfficientRestore
from lightning_memload.memory import MemoryMonitor

TASKS = {
    "train": "train on one device and save",
    "stock": "resume on several, stock",
    "callback": "resume on several, with the callback",
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of one rank: small enough for JSON, and exact to the bit.

    Attributes:
        losses: The loss of each training step.
        state: The digest of this rank's part of every weight and optimizer state.
        seconds: Wall time of the load.
        host_bytes: Peak of anonymous host memory during the load, above its start.
        gpu_bytes: Peak of allocated GPU memory during the load. ``None`` on a CPU.
        bytes_read: Bytes that the callback has read. ``None`` for stock.
    """

    losses: list[float]
    state: dict[str, str]
    seconds: float
    host_bytes: int | None
    gpu_bytes: int | None
    bytes_read: int | None


def main() -> int:
    """Run the task of ``--task`` in this process, or without it all tasks in fresh ones; return the exit status."""
    args = parse_arguments()
    if not args.task:
        return 0 if compare_ways(args) else 1
    for message in HARMLESS_WARNINGS:
        warnings.filterwarnings("ignore", message)
    if args.task == "train":
        train(args)
    else:
        rank, outcome = resume(args)
        outcome_path(args, args.task, rank).write_text(json.dumps(asdict(outcome)))
    return 0


def parse_arguments() -> argparse.Namespace:
    summary, _, _ = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(description=summary)
    parser.add_argument("--size", choices=SIZES, default="demo", help="size of the model (default: %(default)s)")
    parser.add_argument("--accelerator", choices=("cpu", "gpu"), default="cpu", help="default: %(default)s")
    parser.add_argument("--devices", type=int, default=2, help="number of processes (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=2, help="training steps after the resume (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/resume_fsdp2"), help="folder of the checkpoint (default: ./%(default)s)"
    )
    parser.add_argument("--keep", action="store_true", help="keep the checkpoint")
    parser.add_argument("--task", choices=TASKS, help=argparse.SUPPRESS)
    return parser.parse_args()


def checkpoint_path(args: argparse.Namespace) -> Path:
    return args.out / "one_device.ckpt"


def outcome_path(args: argparse.Namespace, task: str, rank: int) -> Path:
    return args.out / f"{task}.{rank}.json"


# ------------------------------------------------------------------------------------------------ one task, one process


class ShardedGPT(GPT):
    """A GPT whose parameters are sharded over the processes of a ``ModelParallelStrategy``."""

    def configure_model(self) -> None:
        """Shard each block, and then the rest. On one device nothing is sharded."""
        if self.device_mesh is None:
            return
        mesh = self.device_mesh["data_parallel"]
        for module in (*self.blocks, self):
            fully_shard(module, mesh=mesh)


class CostOfLoad(L.Callback):
    """Measures the load of the checkpoint. ``ModelParallelStrategy`` loads it after ``on_fit_start``."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start to measure. What the load is for exists already: sharded parameters, without values."""
        self.monitor = MemoryMonitor(trainer.strategy.root_device)
        self.monitor.start()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """End the measurement, and record what was loaded."""
        self.monitor.stop()
        parts = {name: local(value) for name, value in pl_module.state_dict().items()}
        states = [
            {key: local(value) for key, value in state.items()}
            for optimizer in trainer.strategy.optimizers
            for state in optimizer.state.values()
        ]
        self.state = dict(digest({"weights": parts, "states": states}))


def local(value: Any) -> Any:
    """Return this rank's part of a sharded tensor, and any other value itself."""
    return value.to_local() if hasattr(value, "to_local") else value


def train(args: argparse.Namespace) -> None:
    """Train two steps on one device, and save."""
    L.seed_everything(1, verbose=False)
    trainer = build_trainer(args, [], devices=1, max_steps=2)
    trainer.fit(ShardedGPT(args.size), datamodule=StandardLibrary())
    trainer.save_checkpoint(checkpoint_path(args))


def resume(args: argparse.Namespace) -> tuple[int, Outcome]:
    """Resume on several devices. Return the rank of this process, and its outcome."""
    L.seed_everything(2, verbose=False)
    losses, cost, restore = Losses(), CostOfLoad(), MemoryEfficientRestore()
    callbacks = [*([restore] if args.task == "callback" else []), losses, cost]
    strategy = ModelParallelStrategy(data_parallel_size=args.devices, tensor_parallel_size=1)
    trainer = build_trainer(args, callbacks, devices=args.devices, max_steps=2 + args.steps, strategy=strategy)
    trainer.fit(ShardedGPT(args.size), datamodule=StandardLibrary(), ckpt_path=checkpoint_path(args))
    peaks, report = cost.monitor.peaks, restore.report
    return trainer.global_rank, Outcome(
        losses.values,
        cost.state,
        peaks.seconds,
        peaks.anonymous_above_start_bytes,
        peaks.cuda_allocated_peak_bytes,
        report.total.bytes_read if report else None,
    )


def build_trainer(args: argparse.Namespace, callbacks: list[L.Callback], **options: Any) -> L.Trainer:
    with quiet_construction():
        return L.Trainer(
            accelerator=args.accelerator,
            callbacks=callbacks,
            limit_train_batches=2,  # The checkpoint is then one of the end of an epoch.
            limit_val_batches=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **options,
        )


# ------------------------------------------------------------------------------------------------- all tasks, compared


def compare_ways(args: argparse.Namespace) -> bool:
    """Run every task in fresh processes, print the cost of each way, and return whether the two agree."""
    args.out = args.out / time.strftime("%Y%m%d-%H%M%S")
    args.out.mkdir(parents=True)
    for task, title in TASKS.items():
        print(f"\n{title}:", flush=True)
        options = {**vars(args), "task": task}
        arguments = [f"--{name}={value}" for name, value in options.items() if name != "keep"]
        status = subprocess.run([sys.executable, __file__, *arguments]).returncode
        if status != 0:
            sys.exit(f"The task {title!r} failed with exit status {status}. Its files are in {args.out}")
    ways = {task: read_outcomes(args, task) for task in ("stock", "callback")}
    checkpoint = checkpoint_path(args)
    print(f"\nGPT {args.size!r} on {args.devices} devices. Checkpoint: {mib(checkpoint.stat().st_size)} MiB.")
    print("The load of the checkpoint; the largest value of all ranks, and the sum of the bytes that they read:\n")
    print(f"{'':<10}{'seconds':>10}{'host, MiB':>12}{'GPU, MiB':>12}{'read, MiB':>12}")
    for task, outcomes in ways.items():
        print(cost_line(task, outcomes))
    same = [is_same(*pair) for pair in zip(ways["stock"], ways["callback"], strict=True)]
    print("\nStock compared with the callback, bit for bit:\n")
    for rank, (outcome, equal) in enumerate(zip(ways["callback"], same, strict=True)):
        print(
            f"  rank {rank}  {'the same' if equal else 'NOT THE SAME'}  {len(outcome.state)} tensors and values, losses"
        )
    if all(same) and not args.keep:
        checkpoint.unlink()
    return all(same)


def read_outcomes(args: argparse.Namespace, task: str) -> list[Outcome]:
    files = [outcome_path(args, task, rank) for rank in range(args.devices)]
    return [Outcome(**json.loads(file.read_text())) for file in files]


def cost_line(task: str, outcomes: list[Outcome]) -> str:
    seconds = max(outcome.seconds for outcome in outcomes)
    host, gpu = (largest([getattr(o, name) for o in outcomes]) for name in ("host_bytes", "gpu_bytes"))
    read = None if outcomes[0].bytes_read is None else sum(outcome.bytes_read or 0 for outcome in outcomes)
    return f"{task:<10}{seconds:>10.2f}{mib(host):>12}{mib(gpu):>12}{mib(read):>12}"


def largest(values: list[int | None]) -> int | None:
    return max((value for value in values if value is not None), default=None)


def is_same(stock: Outcome, ours: Outcome) -> bool:
    return stock.losses == ours.losses and stock.state == ours.state


if __name__ == "__main__":
    torch.set_float32_matmul_precision("highest")
    sys.exit(main())
