"""Finetune a model that is larger than the memory that the process may use.

A first process trains the GPT of ``gpt.py`` for a few steps and exports its weights in the layout of the Hugging Face
Hub: sharded safetensors with an index. The finetuning puts a new head on this GPT (the body), which stays frozen. The
head learns to tell which file of Python's standard library a piece of text is from. There are two ways to load the
weights:

- stock: build the model, read the shards, call ``load_state_dict``;
- with the callback: build the model under ``meta_init``, and let
  ``MemoryEfficientRestore(weights_from=WeightsSource(...))`` load the weights. On a GPU they are streamed to the device
  through a buffer of 128 MiB in host memory. On a CPU the parameters of the frozen body are mapped pages of the file
  (``mode="assign"``), which the kernel can drop and read again.

Both ways run in fresh processes, first without a limit, which measures what they need. Then they run in a control group
whose limit is slightly above what the callback needs. The exit status is 0 only if the losses of both ways are equal,
the body is the pretrained one bit for bit, and, where a limit can be set, the kernel kills stock under the limit while
the run with the callback gives the same losses.

    python examples/finetune_low_ram.py
    python examples/finetune_low_ram.py --size gpt2-xl --accelerator gpu
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import lightning as L
import memory_limit
import torch
from gpt import GPT, SIZES, Sequences, StandardLibrary
from resume_pretraining import HARMLESS_WARNINGS, UNKNOWN, Losses, mib, quiet_construction, weight_bytes
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_memload import MemoryEfficientRestore, MemoryMonitor, WeightsSource, meta_init

WAYS = ("stock", "callback")
TASKS = {"pretrain": "pretrain and export", "stock": "stock", "callback": "with the callback"}

FIGURES_IN_MIB = (
    "anonymous_peak_bytes",
    "file_backed_peak_bytes",
    "storage_read_bytes",
    "cuda_allocated_peak_bytes",
)
FIGURES = ("seconds", "required_bytes", *FIGURES_IN_MIB)

PREFIX = "transformer."  # The names of an exported body begin with it, as the names of a GPT-2 on the Hub do.
NUM_SHARDS = 4
NUM_CLASSES = 4
SEQUENCE_LENGTH = 32
SPEED_BYTES = 128 << 20  # Memory above the need, as far as the limit allows: with less, a process runs slowly.


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of one process, for the comparison.

    Attributes:
        weight_bytes: The bytes of all parameters of the model.
        losses: The loss of each training step.
        body: Name -> data type, shape and SHA-256 of every parameter of the body after the training.
        cost: ``FIGURES`` from before the model is built until the training has ended; ``None`` where unknown.
    """

    weight_bytes: int
    losses: list[float]
    body: dict[str, str]
    cost: dict[str, Any]


class Finetuning(L.LightningModule):
    """A frozen GPT (the body) and a new linear layer (the head) that tells which file a piece of text is from.

    Args:
        size: A key of ``SIZES``.
    """

    def __init__(self, size: str) -> None:
        super().__init__()
        self.body = GPT(size).requires_grad_(False)
        self.head = Head(self.body.config.width, NUM_CLASSES)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the cross entropy of the classes. ``batch`` is (int64 tokens (batch, length), int64 labels)."""
        tokens, labels = batch
        return F.cross_entropy(self.head(self.body.features(tokens).mean(1)), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW for the parameters of the head only."""
        return torch.optim.AdamW(self.head.parameters(), lr=0.001)

    def cpu(self) -> Finetuning:
        """Return the model without moving it.

        Lightning 2.6 calls this at the end of ``fit`` and would otherwise move the whole model into host memory.
        """
        return self


class Head(nn.Linear):
    """A linear layer that starts at zero, so its first values do not depend on the random numbers drawn before."""

    def reset_parameters(self) -> None:
        """Fill with zeros. The callback calls this, because the pretrained weights contain no values for the head."""
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


def pieces_of_largest_files() -> list[tuple[Tensor, int]]:
    """Return one piece of each of the largest files of the standard library, as (int64 tokens, number of the file)."""
    by_size = sorted(Path(os.__file__).parent.glob("*.py"), key=lambda path: path.stat().st_size)
    files = [Sequences(path.read_bytes(), SEQUENCE_LENGTH) for path in by_size[-NUM_CLASSES:]]
    return [(file[len(file) // 2][:SEQUENCE_LENGTH], label) for label, file in enumerate(files)]


def main() -> int:
    """Run the task of ``--task`` in this process, or without it all tasks in fresh ones; return the exit status."""
    args = parse_arguments()
    if args.task:
        for message in HARMLESS_WARNINGS:
            warnings.filterwarnings("ignore", message)
        outcome = pretrain(args) if args.task == "pretrain" else finetune(args)
        outcome_path(args, args.task).write_text(json.dumps(asdict(outcome)))
        return 0
    return 0 if compare_ways(args) else 1


def parse_arguments() -> argparse.Namespace:
    summary, _, _ = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(description=summary)
    parser.add_argument("--size", choices=SIZES, default="gpt2-medium", help="size of the model (default: %(default)s)")
    parser.add_argument("--accelerator", choices=("cpu", "gpu"), default="cpu", help="default: %(default)s")
    parser.add_argument("--pretraining-steps", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=6, help="steps of the finetuning (default: %(default)s)")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/finetune_low_ram"),
        help="folder for the weights and the results (default: ./%(default)s)",
    )
    parser.add_argument("--keep", action="store_true", help="keep the exported weights")
    parser.add_argument("--task", choices=TASKS, help=argparse.SUPPRESS)
    return parser.parse_args()


def weights_folder(args: argparse.Namespace) -> Path:
    return args.out / "pretrained"


def outcome_path(args: argparse.Namespace, task: str) -> Path:
    return args.out / f"{task}.json"


# ------------------------------------------------------------------------------------------------ one task, one process


def pretrain(args: argparse.Namespace) -> Outcome:
    """Train a GPT from scratch and export its weights."""
    L.seed_everything(1, verbose=False)
    losses = Losses()
    trainer = build_trainer(args, [losses], args.pretraining_steps)
    with trainer.init_module():  # Directly on the device: a GPU draws the random numbers fast.
        model = GPT(args.size)
    trainer.fit(model, datamodule=StandardLibrary(sequence_length=SEQUENCE_LENGTH, batch_size=1))
    export(model, weights_folder(args))
    return Outcome(weight_bytes(model), losses.values, digests(model), {})


def export(model: GPT, folder: Path) -> None:
    """Write the weights as sharded safetensors with an index, without the head: it is tied to the token embedding."""
    folder.mkdir(parents=True)
    state = {PREFIX + name: tensor for name, tensor in model.state_dict().items() if not name.startswith("head.")}
    total_bytes = sum(tensor.nbytes for tensor in state.values())
    shards: list[dict[str, Tensor]] = [{} for _ in range(NUM_SHARDS)]
    begin = 0
    for name, tensor in state.items():
        shards[begin * NUM_SHARDS // total_bytes][name] = tensor
        begin += tensor.nbytes
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{NUM_SHARDS:05}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def finetune(args: argparse.Namespace) -> Outcome:
    """Train a new head on the pretrained body, which stock code or the callback loads, as ``args.task`` says."""
    losses = Losses()
    callbacks: list[L.Callback] = [losses]
    if args.task == "callback":
        source = WeightsSource(weights_folder(args), strip_prefix=PREFIX, rename={"^": "body."}, exclude=r"^head\.")
        mode: Literal["assign", "copy"] = "assign" if args.accelerator == "cpu" else "copy"
        callbacks.append(MemoryEfficientRestore(mode, weights_from=source))
    trainer = build_trainer(args, callbacks, args.steps)
    torch.zeros(1, device=trainer.strategy.root_device)  # Creates the device's context, which is not part of the cost.
    with MemoryMonitor(trainer.strategy.root_device) as monitor:
        with meta_init(args.task == "callback"):
            model = Finetuning(args.size)
        if args.task == "stock":
            load_stock(model.body, weights_folder(args))
        trainer.fit(model, DataLoader(pieces_of_largest_files(), batch_size=NUM_CLASSES))  # type: ignore[arg-type]
    cost = {figure: getattr(monitor.peaks, figure) for figure in FIGURES}
    return Outcome(weight_bytes(model), losses.values, digests(model.body), cost)


def load_stock(body: GPT, folder: Path) -> None:
    """Load the shards one after the other with ``load_file`` of safetensors, which maps them."""
    found: set[Any] = set()
    for shard in sorted(folder.glob("*.safetensors")):
        state = {name.removeprefix(PREFIX): tensor for name, tensor in load_file(shard).items()}
        body.load_state_dict(state, strict=False)
        found |= state.keys()
    assert found == body.state_dict().keys() - {"head.weight"}


def digests(body: GPT) -> dict[str, str]:
    """Return name -> data type, shape and SHA-256 of every parameter. A GPU's are copied to the host in small parts."""
    found = {}
    for name, parameter in body.named_parameters():
        sha = hashlib.sha256()
        for part in parameter.detach().flatten().split(1 << 20):
            sha.update(part.cpu().numpy())
        found[name] = f"{parameter.dtype} {tuple(parameter.shape)} {sha.hexdigest()}"
    return found


def build_trainer(args: argparse.Namespace, callbacks: list[L.Callback], max_steps: int) -> L.Trainer:
    with quiet_construction():
        trainer = L.Trainer(
            accelerator=args.accelerator,
            devices=1,
            max_steps=max_steps,
            callbacks=callbacks,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            deterministic=True,
        )
    # deterministic=True also makes torch fill the memory that it allocates. An ordinary run does not pay for this.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    return trainer


# ------------------------------------------------------------------------------------------------- all tasks, compared


def compare_ways(args: argparse.Namespace) -> bool:
    """Run every task in a fresh process, print the cost of each, and return whether all promises are kept."""
    began = time.monotonic()
    args.out = args.out / time.strftime("%Y%m%d-%H%M%S")
    args.out.mkdir(parents=True)
    pretrained = run_in_fresh_process("pretrain", args)
    unlimited = {way: run_in_fresh_process(way, args) for way in WAYS}
    limited: dict[str, Outcome | None] = {}
    limit_bytes, obstacle = choose_limit(unlimited)
    if limit_bytes is not None:
        limited = {way: run_under_limit(way, args, limit_bytes) for way in WAYS}

    print(f"\nGPT {args.size!r} with a new head, {args.steps} steps on the {args.accelerator}.", end=" ")
    print(f"Pretrained weights: {mib(pretrained.weight_bytes)} MiB, in {NUM_SHARDS} shards of safetensors.")
    print("Peaks of memory in MiB, from before the model is built until the training has ended. The machine must have")
    print("anonymous memory. File-backed pages can be dropped by the kernel and read from the disk again.\n")
    print(cost_table(unlimited, limited, limit_bytes) + "\n")
    if limit_bytes is None:
        print(f"No memory limit is set, and both ways are only measured. The reason: {obstacle}.\n")
    else:
        print(f"The limit is {limit_bytes / pretrained.weight_bytes:.0%} of the weights alone.\n")
    promises = check_promises(pretrained, unlimited, limited)
    for promise, kept in promises.items():
        print(f"  {'yes' if kept else 'NO':<3}  {promise}")
    all_kept = all(promises.values())
    if all_kept and not args.keep:
        shutil.rmtree(weights_folder(args))
    print(f"\nTotal time: {time.monotonic() - began:.0f} s.")
    return all_kept


def run_in_fresh_process(task: str, args: argparse.Namespace) -> Outcome:
    """Run ``task`` in a new Python process and return its outcome. Its memory holds nothing of other tasks."""
    print(f"\n{TASKS[task]}:", flush=True)
    return read_outcome(task, args, subprocess.run(command_of(task, args)).returncode)


def run_under_limit(task: str, args: argparse.Namespace, limit_bytes: int) -> Outcome | None:
    """Run ``task`` with at most ``limit_bytes`` of memory. Return its outcome, or ``None`` if the kernel killed it."""
    print(f"\n{TASKS[task]}, with {mib(limit_bytes)} MiB of memory:", flush=True)
    # Pages that are already in the page cache would not count in the new control group, and the limit would be void.
    drop_pages(weights_folder(args))
    status = memory_limit.run_limited(command_of(task, args), limit_bytes)
    if status == -signal.SIGKILL:
        print("killed by the kernel: out of memory")
        return None
    return read_outcome(task, args, status)


def command_of(task: str, args: argparse.Namespace) -> list[str]:
    options = {**vars(args), "task": task}
    return [sys.executable, __file__, *(f"--{n.replace('_', '-')}={v}" for n, v in options.items() if n != "keep")]


def read_outcome(task: str, args: argparse.Namespace, status: int) -> Outcome:
    if status != 0:
        sys.exit(f"The task {TASKS[task]!r} failed with exit status {status}. Its files are in {args.out}")
    outcome = Outcome(**json.loads(outcome_path(args, task).read_text()))
    print(f"losses {' '.join(f'{loss:.4f}' for loss in outcome.losses)}")
    return outcome


def choose_limit(unlimited: Mapping[str, Outcome]) -> tuple[int | None, str | None]:
    """Return a memory limit between the needs of the two ways, or ``None`` and the reason why there is none.

    The limit is the need of the callback and an eighth of the difference to stock. Where an eighth is less than
    ``SPEED_BYTES``, it is that much instead, but at most half of the difference: a process with barely enough memory
    waits for the pages of its own code. For stock only anonymous memory counts, because the kernel may take back
    everything else before it kills.
    """
    ours, stock = unlimited["callback"].cost["required_bytes"], unlimited["stock"].cost["anonymous_peak_bytes"]
    obstacle = memory_limit.obstacle()
    if obstacle is not None or ours is None or stock is None:
        return None, obstacle or "this system does not report the memory of a process"
    difference = stock - ours
    if difference <= 0:
        return None, "the model is too small: its memory cannot be distinguished from the memory of Python itself"
    return ours + max(difference // 8, min(difference // 2, SPEED_BYTES)), None


def drop_pages(folder: Path) -> None:
    """Drop the shards from the page cache."""
    for shard in folder.glob("*.safetensors"):
        with shard.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def check_promises(
    pretrained: Outcome, unlimited: Mapping[str, Outcome], limited: Mapping[str, Outcome | None]
) -> dict[str, bool]:
    """Return each promise of this example, and whether it is kept."""
    finished = [outcome for outcome in (*unlimited.values(), *limited.values()) if outcome is not None]
    losses = finished[0].losses
    promises = {
        "every body is the pretrained one, bit for bit": all(outcome.body == pretrained.body for outcome in finished),
        "every training had the same losses, which fell": losses[-1] < losses[0]
        and all(outcome.losses == losses for outcome in finished),
    }
    if limited:
        promises["under the limit stock was killed"] = limited["stock"] is None
        promises["under the limit the callback trained"] = limited["callback"] is not None
    return promises


def cost_table(unlimited: Mapping[str, Outcome], limited: Mapping[str, Outcome | None], limit_bytes: int | None) -> str:
    """Return a table with one line for each process. A column without any known figure is omitted."""
    rows: list[tuple[str, ...]] = [("", "limit", "ended", "seconds", "anonymous", "file-backed", "from disk", "GPU")]
    for outcomes, limit in ((unlimited, None), (limited, limit_bytes)):
        for way, outcome in outcomes.items():
            cells = [TASKS[way], "none" if limit is None else mib(limit)]
            if outcome is None:
                cells += ["killed", *[UNKNOWN] * 5]
            else:
                cells += ["trained", f"{outcome.cost['seconds']:.1f}"]
                cells += [mib(outcome.cost[figure]) for figure in FIGURES_IN_MIB]
            rows.append(tuple(cells))
    columns = [column for column in zip(*rows, strict=True) if any(cell != UNKNOWN for cell in column[1:])]
    widths = [max(map(len, column)) for column in columns]
    lines = [[f"{row[0]:<{widths[0]}}", *map(str.rjust, row[1:], widths[1:])] for row in zip(*columns, strict=True)]
    return "\n".join("   ".join(line) for line in lines)


if __name__ == "__main__":
    sys.exit(main())
