"""Resume the pretraining of a GPT with stock Lightning and with one more callback, and compare the two.

A first process trains on the source files of Python's standard library and saves an ordinary checkpoint with
Lightning's own ``ModelCheckpoint``. Fresh processes then resume it (``trainer.fit(ckpt_path=...)``) and evaluate it
(``trainer.validate(ckpt_path=...)``), each once with stock Lightning and once with ``MemoryEfficientRestore`` among the
callbacks. There is no other difference. Every process records its time and memory until the first batch, its losses,
and a digest of everything that Lightning would save next. The exit status is 0 only if both ways give the same losses
and state, bit for bit.

    python examples/resume_pretraining.py
    python examples/resume_pretraining.py --size gpt2-xl --accelerator gpu
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import logging
import platform
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from gpt import GPT, SIZES, StandardLibrary
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins import TorchCheckpointIO

from lightning_memload import MemoryEfficientRestore
from lightning_memload.memory import MemoryMonitor

TASKS = {
    "train": "train and save",
    "fit-stock": "resume, stock",
    "fit-callback": "resume, with the callback",
    "validate-stock": "evaluate, stock",
    "validate-callback": "evaluate, with the callback",
}

FIGURES = (
    "seconds",
    "anonymous_start_bytes",
    "anonymous_peak_bytes",
    "anonymous_end_bytes",
    "file_backed_peak_bytes",
    "pinned_peak_bytes",
    "cuda_allocated_peak_bytes",
)

UNKNOWN = "-"

HARMLESS_WARNINGS = (
    r"Checkpoint directory .* exists and is not empty",  # It contains the checkpoint that the run resumes from.
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning 2.6 with torch 2.13.
    r"The '\w+_dataloader' does not have many workers",
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of one process: small enough for JSON, and exact to the bit.

    Attributes:
        weight_bytes: The bytes of all parameters of the model; tied parameters count once.
        losses: The loss of each training step, or the one loss of the evaluation.
        state: Key path -> data type, shape and SHA-256 of a tensor, or the ``repr`` of any other value.
        cost: ``FIGURES`` from the start until the first batch; ``None`` where the platform does not report the figure.
    """

    weight_bytes: int
    losses: list[float]
    state: dict[str, str]
    cost: dict[str, Any]


def main() -> int:
    """Run the task of ``--task`` in this process, or without it all tasks in fresh ones; return the exit status."""
    args = parse_arguments()
    if args.task:
        for message in HARMLESS_WARNINGS:
            warnings.filterwarnings("ignore", message)
        outcome = run_task(args)
        outcome_path(args).write_text(json.dumps(asdict(outcome)))
        return 0
    return 0 if compare_ways(args) else 1


def parse_arguments() -> argparse.Namespace:
    summary, _, _ = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(description=summary)
    parser.add_argument("--size", choices=SIZES, default="demo", help="size of the model (default: %(default)s)")
    parser.add_argument("--accelerator", choices=("cpu", "gpu", "auto"), default="cpu", help="default: %(default)s")
    parser.add_argument("--precision", default="32-true", help="precision of the Trainer (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=5, help="training steps after the resume (default: %(default)s)")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/resume_pretraining"),
        help="folder for checkpoint and logs (default: ./%(default)s)",
    )
    parser.add_argument("--keep", action="store_true", help="keep the checkpoint; without this it is kept on a failure")
    parser.add_argument("--task", choices=TASKS, help=argparse.SUPPRESS)
    return parser.parse_args()


def checkpoint_path(args: argparse.Namespace) -> Path:
    return args.out / "checkpoints" / "pretrained.ckpt"


def outcome_path(args: argparse.Namespace) -> Path:
    return args.out / "logs" / args.task / "outcome.json"


# ------------------------------------------------------------------------------------------------ one task, one process


def run_task(args: argparse.Namespace) -> Outcome:
    """Run the task that ``args.task`` names: train and save, resume, or evaluate."""
    if args.task == "train":
        return fit(args, seed=1, max_steps=args.steps + 1, checkpoint=None)
    # Another seed gives other initial weights and other batches. So values that are equal afterwards are from the file.
    if args.task.startswith("fit"):
        return fit(args, seed=2, max_steps=args.steps + 1 + args.steps, checkpoint=checkpoint_path(args))
    return validate(args, seed=2, checkpoint=checkpoint_path(args))


def fit(args: argparse.Namespace, seed: int, max_steps: int, checkpoint: Path | None) -> Outcome:
    """Train until ``max_steps`` are done. Resume from ``checkpoint``, or start anew if it is ``None``."""
    L.seed_everything(seed, verbose=False)
    model, losses, cost = GPT(args.size), Losses(), CostOfStart()
    trainer = build_trainer(args, [losses, cost], max_steps)
    cost.begin(trainer.strategy.root_device)
    trainer.fit(model, datamodule=StandardLibrary(), ckpt_path=checkpoint)
    return Outcome(weight_bytes(model), losses.values, digest_of_next_checkpoint(trainer), cost.figures())


def validate(args: argparse.Namespace, seed: int, checkpoint: Path) -> Outcome:
    """Evaluate ``checkpoint`` on a few batches."""
    L.seed_everything(seed, verbose=False)
    model, cost = GPT(args.size), CostOfStart()
    trainer = build_trainer(args, [cost])
    cost.begin(trainer.strategy.root_device)
    (metrics,) = trainer.validate(model, datamodule=StandardLibrary(), ckpt_path=checkpoint, verbose=False)
    return Outcome(weight_bytes(model), [metrics["val_loss"]], dict(digest(model.state_dict())), cost.figures())


def build_trainer(args: argparse.Namespace, callbacks: list[L.Callback], max_steps: int = -1) -> L.Trainer:
    """Return the Trainer of a task. The tasks of the two ways differ in one callback."""
    if args.task.endswith("callback"):
        callbacks = [MemoryEfficientRestore(), *callbacks]
    # Each epoch ends with a save. A resumed run ends one step before the second save, so it saves nothing.
    epoch_steps, path = args.steps + 1, checkpoint_path(args)
    callbacks = [*callbacks, ModelCheckpoint(path.parent, path.stem, every_n_train_steps=epoch_steps)]
    with quiet_construction():
        trainer = L.Trainer(
            accelerator=args.accelerator,
            devices=1,
            precision=args.precision,
            max_steps=max_steps,
            limit_train_batches=epoch_steps,
            limit_val_batches=4 if args.task.startswith("validate") else 0,
            callbacks=callbacks,
            logger=open_loggers(args),
            log_every_n_steps=1,
            deterministic=True,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
    # deterministic=True also makes torch fill the memory that it allocates. An ordinary run does not pay for this.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    return trainer


def open_loggers(args: argparse.Namespace) -> list[CSVLogger | TensorBoardLogger]:
    """Return the loggers of a task, already open: the imports of TensorBoard are not part of the cost of a restore."""
    loggers: list[CSVLogger | TensorBoardLogger] = [CSVLogger(args.out, name="logs", version=args.task)]
    if importlib.util.find_spec("tensorboard"):
        loggers.append(TensorBoardLogger(args.out, name="logs", version=args.task))
    for logger in loggers:
        _ = logger.experiment
    return loggers


class CostOfStart(L.Callback):
    """Measures the cost until the first batch. The end of ``fit`` would be too late, because it moves the model."""

    def begin(self, device: torch.device) -> None:
        """Start to measure. The context of the device exists before, so its memory is not counted."""
        torch.zeros(1, device=device)
        self.monitor = MemoryMonitor(device)
        self.monitor.start()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """End the measurement."""
        self.monitor.stop()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """End the measurement."""
        self.monitor.stop()

    def figures(self) -> dict[str, Any]:
        """Return the measured value of each name in ``FIGURES``."""
        return {figure: getattr(self.monitor.peaks, figure) for figure in FIGURES}


class Losses(L.Callback):
    """Records the loss of every training step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record the loss of this step."""
        self.values.append(outputs["loss"].item())


class DigestIO(TorchCheckpointIO):
    """A CheckpointIO that computes the digests of a checkpoint instead of writing it."""

    def __init__(self) -> None:
        self.state: dict[str, str] = {}

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Compute the digests. Nothing is written to ``path``."""
        self.state = dict(digest(checkpoint))


def digest_of_next_checkpoint(trainer: L.Trainer) -> dict[str, str]:
    """Return the digests of everything that Lightning would save now: weights, optimizers, schedulers, loops ..."""
    trainer.strategy.checkpoint_io = digests = DigestIO()
    trainer.save_checkpoint("nowhere.ckpt")
    return digests.state


def digest(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield the key path and the digest of every tensor in ``value``, and the ``repr`` of every other value."""
    if isinstance(value, torch.Tensor):
        raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        yield key, f"{value.dtype} {tuple(value.shape)} {hashlib.sha256(raw).hexdigest()}"  # type: ignore[arg-type]
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from digest(item, f"{key}[{name!r}]")
    elif isinstance(value, list | tuple):
        for position, item in enumerate(value):
            yield from digest(item, f"{key}[{position}]")
    else:
        yield key, repr(value)


def weight_bytes(model: torch.nn.Module) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


@contextmanager
def quiet_construction() -> Iterator[None]:
    """Hide the Trainer's list of devices and its product tips. Warnings still appear."""
    log = logging.getLogger("lightning.pytorch")
    level = log.level
    log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        log.setLevel(level)


# ------------------------------------------------------------------------------------------------- all tasks, compared


def compare_ways(args: argparse.Namespace) -> bool:
    """Run every task in a fresh process, print the cost of each, and return whether the two ways agree."""
    began = time.monotonic()
    args.out = args.out / time.strftime("%Y%m%d-%H%M%S")
    args.out.mkdir(parents=True)
    outcomes = {task: run_in_fresh_process(task, args) for task in TASKS}

    checkpoint = checkpoint_path(args)
    print(f"\nGPT {args.size!r}, {args.precision}, on the standard library of Python {platform.python_version()}")
    print(f"Weights: {mib(outcomes['train'].weight_bytes)} MiB. Checkpoint: {mib(checkpoint.stat().st_size)} MiB.")
    print("Memory in MiB, from the call of the Trainer (the model is built) to the first batch. Anonymous host memory:")
    print("  start, peak   at the call, and at its highest")
    print("  above start   peak - start")
    print("  stays         in use at the first batch - start. On the CPU: the states of AdamW, twice the weights.")
    print("  on top        the part of the peak that only the restore needs")
    print("Beside it: the peaks of file-backed pages, which the kernel can take back, pinned memory and GPU memory.\n")
    print(cost_table({task: outcomes[task].cost for task in TASKS if task != "train"}))
    print("\nStock compared with the callback, bit for bit:\n")
    same = [report_equality(way, outcomes[f"{way}-stock"], outcomes[f"{way}-callback"]) for way in ("fit", "validate")]
    if all(same) and not args.keep:
        checkpoint.unlink()
    print(f"\nLogs: {args.out / 'logs'}. Total time: {time.monotonic() - began:.0f} s.")
    return all(same)


def run_in_fresh_process(task: str, args: argparse.Namespace) -> Outcome:
    """Run ``task`` in a new Python process and return its outcome. Its memory holds nothing of other tasks."""
    print(f"\n{TASKS[task]}:", flush=True)
    args = argparse.Namespace(**{**vars(args), "task": task})
    options = [f"--{name}={value}" for name, value in vars(args).items() if name != "keep"]
    status = subprocess.run([sys.executable, __file__, *options]).returncode
    if status != 0:
        sys.exit(
            f"The task {TASKS[task]!r} failed with exit status {status} (-9: killed, probably out of memory). "
            f"Its files are in {args.out}"
        )
    return Outcome(**json.loads(outcome_path(args).read_text()))


def cost_table(costs: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a table with one line for each process. A column without any known figure is omitted."""
    rows = [{"": f"{TASKS[task]:<28}", **cost_cells(cost)} for task, cost in costs.items()]
    names = [name for name in rows[0] if any(row[name] != UNKNOWN for row in rows)]
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in names}
    lines = [{name: name for name in names}, *rows]
    return "\n".join("   ".join(f"{line[name]:>{widths[name]}}" for name in names) for line in lines)


def cost_cells(cost: Mapping[str, Any]) -> dict[str, str]:
    """Return the cells of one process by the name of their column.

    "stays" is the level at the first batch minus the level at the start. It is negative where the model has moved to a
    GPU. "on top" is the memory that only the restore needs: the peak minus the larger of the levels before and after.
    """
    start, peak, end = (cost[f"anonymous_{level}_bytes"] for level in ("start", "peak", "end"))
    return {
        "seconds": f"{cost['seconds']:.2f}",
        "start": mib(start),
        "peak": mib(peak),
        "above start": mib(minus(peak, start)),
        "stays": mib(minus(end, start)),
        "on top": mib(minus(peak, None if end is None else max(start, end))),
        "file-backed": mib(cost["file_backed_peak_bytes"]),
        "pinned": mib(cost["pinned_peak_bytes"]),
        "GPU": mib(cost["cuda_allocated_peak_bytes"]),
    }


def report_equality(way: str, stock: Outcome, ours: Outcome) -> bool:
    """Print whether the losses and the states of the two ways are the same, and the differences. Return the answer."""
    different = [key for key in {**stock.state, **ours.state} if stock.state.get(key) != ours.state.get(key)]
    same_losses = stock.losses == ours.losses
    losses = " ".join(f"{loss:.4f}" for loss in stock.losses)
    entries = f"{len(stock.state)} tensors and values, {len(different)} differ"
    print(f"  {way:<8}  {verdict(same_losses)}  losses  {losses}")
    print(f"  {way:<8}  {verdict(not different)}  state   {entries}")
    if not same_losses:
        print(f"            losses: stock {stock.losses}, with the callback {ours.losses}")
    for key in different[:10]:
        print(f"            {key}: stock {stock.state.get(key)}, with the callback {ours.state.get(key)}")
    return same_losses and not different


def verdict(same: bool) -> str:
    return "the same" if same else "NOT THE SAME"


def minus(a: int | None, b: int | None) -> int | None:
    return None if a is None or b is None else a - b


def mib(num_bytes: int | None) -> str:
    return UNKNOWN if num_bytes is None else f"{num_bytes / 2**20:.0f}"


if __name__ == "__main__":
    sys.exit(main())
