"""Measure a save: stock Lightning, ``torch.save`` to a file, and ours, of one state in one run.

The state has the shape of a training checkpoint: weights, and two optimizer states and a step for each. The ways take
turns, so that a disk or a neighbour that changes its mind meets them all. What the machine can do at best is measured
beside them: one core's checksum, writing to the page cache, the disk, and copying from the GPU. ``--sweep`` also tries
other numbers of threads. Medians are printed as a table and, with everything else, written as JSON.

    python examples/benchmarks/save.py --gib 20 --device cuda --folder /mnt/fast --output save.json
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins import TorchCheckpointIO
from zlib_ng import zlib_ng

from lightning_memload.memory import MemoryMonitor
from lightning_memload.save import SaveStats, save_torch
from lightning_memload.transfer import StagingRing, choose_layout

GIB = 1 << 30
MIB = 1 << 20


def main() -> int:
    """Measure, print a table, and write the JSON."""
    options = parse()
    options.folder.mkdir(parents=True, exist_ok=True)
    path = options.folder / "save.ckpt"
    state = make_state(options)
    ways = make_ways(state, path, options)
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    for repetition in range(options.repetitions + 1):
        for way, save in ways.items():
            path.unlink(missing_ok=True)
            gc.collect()
            os.sync()
            run = measure(save, options.device)
            if repetition:  # the first only warms up
                runs[way].append(run)
    file_bytes = path.stat().st_size
    path.unlink()
    print(f"{file_bytes / 1e9:.2f} GB from {options.device}, {torch.__version__}; median of {options.repetitions}\n")
    print(f"{'way':<32}{'seconds':>9}{'GB/s':>8}{'host peak MiB':>15}   phases")
    for way, measured in runs.items():
        median = sorted(measured, key=lambda run: run["seconds"])[len(measured) // 2]
        speed = file_bytes / median["seconds"] / 1e9
        peak = max(run["host_above_start_bytes"] or 0 for run in measured)
        print(f"{way:<32}{median['seconds']:>9.2f}{speed:>8.2f}{peak / MIB:>15.0f}   {median['phases']}")
    best = ceilings(options)
    print("\nceilings, GB/s: " + ", ".join(f"{name} {value:.1f}" for name, value in best.items()))
    if options.output is not None:
        report = {"file_bytes": file_bytes, "device": options.device, "torch": torch.__version__}
        options.output.write_text(json.dumps({**report, "runs": runs, "ceilings": best}, indent=2) + "\n")
    return 0


def make_state(options: argparse.Namespace) -> dict[str, Any]:
    """Weights of 16 MiB, and AdamW's states for them."""
    count = max(1, int(options.gib * GIB) // (3 * 16 * MIB))
    weights = {f"layer{n}.weight": torch.randn(4 * MIB, device=options.device) for n in range(count)}
    states = {
        n: {"step": torch.tensor(3.0), "exp_avg": weight / 2, "exp_avg_sq": weight * weight}
        for n, weight in enumerate(weights.values())
    }
    return {"epoch": 1, "state_dict": weights, "optimizer_states": [{"state": states}]}


def make_ways(state: Any, path: Path, options: argparse.Namespace) -> dict[str, Callable[[], SaveStats | None]]:
    """Every way to save the state."""

    def by_torch(*, durable: bool, crc32: bool = True) -> None:
        before = torch.serialization.get_crc32_options()
        torch.serialization.set_crc32_options(crc32)
        torch.save(state, path)
        torch.serialization.set_crc32_options(before)
        if durable:
            with open(path, "rb") as file:
                os.fsync(file.fileno())

    def ours(num_threads: int | None = None, *, durable: bool = False) -> SaveStats:
        return save_torch(state, path, num_threads=num_threads, durable=durable)

    ways: dict[str, Callable[[], SaveStats | None]] = {
        "stock Lightning": lambda: TorchCheckpointIO().save_checkpoint(state, path),
        "torch.save": lambda: by_torch(durable=False),
        "torch.save without CRC-32": lambda: by_torch(durable=False, crc32=False),
        "torch.save, fsync": lambda: by_torch(durable=True),
        "save_torch, not durable": lambda: ours(),
        "save_torch": lambda: ours(durable=True),
    }
    for number in (1, 2, 4, 8, 16) if options.sweep else ():
        ways[f"save_torch, {number} threads"] = lambda number=number: ours(number, durable=True)
        ways[f"not durable, {number} threads"] = lambda number=number: ours(number)
    return ways


def measure(save: Callable[[], SaveStats | None], device: str) -> dict[str, Any]:
    """Save once, with a meter on the process."""
    with MemoryMonitor(device) as monitor:
        started = time.perf_counter()
        stats = save()
        seconds = time.perf_counter() - started
    phases = ""
    if stats is not None:
        phases = (
            f"pickle {stats.pickle_seconds:.2f}, write {stats.write_seconds:.2f}, commit {stats.commit_seconds:.2f}"
        )
    return {"seconds": seconds, "host_above_start_bytes": monitor.peaks.host_above_start_bytes, "phases": phases}


def ceilings(options: argparse.Namespace) -> dict[str, float]:
    """What this machine can do at best, in GB/s."""
    data = torch.randint(0, 256, (GIB,), dtype=torch.uint8)
    view = memoryview(data.numpy())
    blocks = [view[start : start + MIB] for start in range(0, GIB, MIB)]
    found = {
        "one core's zlib": rate(lambda: zlib.crc32(view)),
        "one core's zlib-ng": rate(lambda: zlib_ng.crc32(view)),
    }
    path = options.folder / "ceiling.bin"
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
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return GIB / min(seconds) / 1e9


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=1.0, help="size of the state")
    parser.add_argument("--device", default="cpu", help="where the tensors are: cpu, cuda")
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmark"), help="where it is saved")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--sweep", action="store_true", help="also try other numbers of threads")
    parser.add_argument("--output", type=Path, help="write everything to this JSON file")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
