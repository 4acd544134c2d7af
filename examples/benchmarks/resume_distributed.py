"""Measure a resume by several processes: stock Lightning, each process reads all, and all share what they read.

Every variant runs several times, each time in fresh processes, on the same checkpoint of a GPT with AdamW. A run ends
when training starts on every rank. Its time is that of the last process to start, since rank 0 starts the others. Other
figures are those of the rank with the largest. The weights and states of all ranks and variants must be equal, bit for
bit. The medians are printed as a table and written as JSON.

    python examples/benchmarks/resume_distributed.py --devices 2
    python examples/benchmarks/resume_distributed.py --devices 4 --size gpt2-xl --accelerator gpu --output ddp.json
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from common import GIB, aligned, digest, header, median, number, positive, run_fresh, synchronize, warm
from resume import SIZES, batches, checkpoint_path, save

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from gpt import GPT

from lightning_memload import MemoryEfficientRestore
from lightning_memload.memory import MemoryMonitor

VARIANTS = {
    "stock": "stock Lightning",
    "each": 'read="each"',
    "stripes": 'read="stripes"',
}
COLUMNS = ("fit() to training, s", "streaming, s", "read by a rank, GiB", "received, GiB", "host, GiB", "GPU, GiB")


class StopAtTrainingStart(L.Callback):
    """Writes the figures of its rank when training starts, and ends the process.

    Args:
        folder: The folder of the results.
        monitor: The running meter of memory.
        restore: The callback that is measured, ``None`` for stock.
    """

    def __init__(self, folder: Path, monitor: MemoryMonitor, restore: MemoryEfficientRestore | None) -> None:
        self.folder, self.monitor, self.restore = folder, monitor, restore
        self.started = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the figures, wait for the other ranks, and exit: everything is restored now."""
        synchronize()
        seconds = time.perf_counter() - self.started
        self.monitor.stop()
        peaks = self.monitor.peaks
        report = self.restore.report if self.restore is not None else None
        result = {
            "seconds": seconds,
            "host_above_start_bytes": peaks.host_above_start_bytes,
            "cuda_allocated_peak_bytes": peaks.cuda_allocated_peak_bytes,
            "transfer_seconds": report and report.total.transfer_seconds,
            "bytes_read": report and report.total.bytes_read,
            "bytes_received": report and report.bytes_received,
            "read": report and report.read,
            "read_reason": report and report.read_reason,
            "digest": digest(pl_module, trainer.optimizers),
        }
        (self.folder / f"rank{trainer.global_rank}.json").write_text(json.dumps(result))
        trainer.strategy.barrier()
        sys.stdout.flush()
        os._exit(0)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark, print the table, write the JSON, and return the exit status: 1 if the digests differ."""
    options = parse(arguments)
    if options.run is not None:
        resume(options)
        return 0
    options.data.mkdir(parents=True, exist_ok=True)
    path = checkpoint_path(options)
    if not path.exists():
        run_fresh(save, options)
    results: dict[str, list[list[dict[str, Any]]]] = {variant: [] for variant in options.variants}
    report: dict[str, Any] = {}
    for repetition in range(options.repetitions):
        for variant in options.variants:
            warm(path)
            ranks = run(options, variant)
            results[variant].append(ranks)
            seconds = min(rank["seconds"] for rank in ranks)
            print(f"  {variant} #{repetition + 1}: {seconds:.2f} s", file=sys.stderr, flush=True)
            # The report is written after every run, so that an interrupted benchmark keeps its results.
            report = {
                **header("resume-distributed", arguments),
                "size": options.size,
                "devices": options.devices,
                "strategy": options.strategy,
                "device": "cuda" if options.accelerator == "gpu" else "cpu",
                "checkpoint_bytes": path.stat().st_size,
                "load_average": os.getloadavg()[0],
                "variants": {name: summarize(runs) for name, runs in results.items() if runs},
                "equal": len({r["digest"] for runs in results.values() for of_run in runs for r in of_run}) == 1,
                "runs": results,
            }
            if options.output:
                options.output.write_text(json.dumps(report, indent=1) + "\n")
    rows = [["", *COLUMNS], *(cells(report, name) for name in report["variants"])]
    print("\n".join(aligned(rows, 1)))
    print(f"all ranks and variants are equal bit for bit: {'yes' if report['equal'] else 'NO'}")
    return 0 if report["equal"] else 1


def run(options: argparse.Namespace, variant: str) -> list[dict[str, Any]]:
    """Resume once in fresh processes, and return the figures of each rank."""
    folder = options.data / "ranks"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    command = [sys.executable, __file__, "--run", variant, "--devices", str(options.devices), "--size", options.size]
    command += ["--accelerator", options.accelerator, "--strategy", options.strategy, "--data", str(options.data)]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    files = [folder / f"rank{rank}.json" for rank in range(options.devices)]
    if not all(file.exists() for file in files):
        raise SystemExit(f"{variant} failed with exit status {done.returncode}:\n{done.stderr[-4000:]}")
    return [json.loads(file.read_text()) for file in files]


def resume(options: argparse.Namespace) -> None:
    """Resume with one variant until training starts, as one of the ranks. Lightning starts the others."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // options.devices))
    model = GPT(options.size)
    restore = None if options.run == "stock" else MemoryEfficientRestore(read=options.run, log=False)
    monitor = MemoryMonitor("cuda" if options.accelerator == "gpu" else None)
    stop = StopAtTrainingStart(options.data / "ranks", monitor, restore)
    trainer = L.Trainer(
        accelerator=options.accelerator,
        devices=options.devices,
        strategy=options.strategy,
        callbacks=[*([restore] if restore else []), stop],
        max_steps=100,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=options.data,
    )
    monitor.start()
    stop.started = time.perf_counter()
    trainer.fit(model, batches(), ckpt_path=checkpoint_path(options))


def summarize(runs: Sequence[Sequence[dict[str, Any]]]) -> dict[str, Any]:
    """Return the medians over the repetitions of the largest figures of all ranks."""
    figures = ("seconds", "transfer_seconds", "bytes_read", "bytes_received", "host_above_start_bytes")
    largest: dict[str, float | None] = {}
    for figure in (*figures, "cuda_allocated_peak_bytes"):
        known = [[rank[figure] for rank in ranks if rank[figure] is not None] for ranks in runs]
        largest[figure] = median([max(values) for values in known if values]) if any(known) else None
    # All ranks wait for the last one to start.
    last = median([min(rank["seconds"] for rank in ranks) for ranks in runs])
    return {**largest, "seconds": last, "repetitions": len(runs), "read_reason": runs[0][0]["read_reason"]}


def cells(result: dict[str, Any], name: str) -> list[str]:
    """Return one row of the table: label and figures."""
    row = result["variants"][name]
    figures = [number(row["seconds"], 1), number(row["transfer_seconds"], 1)]
    sizes = ("bytes_read", "bytes_received", "host_above_start_bytes", "cuda_allocated_peak_bytes")
    return [VARIANTS[name], *figures, *(number(row[figure], GIB) for figure in sizes)]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=positive, default=2, help="number of processes (default: %(default)s)")
    parser.add_argument("--strategy", default="ddp", help="strategy of the Trainer (default: %(default)s)")
    parser.add_argument("--size", choices=SIZES, default="demo", help="size of the model (default: %(default)s)")
    parser.add_argument("--accelerator", choices=("cpu", "gpu"), default="cpu", help="default: %(default)s")
    parser.add_argument("--repetitions", type=positive, default=3, help="default: %(default)s")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="default: all")
    parser.add_argument(
        "--data", type=Path, default=Path("runs/benchmark"), help="folder for the checkpoint (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, help="write all results to this JSON file")
    parser.add_argument("--run", choices=VARIANTS, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
