"""Measure saves in the middle of a training: stock Lightning's, ``torch.save``'s, and this project's.

One Trainer trains a GPT with AdamW. After a step it saves with ``trainer.save_checkpoint``, through the CheckpointIO of
one way, and then takes the next step, which a save in the background may hold up. The ways take turns, so that a disk
or a neighbour that changes its mind meets them all; one turn is a step without a save. Training waits while the call
lasts, and again if the optimizer of the next step takes longer than without a save. What else slows that step shows in
the time from the call to its end. Memory is counted above its level before the save, until the call returns, or until
the save has ended where it goes on in the background. Every file is read back and compared with the state at the call,
outside the figures. What the machine can do at best is measured in the same process: one core's checksum, writing to
the page cache, the disk, and copying from the GPU.

    python examples/benchmarks/save.py --size gpt2-xl --device cuda --repetitions 2 --output save.json

The disk holds one checkpoint at a time, and with Lightning's own ways another one in the folder for temporary files.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import shutil
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from common import (
    GIB,
    MIB,
    above,
    aligned,
    digest,
    digest_of,
    header,
    median,
    number,
    positive,
    synchronize,
    time_of,
)
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import AsyncCheckpointIO, CheckpointIO, TorchCheckpointIO
from resume import SIZES, ConfiguredGPT, SaveToFile, make_trainer
from torch.utils.data import DataLoader
from zlib_ng import zlib_ng

from lightning_memload import MemoryEfficientRestore, StreamingCheckpointIO
from lightning_memload.memory import MemoryMonitor
from lightning_memload.save import save_torch
from lightning_memload.transfer import StagingRing, choose_layout

# Of a step: few, so that it takes little memory and hides little of a save in the background.
NUM_TOKENS = 128


class GPT(ConfiguredGPT):
    """The GPT with an optimizer that takes no memory beside its states, so that what is seen is the save's."""

    def configure_optimizers(self) -> Any:
        """AdamW, fused."""
        return torch.optim.AdamW(self.parameters(), lr=1e-4, fused=True)


class SaveToDisk(SaveToFile):
    """Saves with torch alone, and waits for the disk."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write, and sync."""
        super().save_checkpoint(checkpoint, path)
        with open(path, "rb") as file:
            os.fsync(file.fileno())


class NotDurable(StreamingCheckpointIO):
    """Saves as it always does, but does not wait for the disk: to be compared with those that do not."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write only."""
        self.last_save = save_torch(checkpoint, path, durable=False)


# The ways -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Way:
    """One way to save.

    Attributes:
        label: What it is, for the table.
        make: Makes the CheckpointIO of one save. ``None``: take the one that the callback has installed.
        fsync: Whether a save has ended only when the disk has it.
        in_background: Whether training goes on meanwhile.
        by_lightning: Whether a ``ModelCheckpoint`` saves, which alone may be late, instead of this benchmark.
    """

    label: str
    make: Callable[[], CheckpointIO] | None
    fsync: bool = False
    in_background: bool = False
    by_lightning: bool = False


WAYS = {
    "stock": Way("stock Lightning", TorchCheckpointIO),
    "stock-async": Way(
        "stock Lightning, `AsyncCheckpointIO()`", lambda: AsyncCheckpointIO(TorchCheckpointIO()), in_background=True
    ),
    "torch": Way("`torch.save` to the file", SaveToFile),
    "torch-fsync": Way("`torch.save` to the file", SaveToDisk, fsync=True),
    "ours-no-fsync": Way("`StreamingCheckpointIO` without its fsync", NotDurable),
    "ours": Way("`StreamingCheckpointIO()`", StreamingCheckpointIO, fsync=True),
    "ours-directory": Way(
        '`StreamingCheckpointIO(format="directory")`', partial(StreamingCheckpointIO, format="directory"), fsync=True
    ),
    "ours-safetensors": Way(
        '`StreamingCheckpointIO(format="safetensors+state")`',
        partial(StreamingCheckpointIO, format="safetensors+state"),
        fsync=True,
    ),
    # With "until_step" too, what others than a ModelCheckpoint save is written at once.
    "ours-async": Way("`MemoryEfficientRestore(asynchronous_save=True)`", None, fsync=True, in_background=True),
    "ours-async-until-step": Way(
        '`MemoryEfficientRestore(asynchronous_save="until_step")`',
        None,
        fsync=True,
        in_background=True,
        by_lightning=True,
    ),
}
NO_SAVE = "step"


class Saves(L.Callback):
    """Saves after every step, each time another way, and notes what that cost until the next step has ended.

    Args:
        options: The command line.
        path: Where to save.
        on_run: Called with all that has been measured, after each turn.
    """

    def __init__(self, options: argparse.Namespace, path: Path, on_run: Callable[[list[dict[str, Any]]], None]) -> None:
        self.options = options
        self.path = path
        self.on_run = on_run
        self.runs: list[dict[str, Any]] = []
        self.names = [name for _ in range(options.repetitions) for name in (NO_SAVE, *options.ways)]
        self.turns: Iterator[None] = iter(())
        self.backward_ended = 0.0
        self.next_batch_started = 0.0
        # Saves in its turns only.
        self.saver = ModelCheckpoint(path.parent, filename=path.stem, every_n_train_steps=1, save_top_k=0)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Prepare, and bring in what a process needs only once."""
        installed = trainer.strategy.checkpoint_io
        ios = {name: WAYS[name].make or (lambda: installed) for name in self.options.ways}
        for make in ios.values():
            io = make()
            io.save_checkpoint({"warm": torch.ones(1, device=pl_module.device)}, self.path)
            io.teardown()
            remove(self.path)
        self.turns = self.take_turns(trainer, pl_module, ios)

    def on_train_batch_start(self, *_: Any) -> None:
        """What a ModelCheckpoint saves at the end of a batch is saved."""
        self.next_batch_started = time.perf_counter()
        self.saver.save_top_k = 0

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        """Forward and backward have run."""
        synchronize()
        self.backward_ended = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """End one turn and begin the next."""
        next(self.turns, None)

    def take_turns(
        self, trainer: L.Trainer, module: L.LightningModule, ios: dict[str, Callable[[], CheckpointIO]]
    ) -> Iterator[None]:
        """Measure one turn after the other. Training takes a step at every ``yield``."""
        for turn, name in enumerate(self.names):
            run: dict[str, Any] = {"way": name, "load_average": os.getloadavg()[0]}
            expected = digest(module, trainer.optimizers)
            by_lightning = name != NO_SAVE and WAYS[name].by_lightning
            if by_lightning:
                # Late is only what has a checkpoint before it.
                io = trainer.strategy.checkpoint_io = ios[name]()
                io.save_checkpoint({"small": 1}, self.path.with_name("before.ckpt"))
                io.teardown()
            settle()
            with MemoryMonitor(self.options.device) as monitor:
                started, started_at = time.perf_counter(), time.time()
                if name != NO_SAVE:
                    io = trainer.strategy.checkpoint_io = ios[name]()
                    if by_lightning:
                        self.saver.save_top_k = 1
                    else:
                        trainer.save_checkpoint(self.path, weights_only=False)
                    run["seconds"] = run["call_seconds"] = time.perf_counter() - started
                    if not WAYS[name].in_background:
                        monitor.stop()
                yield
                synchronize()
                run["next_step_seconds"] = time.perf_counter() - started
                run["update_seconds"] = time.perf_counter() - self.backward_ended
                if name != NO_SAVE:
                    io.teardown()
            if by_lightning:
                run["call_seconds"] = self.next_batch_started - started
                remove(self.path.with_name("before.ckpt"))
            if name != NO_SAVE:
                # In the background a save has ended when the disk has the file, which our own figures tell; Lightning's
                # does not wait for it, and has ended when the file gets its name, which changes its ctime.
                stats = getattr(io, "last_save", None)
                ended = stats.seconds if stats else self.path.stat().st_ctime - started_at
                run["seconds"] = max(run["seconds"], ended)
                run.update(phases(io), **self.read_back(expected))
            run.update(memory(monitor))
            self.runs.append(run)
            remove(self.path)
            self.on_run(self.runs)
            print(f"  {name} {turn + 1}/{len(self.names)}: {json.dumps(run)}", file=sys.stderr, flush=True)

    def read_back(self, expected: str) -> dict[str, Any]:
        """Load the file, and compare it with what was to be saved."""
        files = [path for path in (self.path, *self.path.rglob("*")) if path.is_file()]
        if self.path.is_dir():
            loaded = StreamingCheckpointIO().load_checkpoint(self.path, weights_only=False)
        else:
            loaded = torch.load(self.path, map_location="cpu", mmap=True, weights_only=False)
        found = digest_of(loaded["state_dict"], loaded["optimizer_states"], self.options.device)
        return {"bytes": sum(path.stat().st_size for path in files), "right": found == expected}


def settle() -> None:
    """Leave no garbage, no free memory in the process, and nothing for the disk to do."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    os.sync()


def remove(path: Path) -> None:
    """Delete a checkpoint, if there is one."""
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def phases(io: CheckpointIO) -> dict[str, float]:
    """What this project's saves know of themselves."""
    stats = getattr(io, "last_save", None)
    names = ("pickle_seconds", "write_seconds", "commit_seconds") if stats else ()
    return {name: getattr(stats, name) for name in names}


def memory(monitor: MemoryMonitor) -> dict[str, Any]:
    """What a turn took."""
    peaks = monitor.peaks
    return {
        "host_above_start_bytes": peaks.host_above_start_bytes,
        "pinned_peak_bytes": peaks.pinned_peak_bytes,
        "gpu_above_start_bytes": above(peaks.cuda_allocated_start_bytes, peaks.cuda_allocated_peak_bytes),
    }


# The machine's own limits ---------------------------------------------------------------------------------------------


def ceilings(options: argparse.Namespace) -> dict[str, float]:
    """What this machine can do at best, in GB/s."""
    data = torch.randint(0, 256, (GIB,), dtype=torch.uint8)
    view = memoryview(data.numpy())  # type: ignore[arg-type]
    blocks = [view[start : start + MIB] for start in range(0, GIB, MIB)]
    found = {
        "one core's zlib": rate(lambda: zlib.crc32(view)),
        "one core's zlib-ng": rate(lambda: zlib_ng.crc32(view)),
    }
    path = options.data / "ceiling.bin"
    found["page cache"] = rate(lambda: write(path, blocks, durable=False))
    found["disk"] = rate(lambda: write(path, blocks, durable=True))
    path.unlink()
    if options.device != "cpu":
        with StagingRing(choose_layout(128 * MIB, 4), pinned=True) as ring:
            source = data[: ring.layout.block_bytes].to(options.device)
            count = GIB // len(source)
            found["from the GPU"] = rate(lambda: copy(source, ring.tensors[0], count))
    return found


def write(path: Path, blocks: list[memoryview], *, durable: bool) -> None:
    """Write blocks to a new file, one after the other."""
    path.unlink(missing_ok=True)
    with open(path, "wb", buffering=0) as file:
        for block in blocks:
            file.write(block)
        if durable:
            os.fsync(file.fileno())


def copy(source: torch.Tensor, target: torch.Tensor, count: int) -> None:
    """Copy so many times, and wait."""
    for _ in range(count):
        target.copy_(source, non_blocking=True)
    torch.cuda.synchronize()


def rate(work: Callable[[], object]) -> float:
    """The GB/s of work on one GiB, the best of three."""
    return GIB / min(time_of(work) for _ in range(3)) / 1e9


# Figures, table -------------------------------------------------------------------------------------------------------

COLUMNS = {
    "s": ("seconds", 1),
    "GB/s": ("bytes_per_second", 10**9),
    "training waits, s": ("blocked_seconds", 1),
    "next step ends, s": ("next_step_seconds", 1),
    "host above start, GiB": ("host_above_start_bytes", GIB),
    "pinned, GiB": ("pinned_peak_bytes", GIB),
    "GPU above start, GiB": ("gpu_above_start_bytes", GIB),
}
PHASES = {f"{phase}, s": (f"{phase}_seconds", 1) for phase in ("pickle", "write", "commit")}


def main(arguments: Sequence[str] | None = None) -> int:
    """Train and save, print a table, and write the JSON."""
    options = parse(arguments)
    options.data.mkdir(parents=True, exist_ok=True)
    first = {
        **header("save", arguments),
        "size": options.size,
        "device": options.device,
        "ceilings": ceilings(options),
    }
    report: dict[str, Any] = {}

    def on_run(runs: list[dict[str, Any]]) -> None:
        # After every turn, so that a run that is cut short leaves what it has measured.
        report.update(first, **summarize(runs), runs=runs)
        if options.output:
            options.output.write_text(json.dumps(report, indent=1) + "\n")

    # Its own figures are off, since measuring them costs some time. At the end nothing is moved to host memory.
    restore = MemoryEfficientRestore(asynchronous_save="until_step", keep_on_device=True, log=False)
    saves = Saves(options, (options.data / "save.ckpt").resolve(), on_run)
    # The first step makes the optimizer's states.
    trainer = make_trainer(
        options, [restore, saves, saves.saver], max_epochs=-1, max_steps=1 + len(saves.names), enable_checkpointing=True
    )
    trainer.fit(GPT(options.size), DataLoader(torch.randint(256, (64, NUM_TOKENS + 1)), batch_size=1))  # type: ignore[arg-type]
    print(table(report))
    return 0 if report["right"] else 1


def summarize(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the turns of each way, and of a step without a save."""
    turns = {name: [run for run in runs if run["way"] == name] for name in (NO_SAVE, *WAYS)}
    step = medians(turns.pop(NO_SAVE))
    ways = {}
    for name, mine in turns.items():
        if mine:
            way = ways[name] = {**medians(mine), "right": all(run["right"] for run in mine), "repetitions": len(mine)}
            way["bytes_per_second"] = way["bytes"] / way["seconds"]
            way["blocked_seconds"] = way["call_seconds"] + max(0, way["update_seconds"] - step["update_seconds"])
    return {
        # Of the last minute, this benchmark itself included: well above 2, others were using the machine too.
        "load_average": median([run["load_average"] for run in runs]),
        "step": step,
        "ways": ways,
        "right": all(way["right"] for way in ways.values()),
    }


def medians(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The median of every figure."""
    names = {name: None for run in runs for name in run if name.endswith(("seconds", "bytes"))}
    return {name: median([run.get(name) for run in runs]) for name in names}


def cells(report: dict[str, Any], name: str, columns: dict[str, tuple[str, int]] = COLUMNS) -> list[str]:
    """One row of the table: its label, whether it waits for the disk, its figures, and whether the file is right."""
    way = report["ways"][name]
    figures = [number(way.get(figure), unit) for figure, unit in columns.values()]
    return [WAYS[name].label, "yes" if WAYS[name].fsync else "no", *figures, "yes" if way["right"] else "**no**"]


def table(report: dict[str, Any]) -> str:
    """Format the medians for people."""
    columns = COLUMNS | PHASES
    rows = [["", "fsync", *columns, "right"], *(cells(report, name, columns) for name in report["ways"])]
    return "\n".join([f"{report['size']} on {report['device']}", *aligned(rows, 2), at_best(report)])


def at_best(report: dict[str, Any]) -> str:
    """The machine's own limits."""
    return "At best, GB/s: " + ", ".join(f"{name} {value:.1f}" for name, value in report["ceilings"].items()) + "."


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="demo")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repetitions", type=positive, default=3)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY", help=", ".join(WAYS))
    parser.add_argument("--data", type=Path, default=Path("runs/save"), help="where it is saved")
    parser.add_argument("--output", type=Path, help="write everything to this JSON file")
    options = parser.parse_args(arguments)
    options.accelerator = options.device  # as Lightning calls it
    return options


if __name__ == "__main__":
    sys.exit(main())
