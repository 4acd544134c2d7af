"""Continue the pretraining of a GPT from a checkpoint, as Lightning does it and with one line more, and compare.

A first process trains on the sources of Python's standard library and saves an ordinary checkpoint with Lightning's own
``ModelCheckpoint``. Fresh processes then resume it (``trainer.fit(ckpt_path=...)``) and evaluate it
(``trainer.validate(ckpt_path=...)``), each once stock and once with ``MemoryEfficientRestore`` among the callbacks, the
only difference. Every process writes down what it took until its first batch, its losses, and a digest of everything
that Lightning would save next. The exit status is 0 only if both ways gave the same, bit for bit.

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
    r"Checkpoint directory .* exists and is not empty",  # It holds what the run resumes from.
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning 2.6 with torch 2.13.
    r"The '\w+_dataloader' does not have many workers",
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a process leaves for the comparison: small enough for JSON, exact to the bit.

    Attributes:
        weight_bytes: All parameters of the model, tied ones once.
        losses: Of each training step, or the one of the evaluation.
        state: Key path -> data type, shape and SHA-256 of a tensor, or the ``repr`` of any other value.
        cost: ``FIGURES`` of the time until the first batch; ``None`` where the platform has no such figure.
    """

    weight_bytes: int
    losses: list[float]
    state: dict[str, str]
    cost: dict[str, Any]


def main() -> int:
    """Run one task in this process if told so, otherwise all of them in fresh ones; return the exit status."""
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
    parser.add_argument("--size", choices=SIZES, default="demo", help="of the model (default: %(default)s)")
    parser.add_argument("--accelerator", choices=("cpu", "gpu", "auto"), default="cpu", help="default: %(default)s")
    parser.add_argument("--precision", default="32-true", help="as the Trainer takes it (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=5, help="to train after the resume (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/resume_pretraining"), help="default: ./%(default)s")
    parser.add_argument("--keep", action="store_true", help="keep the checkpoint; it stays anyway if anything differs")
    parser.add_argument("--task", choices=TASKS, help=argparse.SUPPRESS)
    return parser.parse_args()


def checkpoint_path(args: argparse.Namespace) -> Path:
    return args.out / "checkpoints" / "pretrained.ckpt"


def outcome_path(args: argparse.Namespace) -> Path:
    return args.out / "logs" / args.task / "outcome.json"


# ------------------------------------------------------------------------------------------------ one task, one process


def run_task(args: argparse.Namespace) -> Outcome:
    """Train and save, resume, or evaluate, as ``args.task`` says."""
    if args.task == "train":
        return fit(args, seed=1, max_steps=args.steps + 1, checkpoint=None)
    # Another seed gives other initial weights and other batches: what is equal afterwards came from the file.
    if args.task.startswith("fit"):
        return fit(args, seed=2, max_steps=args.steps + 1 + args.steps, checkpoint=checkpoint_path(args))
    return validate(args, seed=2, checkpoint=checkpoint_path(args))


def fit(args: argparse.Namespace, seed: int, max_steps: int, checkpoint: Path | None) -> Outcome:
    """Train until ``max_steps`` are done, from ``checkpoint`` if there is one."""
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
    """Return the Trainer of a task. Stock and ours differ in one callback."""
    if args.task.endswith("callback"):
        callbacks = [MemoryEfficientRestore(), *callbacks]
    # An epoch ends with a save, and a resumed run one step before the second.
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
    # With deterministic algorithms torch also fills whatever it allocates, which no ordinary run pays for.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    return trainer


def open_loggers(args: argparse.Namespace) -> list[CSVLogger | TensorBoardLogger]:
    """Return the loggers of a task, already open: what TensorBoard imports is no part of what a restore takes."""
    loggers: list[CSVLogger | TensorBoardLogger] = [CSVLogger(args.out, name="logs", version=args.task)]
    if importlib.util.find_spec("tensorboard"):
        loggers.append(TensorBoardLogger(args.out, name="logs", version=args.task))
    for logger in loggers:
        _ = logger.experiment
    return loggers


class CostOfStart(L.Callback):
    """Measures until the first batch. Until the end of ``fit`` would be too long: that moves the model once more."""

    def begin(self, device: torch.device) -> None:
        """Measure from now on; what the device's own context takes is there before."""
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
        """Return ``FIGURES``."""
        return {figure: getattr(self.monitor.peaks, figure) for figure in FIGURES}


class Losses(L.Callback):
    """Keeps the loss of every step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep this one."""
        self.values.append(outputs["loss"].item())


class DigestIO(TorchCheckpointIO):
    """Takes the checkpoint that Lightning would save, and keeps its digests instead of its bytes."""

    def __init__(self) -> None:
        self.state: dict[str, str] = {}

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write nothing to ``path``."""
        self.state = dict(digest(checkpoint))


def digest_of_next_checkpoint(trainer: L.Trainer) -> dict[str, str]:
    """Return the digests of weights, optimizers, schedulers, loops, callbacks: all that Lightning would save now."""
    trainer.strategy.checkpoint_io = digests = DigestIO()
    trainer.save_checkpoint("nowhere.ckpt")
    return digests.state


def digest(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield key path and digest of everything in ``value``, one tensor after the other."""
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
    """Keep the Trainer's list of devices and its product tips off the screen, but no warning."""
    log = logging.getLogger("lightning.pytorch")
    level = log.level
    log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        log.setLevel(level)


# ------------------------------------------------------------------------------------------------- all tasks, compared


def compare_ways(args: argparse.Namespace) -> bool:
    """Run every task in a fresh process, print what each cost, and return whether both ways gave the same."""
    began = time.monotonic()
    args.out = args.out / time.strftime("%Y%m%d-%H%M%S")
    args.out.mkdir(parents=True)
    outcomes = {task: run_in_fresh_process(task, args) for task in TASKS}

    checkpoint = checkpoint_path(args)
    print(f"\nGPT {args.size!r}, {args.precision}, on the standard library of Python {platform.python_version()}")
    print(f"Weights W: {mib(outcomes['train'].weight_bytes)} MiB. Checkpoint: {mib(checkpoint.stat().st_size)} MiB.")
    print("Anonymous host memory in MiB, from the call into the Trainer (the model is built) until the first batch.")
    print("On the CPU AdamW's states, 2 W, stay after a resume. What only the restore needed is on top.\n")
    print(cost_table({task: outcomes[task].cost for task in TASKS if task != "train"}))
    print("\nStock and with the callback, bit for bit:\n")
    same = [report_equality(way, outcomes[f"{way}-stock"], outcomes[f"{way}-callback"]) for way in ("fit", "validate")]
    if all(same) and not args.keep:
        checkpoint.unlink()
    print(f"\nLogs: {args.out / 'logs'}. All of it took {time.monotonic() - began:.0f} s.")
    return all(same)


def run_in_fresh_process(task: str, args: argparse.Namespace) -> Outcome:
    """Run ``task`` in a new Python, so that its memory is nobody else's, and return what it wrote down."""
    print(f"\n{TASKS[task]}:", flush=True)
    args = argparse.Namespace(**{**vars(args), "task": task})
    options = [f"--{name}={value}" for name, value in vars(args).items() if name != "keep"]
    status = subprocess.run([sys.executable, __file__, *options]).returncode
    if status != 0:
        sys.exit(f"{TASKS[task]}: ended with exit status {status} (-9: killed, out of memory). Its files: {args.out}")
    return Outcome(**json.loads(outcome_path(args).read_text()))


def cost_table(costs: Mapping[str, Mapping[str, Any]]) -> str:
    """Return one line for each process, side by side; a column that is unknown in all of them is left out."""
    rows = [{"": f"{TASKS[task]:<28}", **cost_cells(cost)} for task, cost in costs.items()]
    names = [name for name in rows[0] if any(row[name] != UNKNOWN for row in rows)]
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in names}
    lines = [{name: name for name in names}, *rows]
    return "\n".join("   ".join(f"{line[name]:>{widths[name]}}" for name in names) for line in lines)


def cost_cells(cost: Mapping[str, Any]) -> dict[str, str]:
    """Return the cells of one process by their column.

    "stays" is what the first batch finds above the start; it is negative where the model has left for a GPU. "on top"
    is what only the restore needed: the peak above both what was there before it and what was there after it.
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
    """Print whether the losses and the state of the two ways are the same, and where not."""
    different = [key for key in {**stock.state, **ours.state} if stock.state.get(key) != ours.state.get(key)]
    same_losses = stock.losses == ours.losses
    losses = " ".join(f"{loss:.4f}" for loss in stock.losses)
    entries = f"{len(stock.state)} tensors and values, {len(different)} differ"
    print(f"  {way:<8}  {verdict(same_losses)}  losses  {losses}")
    print(f"  {way:<8}  {verdict(not different)}  state   {entries}")
    if not same_losses:
        print(f"            with the callback the losses are {ours.losses}, stock {stock.losses}")
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
