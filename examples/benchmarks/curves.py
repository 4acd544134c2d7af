"""Measure how seconds and host memory grow with the size of a checkpoint, its number of tensors, and the threads.

Five works are measured: resume a training, load the weights, save, verify and inspect. Each point is measured in a
fresh process with the file in the page cache, and the shortest time counts. Along one axis the other two stay fixed:
300 tensors of 1 GB in all (``--fixed-gigabytes``), and the default number of threads.

    python examples/benchmarks/curves.py --device cuda --output examples/benchmarks/results/curves-gpu.json
    python examples/benchmarks/draw.py

The second command draws the picture from the JSON. A checkpoint holds the weights and the two states of AdamW for
each of them, so the weights are a third of the bytes and a quarter of the tensors.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from common import Deliver, aligned, header, positive, run_fresh, synchronize, warm
from torch import nn
from torch.utils.data import DataLoader

from lightning_memload import (
    MemoryEfficientRestore,
    StreamingCheckpointIO,
    load_weights,
    meta_init,
    verify_checkpoint,
)
from lightning_memload.cli import main as command_line
from lightning_memload.memory import MemoryMonitor

WORKS = ("resume", "load the weights", "save", "verify", "inspect")
NUM_TENSORS = 300
# The file holds a weight, two states of its size, and a step count.
COPIES, TENSORS_PER_WEIGHT = 3, 4


class Stack(L.LightningModule):
    """Weights of equal size, each with its own AdamW states.

    Args:
        num_weights: The number of parameters.
        numel: The number of elements of each parameter, float32.
    """

    def __init__(self, num_weights: int, numel: int) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.empty(numel) for _ in range(num_weights))
        for weight in self.weights:
            nn.init.ones_(weight)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        """Return a loss that depends on every weight."""
        return torch.stack([weight.sum() for weight in self.weights]).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW. The fused form needs no further memory."""
        return torch.optim.AdamW(self.parameters(), fused=True)

    def train_dataloader(self) -> DataLoader[Any]:
        """Return one batch."""
        return DataLoader(torch.zeros(1), batch_size=1)  # type: ignore[arg-type]


class StopAtTrainingStart(L.Callback):
    """Calls a function when everything is restored, and ends the process."""

    def __init__(self, end: Callable[[L.Trainer], None]) -> None:
        self.end = end

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Deliver the figures and exit."""
        synchronize()
        self.end(trainer)
        os._exit(0)


def shape_of(gigabytes: float, num_tensors: int) -> tuple[int, int]:
    """Return the number of weights and the elements of each, for a file of this size with this number of tensors."""
    num_weights = max(1, num_tensors // TENSORS_PER_WEIGHT)
    return num_weights, max(1, int(gigabytes * 1e9 / (COPIES * 4 * num_weights)))


def make_trainer(device: str, callbacks: Sequence[L.Callback] = (), **arguments: Any) -> L.Trainer:
    """Return a Trainer that prints nothing and saves by streaming."""
    return L.Trainer(
        accelerator="gpu" if device == "cuda" else "cpu",
        devices=1,
        callbacks=list(callbacks),
        plugins=[StreamingCheckpointIO()],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **arguments,
    )


def create(deliver: Deliver, device: str, path: Path, gigabytes: float, num_tensors: int) -> None:
    """Train one step and save the checkpoint."""
    torch.set_num_threads(min(16, os.cpu_count() or 1))
    trainer = make_trainer(device, max_steps=1)
    with torch.device(device):
        model = Stack(*shape_of(gigabytes, num_tensors))
    trainer.fit(model)
    trainer.save_checkpoint(path)
    deliver(None)


def measure(
    deliver: Deliver, work: str, device: str, path: Path, gigabytes: float, num_tensors: int, threads: int | None
) -> None:
    """Do one work in this process and deliver its seconds and the rise of the host memory."""
    torch.set_num_threads(min(16, os.cpu_count() or 1))
    if device == "cuda":
        torch.zeros(1, device="cuda")  # the CUDA context is not part of the work
    with meta_init():
        model = Stack(*shape_of(gigabytes, num_tensors))
    monitor = MemoryMonitor(device if device == "cuda" else None)

    def end(started: float) -> None:
        synchronize()
        seconds = time.perf_counter() - started
        monitor.stop()
        deliver({"seconds": seconds, "host_bytes": monitor.peaks.host_above_start_bytes})

    if work in ("resume", "save"):
        resume(work, device, model, path, threads, monitor, end)
        return
    monitor.start()
    started = time.perf_counter()
    if work == "load the weights":
        load_weights(model, path, device=device, num_threads=threads)
    elif work == "verify":
        verify_checkpoint(path, num_threads=threads)
    else:
        with contextlib.redirect_stdout(io.StringIO()):
            command_line(["inspect", str(path)])
    end(started)


def resume(
    work: str,
    device: str,
    model: Stack,
    path: Path,
    threads: int | None,
    monitor: MemoryMonitor,
    end: Callable[[float], None],
) -> None:
    """Resume until training starts. For ``"save"``, the save that follows is measured instead."""
    if work == "resume":
        monitor.start()
    started = time.perf_counter()

    def stop(trainer: L.Trainer) -> None:
        if work == "resume":
            end(started)
            return
        monitor.start()
        saving = time.perf_counter()
        trainer.save_checkpoint(path.with_suffix(".saved"))
        end(saving)

    restore = MemoryEfficientRestore(num_threads=threads, log=False)
    make_trainer(device, [restore, StopAtTrainingStart(stop)], max_steps=9).fit(model, ckpt_path=path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure all points, print a table, and write the JSON."""
    options = parse(arguments)
    options.data.mkdir(parents=True, exist_ok=True)
    points: list[dict[str, Any]] = []
    report = {
        **header("curves", arguments),
        "device": options.device,
        "fixed_gigabytes": options.fixed_gigabytes,
        "points": points,
    }
    for gigabytes, num_tensors, axes in files(options):
        path = options.data / "curves.ckpt"
        run_fresh(create, options.device, path, gigabytes, num_tensors)
        for axis, threads in axes:
            for work in WORKS:
                if axis == "threads" and work in ("inspect", "save"):
                    continue  # The first has no threads, the second chooses them itself.
                point = take_point(work, options, path, gigabytes, num_tensors, threads)
                points.append({"work": work, "axis": axis, **point})
                print(f"  {json.dumps(points[-1])}", file=sys.stderr, flush=True)
                if options.output:
                    options.output.write_text(json.dumps(report, indent=1) + "\n")
        path.unlink()
    print("\n".join(aligned([["", "along", "GB", "tensors", "threads", "seconds", "host, MiB"], *table(report)], 2)))
    return 0


def files(options: argparse.Namespace) -> list[tuple[float, int, list[tuple[str, int | None]]]]:
    """Return each checkpoint to create, with the axes whose points are measured on it: GB, tensors, axes."""
    found: list[tuple[float, int, list[tuple[str, int | None]]]] = []
    found += [(gigabytes, NUM_TENSORS, [("bytes", None)]) for gigabytes in options.gigabytes]
    found += [(options.fixed_gigabytes, num_tensors, [("tensors", None)]) for num_tensors in options.tensors]
    found.append((options.fixed_gigabytes, NUM_TENSORS, [("threads", threads) for threads in options.threads]))
    return found


def take_point(
    work: str, options: argparse.Namespace, path: Path, gigabytes: float, num_tensors: int, threads: int | None
) -> dict[str, Any]:
    """Measure one work several times and return the shortest time and the highest peak."""
    runs = []
    for _ in range(1 if work == "save" and gigabytes > options.fixed_gigabytes else options.repetitions):
        warm(path)
        runs.append(run_fresh(measure, work, options.device, path, gigabytes, num_tensors, threads))
        path.with_suffix(".saved").unlink(missing_ok=True)
    peaks = [run["host_bytes"] for run in runs]
    return {
        "bytes": path.stat().st_size,
        "tensors": num_tensors,
        "threads": threads,
        "seconds": min(run["seconds"] for run in runs),
        "host_bytes": max((peak for peak in peaks if peak is not None), default=None),
    }


def table(report: dict[str, Any]) -> list[list[str]]:
    """Return the rows of the table, in the order of the axes and works."""
    points = report["points"]
    axes = list(dict.fromkeys(point["axis"] for point in points))
    rows = sorted(points, key=lambda point: (axes.index(point["axis"]), WORKS.index(point["work"])))
    return [
        [
            point["work"],
            point["axis"],
            f"{point['bytes'] / 1e9:.2f}",
            f"{point['tensors']:,}",
            "default" if point["threads"] is None else str(point["threads"]),
            f"{point['seconds']:.3f}",
            "-" if point["host_bytes"] is None else f"{point['host_bytes'] / 2**20:.0f}",
        ]
        for point in rows
    ]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    parser.add_argument(
        "--gigabytes", type=float, nargs="*", default=[0.1, 0.4, 1.6, 6.4], help="sizes of the file in GB"
    )
    parser.add_argument(
        "--fixed-gigabytes", type=float, default=1.0, help="size along the other axes (default: %(default)s)"
    )
    parser.add_argument(
        "--tensors", type=positive, nargs="*", default=[10, 100, 1000, 10_000, 100_000], help="numbers of tensors"
    )
    parser.add_argument("--threads", type=positive, nargs="*", default=[1, 2, 4, 8, 16], help="numbers of threads")
    parser.add_argument("--repetitions", type=positive, default=2, help="default: %(default)s")
    parser.add_argument(
        "--data", type=Path, default=Path("runs/curves"), help="folder for the checkpoints (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, help="write all results to this JSON file")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
