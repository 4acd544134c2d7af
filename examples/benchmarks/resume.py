"""Measure a whole resume with stock Lightning and with the callback: from ``trainer.fit(ckpt_path=...)`` to training.

Every variant runs several times, each time in a fresh process, on the same checkpoint of a GPT with AdamW. The limits
of the machine are measured in the same run: reading the file from the page cache with several threads, copying from
page-locked memory to the GPU, and, with ``--cold``, reading the file from the disk. The medians are printed as a table
and written as JSON.

    python examples/benchmarks/resume.py --size gpt2-xl --accelerator gpu --output resume.json
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import lightning as L
import torch
from common import (
    GIB,
    MIB,
    Deliver,
    digest,
    evict,
    header,
    lists_in_lines,
    median,
    number,
    positive,
    read_all,
    rounded,
    run_fresh,
    synchronize,
    warm,
)
from streaming import pinned_copy, stream
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from gpt import GPT
from gpt import SIZES as SIZES  # other benchmarks import it from here
from lightning.pytorch.plugins import TorchCheckpointIO

from lightning_memload import MemoryEfficientRestore, meta_init
from lightning_memload.memory import MemoryMonitor, MemorySeries, SeriesRecorder
from lightning_memload.transfer import choose_layout, default_threads

VARIANTS = {
    "stock": "stock Lightning",
    "stock-configure-model": "stock Lightning, built in configure_model",
    "callback": "MemoryEfficientRestore",
    "callback-configure-model": "MemoryEfficientRestore, built in configure_model",
    "callback-meta-init": "MemoryEfficientRestore, built under meta_init",
    "callback-meta-init-unverified": "MemoryEfficientRestore, built under meta_init, verify=False",
    "callback-meta-init-cold": "MemoryEfficientRestore, built under meta_init, cold page cache",
}
COLD_THREADS = 12


class ConfiguredGPT(GPT):
    """The same GPT, built in ``configure_model``. Lightning calls this where new tensors are on the device."""

    def build(self) -> None:
        """Do nothing. ``configure_model`` builds the layers."""

    def configure_model(self) -> None:
        """Build the layers at the first call. Lightning may call this again."""
        if not hasattr(self, "blocks"):
            super().build()


class SaveToFile(TorchCheckpointIO):
    """Saves with ``torch.save`` directly to the file. Lightning's own way needs a second copy in host memory."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write the checkpoint with ``torch.save``."""
        torch.save(checkpoint, path)


class StopAtTrainingStart(L.Callback):
    """Delivers the cost of the resume when training starts, and ends the process.

    Args:
        deliver: Sends the result to the main process.
        monitor: The running meter of memory.
        result: The figures so far. The callback adds the others.
        restore: The callback that is measured, ``None`` for stock.
    """

    def __init__(
        self, deliver: Deliver, monitor: MemoryMonitor, result: dict[str, Any], restore: MemoryEfficientRestore | None
    ) -> None:
        self.deliver = deliver
        self.monitor = monitor
        self.result = result
        self.restore = restore
        self.started = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop the measurement, deliver the result, and exit: everything is restored now."""
        synchronize()
        self.result["seconds"] = time.perf_counter() - self.started
        self.monitor.stop()
        peaks = self.monitor.peaks
        self.result["peaks"] = peaks.as_dict()
        self.result["series"] = thinned(self.monitor.series).as_dict()
        self.result["host_above_start_bytes"] = peaks.host_above_start_bytes
        if self.restore is not None and self.restore.report is not None:
            self.result["report"] = {**self.restore.report.as_dict(), "series": None}
        self.result["digest"] = digest(pl_module, trainer.optimizers)
        self.deliver(self.result)
        sys.stdout.flush()
        os._exit(0)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark, print the table, write the JSON, and return the exit status: 1 if the digests differ."""
    options = parse(arguments)
    options.data.mkdir(parents=True, exist_ok=True)
    path = checkpoint_path(options)
    if not path.exists():
        run_fresh(save, options)
    limits = run_fresh(ceilings, options)
    results: dict[str, list[dict[str, Any]]] = {}
    # Memory over time, of the first run of each variant.
    series: dict[str, dict[str, Any]] = {}
    for repetition in range(options.repetitions):
        for variant in options.variants:
            if repetition and variant.endswith("-cold"):
                continue  # Only once, because it takes as long as the disk.
            (evict if variant.endswith("-cold") else warm)(path)
            run = run_fresh(resume, options, variant)
            series.setdefault(variant, run.pop("series"))
            results.setdefault(variant, []).append(run)
            print(f"  {variant} #{repetition + 1}: {run['seconds']:.2f} s", file=sys.stderr, flush=True)
            # The report is written after every run, so that an interrupted benchmark keeps its results.
            report = {
                **header("resume", arguments),
                "size": options.size,
                "checkpoint_bytes": path.stat().st_size,
                "variants": {name: summarize(runs) for name, runs in results.items()},
                "equal": len({run["digest"] for runs in results.values() for run in runs}) == 1,
                "ceilings": limits,
                "runs": results,
                "series": series,
            }
            if options.output:
                options.output.write_text(lists_in_lines(json.dumps(report, indent=1)) + "\n")
    print(table(report))
    return 0 if report["equal"] else 1


def save(deliver: Deliver, options: argparse.Namespace) -> None:
    """Train one step and save an ordinary checkpoint."""
    L.seed_everything(0)
    trainer = make_trainer(options, [], plugins=[SaveToFile()], max_steps=1)
    model = ConfiguredGPT(options.size)
    trainer.fit(model, batches())
    trainer.save_checkpoint(checkpoint_path(options))
    deliver(None)


def resume(deliver: Deliver, options: argparse.Namespace, variant: str) -> None:
    """Resume with one variant until training starts. ``StopAtTrainingStart`` delivers the result."""
    torch.set_num_threads(min(16, os.cpu_count() or 1))
    if options.accelerator == "gpu":
        torch.zeros(1, device="cuda")  # Creates the CUDA context, which is not part of a resume.
    result: dict[str, Any] = {}
    started = time.perf_counter()
    with meta_init("meta-init" in variant), drawn_as_zeros(options.skip_init):
        model = (ConfiguredGPT if "configure-model" in variant else GPT)(options.size)
    result["build_seconds"] = None if options.skip_init else time.perf_counter() - started
    restore = None
    if variant.startswith("callback"):
        restore = MemoryEfficientRestore(verify="unverified" not in variant)
    monitor = MemoryMonitor("cuda" if options.accelerator == "gpu" else None)
    stop = StopAtTrainingStart(deliver, monitor, result, restore)
    trainer = make_trainer(options, [*([restore] if restore else []), stop], max_steps=100)
    data = batches()
    monitor.start()
    stop.started = time.perf_counter()
    trainer.fit(model, data, ckpt_path=checkpoint_path(options))


@contextlib.contextmanager
def drawn_as_zeros(enabled: bool) -> Iterator[None]:
    """Fill new weights with zeros in place of random numbers within the block, to save time.

    The memory of the weights is allocated and written as usual, and the restore overwrites it. Does nothing where
    ``enabled`` is ``False``.
    """

    def zero(tensor: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return torch.nn.init.zeros_(tensor)

    names = ("normal_", "kaiming_uniform_", "uniform_") if enabled else ()
    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(mock.patch.object(torch.nn.init, name, zero))
        yield


def make_trainer(options: argparse.Namespace, callbacks: list[L.Callback], **arguments: Any) -> L.Trainer:
    """Return a Trainer without logger, progress bar, summary and checkpoint callback."""
    return L.Trainer(
        accelerator=options.accelerator,
        devices=1,
        callbacks=callbacks,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=options.data,
        **{"enable_checkpointing": False, **arguments},
    )


def batches() -> DataLoader[Any]:
    """Return a little data. The values do not matter."""
    return DataLoader(torch.zeros(64, 17, dtype=torch.int64), batch_size=1)  # type: ignore[arg-type]


# The machine's own limits ---------------------------------------------------------------------------------------------


def ceilings(deliver: Deliver, options: argparse.Namespace) -> None:
    """Measure the speeds of the machine and of the transfer engine, on the same file in the same process."""
    path = checkpoint_path(options)
    layout = choose_layout(128 * MIB, default_threads(torch.device("cuda")))
    found: dict[str, Any] = {"pread_warm_gb_per_second": {}, "engine_gb_per_second": {}}
    for threads in (1, 4, 8, 16):
        seconds = min(read_all(path, threads, 8 * MIB) for _ in range(2))
        found["pread_warm_gb_per_second"][str(threads)] = path.stat().st_size / seconds / 1e9
    if options.accelerator == "gpu":
        found["pinned_copy_gb_per_second"] = pinned_copy()
        name = f"{layout.num_threads} threads, {layout.num_buffers} x {layout.block_bytes / MIB:.1f} MiB"
        for verify in (True, False):
            rates = [stream(path, layout, verify) for _ in range(3)]
            found["engine_gb_per_second"][name + ("" if verify else ", unverified")] = statistics.median(rates)
    if options.cold:
        found["pread_cold_gb_per_second"] = []
        for _ in range(options.cold):
            evict(path)
            seconds = read_all(path, COLD_THREADS, 8 * MIB, drop=True)
            found["pread_cold_gb_per_second"].append(path.stat().st_size / seconds / 1e9)
    deliver(found)


# Figures, table -------------------------------------------------------------------------------------------------------


def summarize(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the medians over the repetitions of one variant."""

    def middle(pick: Callable[[dict[str, Any]], float | None]) -> float | None:
        return median([pick(run) for run in runs])

    def streaming(run: dict[str, Any]) -> float | None:
        total = run.get("report", {}).get("total", {})
        seconds = total.get("transfer_seconds")
        return total["bytes_read"] / seconds / 1e9 if seconds else None

    return {
        "seconds": middle(lambda run: run["seconds"]),
        "build_seconds": middle(lambda run: run["build_seconds"]),
        "host_above_start_bytes": middle(lambda run: run["host_above_start_bytes"]),
        "pinned_peak_bytes": middle(lambda run: run["peaks"]["pinned_peak_bytes"]),
        "file_backed_peak_bytes": middle(lambda run: run["peaks"]["file_backed_peak_bytes"]),
        "cuda_allocated_peak_bytes": middle(lambda run: run["peaks"]["cuda_allocated_peak_bytes"]),
        "streaming_gb_per_second": middle(streaming),
        "phases": phases(runs),
        "repetitions": len(runs),
    }


def thinned(series: MemorySeries) -> MemorySeries:
    """Return the same course in at most 400 points, enough for a picture."""
    recorder = SeriesRecorder(0.001, 400)
    for seconds, levels in series:
        recorder.add(seconds, levels)
    return recorder.series()


def phases(runs: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return for each phase of a restore the medians of its wall time and of the time of its streaming, in seconds."""
    found: dict[str, dict[str, list[float]]] = {}
    for run in runs:
        for phase in run.get("report", {}).get("phases", []):
            of_name = found.setdefault(phase["name"], {"seconds": [], "transfer_seconds": []})
            for figure, values in of_name.items():
                values.append(phase[figure] or 0.0)
    return {
        name: {figure: statistics.median(values) for figure, values in figures.items()}
        for name, figures in found.items()
    }


def table(report: dict[str, Any]) -> str:
    """Return the medians as a table with the machine's limits below."""
    lines = [
        f"{report['size']}, checkpoint {report['checkpoint_bytes'] / 1e9:.2f} GB, {report['machine']['gpu'] or 'CPU'}",
        f"{'':62}{'fit() to':>13}{'host above':>12}{'GPU':>8}{'stream':>8}{'build':>8}",
        f"{'':62}{'training, s':>13}{'start, GiB':>12}{'GiB':>8}{'GB/s':>8}{'s':>8}",
    ]
    for variant, row in report["variants"].items():
        cells = [
            number(row["seconds"], 1),
            number(row["host_above_start_bytes"], GIB),
            number(row["cuda_allocated_peak_bytes"], GIB),
            number(row["streaming_gb_per_second"], 1),
            number(row["build_seconds"], 1),
        ]
        lines.append(f"{VARIANTS[variant]:62}{cells[0]:>13}{cells[1]:>12}{cells[2]:>8}{cells[3]:>8}{cells[4]:>8}")
    lines.extend(f"{variant}: {json.dumps(rounded(row['phases']))}" for variant, row in report["variants"].items())
    lines.append(f"all variants are equal bit for bit: {'yes' if report['equal'] else 'NO'}")
    lines.extend(f"{name}: {json.dumps(rounded(value))}" for name, value in report["ceilings"].items())
    return "\n".join(lines)


def checkpoint_path(options: argparse.Namespace) -> Path:
    """Return the path of the checkpoint for the chosen size."""
    return Path(options.data) / f"{options.size}.ckpt"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="demo", help="size of the model (default: %(default)s)")
    parser.add_argument("--accelerator", choices=("cpu", "gpu"), default="cpu", help="default: %(default)s")
    parser.add_argument("--repetitions", type=positive, default=3, help="default: %(default)s")
    parser.add_argument(
        "--variants",
        nargs="+",
        choices=VARIANTS,
        default=[v for v in VARIANTS if "cold" not in v],
        help="default: all without a cold page cache",
    )
    parser.add_argument(
        "--data", type=Path, default=Path("runs/benchmark"), help="folder for the checkpoint (default: %(default)s)"
    )
    parser.add_argument(
        "--cold", type=int, default=0, help="how often to read the file from the disk for the limits (default: never)"
    )
    parser.add_argument(
        "--skip-init", action="store_true", help="start from zeros, not random weights: the restore overwrites them"
    )
    parser.add_argument("--output", type=Path, help="write all results to this JSON file")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
