"""Measure saves in the middle of a training: with stock Lightning, with ``torch.save``, and with this project.

One Trainer trains a GPT with AdamW. After a step it saves with ``trainer.save_checkpoint`` through the CheckpointIO of
one way, and then takes the next step, which a save in the background may delay. The ways take turns, so that a change
in the speed of the disk affects all of them. One turn in each round is a step without a save.

Training waits while the call lasts, and again if the optimizer of the next step takes longer than without a save. Other
delays of that step are visible in the time from the call to its end. Memory is the rise above the level before the
save, until the call returns or, for a save in the background, until the save has ended. After the measurement every
file is read back and compared with the state at the call. The limits of the machine are measured in the same process:
the checksum on one core, writing to the page cache, writing to the disk, and copying from the GPU.

    python examples/benchmarks/save.py --size gpt2-xl --device cuda --repetitions 2 --output save.json

The disk needs space for one checkpoint. Lightning's own ways need the space of a second one in the folder for temporary
files.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import inspect
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
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.utils.data import DataLoader
from zlib_ng import zlib_ng

from lightning_memload import MemoryEfficientRestore, StreamingCheckpointIO
from lightning_memload.memory import MemoryMonitor
from lightning_memload.save import save_torch
from lightning_memload.transfer import StagingRing, choose_layout

# Tokens of one step. They are few, so that a step takes little memory and hides little of a save in the background.
NUM_TOKENS = 128


class GPT(ConfiguredGPT):
    """The GPT with an optimizer that needs no memory besides its states, so that the measured rise is the save's."""

    def configure_optimizers(self) -> Any:
        """Return fused AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=1e-4, fused=True)


class SaveToDisk(SaveToFile):
    """Saves with ``torch.save`` and waits for the disk."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write the file and call ``fsync``."""
        super().save_checkpoint(checkpoint, path)
        with open(path, "rb") as file:
            os.fsync(file.fileno())


class NotDurable(StreamingCheckpointIO):
    """``StreamingCheckpointIO`` without its fsync, to compare it with ways that do not wait for the disk."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write the file without ``fsync``."""
        self.last_save = save_torch(checkpoint, path, durable=False)


class DistributedAsync(CheckpointIO):
    """``torch.distributed.checkpoint.async_save`` of one process: a thread writes from a copy in host memory."""

    def __init__(self) -> None:
        self.saved: Any = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Copy the state, and write it in a thread."""
        self.saved = async_save(checkpoint, checkpoint_id=path, no_dist=True)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Not needed."""
        raise NotImplementedError

    def remove_checkpoint(self, path: Any) -> None:
        """Delete the directory."""
        remove(Path(path))

    def teardown(self) -> None:
        """Wait for the thread."""
        if self.saved is not None:
            self.saved.result()


# The ways -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Way:
    """One way to save.

    Attributes:
        label: Its name in the table.
        make: Creates the CheckpointIO of one save. ``None``: use the one that the callback has installed.
        fsync: Whether the save ends only when the file is on the disk.
        in_background: Whether training continues during the save.
        by_lightning: Whether a ``ModelCheckpoint`` saves instead of this benchmark. ``"until_step"`` and a snapshot
            delay only the saves of a ``ModelCheckpoint``.
        snapshot: Whether the state is copied to host memory first.
    """

    label: str
    make: Callable[[], CheckpointIO] | None
    fsync: bool = False
    in_background: bool = False
    by_lightning: bool = False
    snapshot: bool = False


WAYS = {
    "stock": Way("stock Lightning", TorchCheckpointIO),
    "stock-async": Way(
        "stock Lightning, `AsyncCheckpointIO()`", lambda: AsyncCheckpointIO(TorchCheckpointIO()), in_background=True
    ),
    "dcp-async": Way(
        "`torch.distributed.checkpoint.async_save`, a directory", DistributedAsync, fsync=True, in_background=True
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
    # The callback has asynchronous_save="until_step". It writes other saves than a ModelCheckpoint's as with True.
    "ours-async": Way("`MemoryEfficientRestore(asynchronous_save=True)`", None, fsync=True, in_background=True),
    "ours-async-until-step": Way(
        '`MemoryEfficientRestore(asynchronous_save="until_step")`',
        None,
        fsync=True,
        in_background=True,
        by_lightning=True,
    ),
    # The callback's CheckpointIO is the same one, and takes snapshots in the turns of this way only.
    "ours-async-snapshot": Way(
        '`MemoryEfficientRestore(asynchronous_save=True, save_snapshot="auto")`',
        None,
        fsync=True,
        in_background=True,
        by_lightning=True,
        snapshot=True,
    ),
}
if "no_dist" not in inspect.signature(async_save).parameters:
    del WAYS["dcp-async"]  # An older torch requires a process group.
NO_SAVE = "step"


class Saves(L.Callback):
    """Saves after every step with the next way, and records the cost until the following step has ended.

    Args:
        options: The command line.
        path: The path of each checkpoint.
        on_run: Called after each turn with the results of all turns so far.
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
        # save_top_k=0 saves nothing. It is 1 during the turns of this ModelCheckpoint.
        self.saver = ModelCheckpoint(path.parent, filename=path.stem, every_n_train_steps=1, save_top_k=0)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save a tiny checkpoint with every way, so that one-time costs are not measured, and prepare the turns."""
        installed = trainer.strategy.checkpoint_io
        ios = {name: WAYS[name].make or (lambda: installed) for name in self.options.ways}
        for make in ios.values():
            io = make()
            io.save_checkpoint({"warm": torch.ones(1, device=pl_module.device)}, self.path)
            io.teardown()
            remove(self.path)
        self.turns = self.take_turns(trainer, pl_module, ios)

    def on_train_batch_start(self, *_: Any) -> None:
        """Note the time: a ModelCheckpoint has saved at the end of the batch before."""
        self.next_batch_started = time.perf_counter()
        self.saver.save_top_k = 0

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        """Note the time when forward and backward have ended."""
        synchronize()
        self.backward_ended = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """End one turn and begin the next."""
        next(self.turns, None)

    def take_turns(
        self, trainer: L.Trainer, module: L.LightningModule, ios: dict[str, Callable[[], CheckpointIO]]
    ) -> Iterator[None]:
        """Measure all turns, one after the other. Training takes one step at every ``yield``."""
        for turn, name in enumerate(self.names):
            run: dict[str, Any] = {"way": name, "load_average": os.getloadavg()[0]}
            expected = digest(module, trainer.optimizers)
            by_lightning = name != NO_SAVE and WAYS[name].by_lightning
            if by_lightning:
                # A save is delayed only if an earlier checkpoint exists, so this writes a small one.
                io = trainer.strategy.checkpoint_io = ios[name]()
                io.snapshot = "auto" if WAYS[name].snapshot else False  # type: ignore[attr-defined]
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
                # A save of this project reports its own end: the file is on the disk. Lightning's asynchronous save
                # ends when the file gets its name. Its time is the ctime of the file.
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
        """Load the checkpoint and return its size in bytes, and whether its digest is the expected one."""
        files = [path for path in (self.path, *self.path.rglob("*")) if path.is_file()]
        if self.path.is_dir():
            loaded = StreamingCheckpointIO().load_checkpoint(self.path, weights_only=False)
        else:
            loaded = torch.load(self.path, map_location="cpu", mmap=True, weights_only=False)
        found = digest_of(loaded["state_dict"], loaded["optimizer_states"], self.options.device)
        return {"bytes": sum(path.stat().st_size for path in files), "right": found == expected}


def settle() -> None:
    """Collect garbage, return free memory to the system, and write all cached pages to the disk."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    os.sync()


def remove(path: Path) -> None:
    """Delete a checkpoint, a file or a directory, if it exists."""
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def phases(io: CheckpointIO) -> dict[str, float]:
    """Return the seconds of each phase of the last save. Empty for a CheckpointIO that does not report them."""
    stats = getattr(io, "last_save", None)
    names = ("pickle_seconds", "snapshot_seconds", "write_seconds", "commit_seconds") if stats else ()
    return {name: getattr(stats, name) for name in names}


def memory(monitor: MemoryMonitor) -> dict[str, Any]:
    """Return the memory figures of a turn, in bytes."""
    peaks = monitor.peaks
    return {
        "host_above_start_bytes": peaks.host_above_start_bytes,
        "pinned_peak_bytes": peaks.pinned_peak_bytes,
        "gpu_above_start_bytes": above(peaks.cuda_allocated_start_bytes, peaks.cuda_allocated_peak_bytes),
    }


# The machine's own limits ---------------------------------------------------------------------------------------------


def ceilings(options: argparse.Namespace) -> dict[str, float]:
    """Return the measured limits of this machine, in GB/s."""
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
    """Write blocks to a new file, one after the other. ``durable``: also wait for the disk."""
    path.unlink(missing_ok=True)
    with open(path, "wb", buffering=0) as file:
        for block in blocks:
            file.write(block)
        if durable:
            os.fsync(file.fileno())


def copy(source: torch.Tensor, target: torch.Tensor, count: int) -> None:
    """Copy ``source`` to ``target`` ``count`` times, and wait for the end."""
    for _ in range(count):
        target.copy_(source, non_blocking=True)
    torch.cuda.synchronize()


def rate(work: Callable[[], object]) -> float:
    """Return the speed of work on one GiB in GB/s, the best of three."""
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
PHASES = {f"{phase}, s": (f"{phase}_seconds", 1) for phase in ("pickle", "snapshot", "write", "commit")}


def main(arguments: Sequence[str] | None = None) -> int:
    """Train and save, print a table, write the JSON, and return the exit status: 1 if a file is wrong."""
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
        # The report is written after every turn, so that an interrupted benchmark keeps its results.
        report.update(first, **summarize(runs), runs=runs)
        if options.output:
            options.output.write_text(json.dumps(report, indent=1) + "\n")

    # log=False: the callback measures nothing, since this takes time. keep_on_device=True: the end moves nothing.
    restore = MemoryEfficientRestore(asynchronous_save="until_step", keep_on_device=True, log=False)
    saves = Saves(options, (options.data / "save.ckpt").resolve(), on_run)
    # The first step creates the optimizer's states.
    trainer = make_trainer(
        options, [restore, saves, saves.saver], max_epochs=-1, max_steps=1 + len(saves.names), enable_checkpointing=True
    )
    trainer.fit(GPT(options.size), DataLoader(torch.randint(256, (64, NUM_TOKENS + 1)), batch_size=1))  # type: ignore[arg-type]
    print(table(report))
    return 0 if report["right"] else 1


def summarize(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the medians over the turns of each way, and over the steps without a save."""
    turns = {name: [run for run in runs if run["way"] == name] for name in (NO_SAVE, *WAYS)}
    step = medians(turns.pop(NO_SAVE))
    ways = {}
    for name, mine in turns.items():
        if mine:
            way = ways[name] = {**medians(mine), "right": all(run["right"] for run in mine), "repetitions": len(mine)}
            way["bytes_per_second"] = way["bytes"] / way["seconds"]
            way["blocked_seconds"] = way["call_seconds"] + max(0, way["update_seconds"] - step["update_seconds"])
    return {
        # Load of the last minute, including this benchmark. Well above 2, other programs used the machine too.
        "load_average": median([run["load_average"] for run in runs]),
        "step": step,
        "ways": ways,
        "right": all(way["right"] for way in ways.values()),
    }


def medians(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the median of every figure."""
    names = {name: None for run in runs for name in run if name.endswith(("seconds", "bytes"))}
    return {name: median([run.get(name) for run in runs]) for name in names}


def cells(report: dict[str, Any], name: str, columns: dict[str, tuple[str, int]] = COLUMNS) -> list[str]:
    """Return one row of the table: label, whether it waits for the disk, figures, and whether the file is right."""
    way = report["ways"][name]
    figures = [number(way.get(figure), unit) for figure, unit in columns.values()]
    return [WAYS[name].label, "yes" if WAYS[name].fsync else "no", *figures, "yes" if way["right"] else "**no**"]


def table(report: dict[str, Any]) -> str:
    """Return the medians as a table with the machine's limits below."""
    columns = COLUMNS | PHASES
    rows = [["", "fsync", *columns, "right"], *(cells(report, name, columns) for name in report["ways"])]
    return "\n".join([f"{report['size']} on {report['device']}", *aligned(rows, 2), at_best(report)])


def at_best(report: dict[str, Any]) -> str:
    """Return the machine's limits as a sentence."""
    return (
        "Limits of this machine, GB/s: "
        + ", ".join(f"{name} {value:.1f}" for name, value in report["ceilings"].items())
        + "."
    )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="demo", help="size of the model (default: %(default)s)")
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="default: cuda if available, else cpu",
    )
    parser.add_argument("--repetitions", type=positive, default=3, help="default: %(default)s")
    parser.add_argument(
        "--ways",
        nargs="+",
        choices=WAYS,
        default=list(WAYS),
        metavar="WAY",
        help=f"default: all. The ways: {', '.join(WAYS)}",
    )
    parser.add_argument(
        "--data", type=Path, default=Path("runs/save"), help="folder for the checkpoints (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, help="write all results to this JSON file")
    options = parser.parse_args(arguments)
    options.accelerator = options.device  # Lightning's word for the device.
    return options


if __name__ == "__main__":
    sys.exit(main())
