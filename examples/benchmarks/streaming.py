"""Measure the engine alone: a file from the page cache onto a device, with other threads, buffers and block sizes.

For each layout of the staging ring: GB/s with and without checksums, and what the threads are at meanwhile, in percent
of their time. Those that read: reading, taking checksums; the rest is waiting for a buffer. The one that has buffers
copied: submitting copies, recording the event that ends them, waiting for that event; the rest is waiting for a
buffer too. Each of these includes getting back the interpreter's lock. Beside that stand the machine's own limits:
reading with several threads, and copying from page-locked memory.

    python examples/benchmarks/streaming.py --device cuda
    python examples/benchmarks/streaming.py --device cuda --layouts 12x24x5.33 8x16x2 --switch-interval 0.0005
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar
from unittest import mock

import torch
from common import MIB, aligned, header, median, positive, read_all, synchronize, time_of, warm
from zlib_ng import zlib_ng

from lightning_memload import open_checkpoint
from lightning_memload.save import save_torch
from lightning_memload.storage import LocalFile
from lightning_memload.transfer import Record, RingLayout, StagingRing, TensorCopy, checksums, engine, transfer

# Threads x buffers x MiB of a block. The first are 128 MiB; a smaller ring may stay in the processor's cache.
LAYOUTS = {
    "cuda": (
        "8x16x8",
        "10x16x8",
        "12x16x8",
        "12x20x6.4",
        "12x24x5.33",
        "14x20x6.4",
        "14x28x4.57",
        "16x24x5.33",
        "16x32x4",
        "12x24x2.5",
        "8x16x2",
    ),
    "cpu": ("1x2x16", "2x4x16", "4x8x16"),
}
# Of the file: those of a transformer layer, in MiB.
TENSORS = (30, 40, 40, 10, 0.006, 0.03)
# What each reading thread does, and what the calling thread does.
SHARES = ("read", "checksum", "copy", "record", "wait")
READING = SHARES[:2]

Function = TypeVar("Function", bound=Callable[..., Any])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark in this process, print a table, and write the JSON."""
    options = parse(arguments)
    sys.setswitchinterval(options.switch_interval)
    options.data.mkdir(parents=True, exist_ok=True)
    path = options.data / f"{options.size_mib}.pt"
    if not path.exists():
        save(path, options)
    warm(path)
    report: dict[str, Any] = {**header("streaming", arguments), "bytes": path.stat().st_size, "layouts": {}}
    report["pread_gb_per_second"] = {
        threads: path.stat().st_size / min(read_all(path, threads, 8 * MIB) for _ in range(3)) / 1e9
        for threads in (1, 4, 8, 12, 16)
    }
    if options.device == "cuda":
        report["pinned_copy_gb_per_second"] = pinned_copy()
    for name in options.layouts or LAYOUTS[options.device]:
        report["layouts"][name] = measure(path, layout_of(name), options)
        print(f"  {name}: {json.dumps(report['layouts'][name])}", file=sys.stderr, flush=True)
        if options.output:
            options.output.write_text(json.dumps(report, indent=1) + "\n")
    print(table(report))
    return 0


def save(path: Path, options: argparse.Namespace) -> None:
    """Write a file of random weights."""
    weights: dict[str, torch.Tensor] = {}
    missing = options.size_mib * MIB
    while missing > 0:
        for mib in TENSORS:
            nbytes = int(mib * MIB)
            weights[str(len(weights))] = torch.randint(256, (nbytes,), dtype=torch.uint8, device=options.device)
            missing -= nbytes
    save_torch(weights, path, durable=False)


def measure(path: Path, layout: RingLayout, options: argparse.Namespace) -> dict[str, Any]:
    """Stream with one layout."""
    rates = {
        verify: median([stream(path, layout, verify, options.device) for _ in range(options.repetitions)])
        for verify in (True, False)
    }
    with timed() as seconds:
        stream(path, layout, True, options.device)
    whole = {share: seconds["whole"] * (layout.num_threads if share in READING else 1) for share in SHARES}
    return {
        "gb_per_second": rates[True],
        "unverified_gb_per_second": rates[False],
        "percent": {share: 100 * seconds[share] / whole[share] for share in SHARES},
    }


def stream(path: Path, layout: RingLayout, verify: bool, device: str = "cuda") -> float:
    """Stream every storage of a checkpoint onto a device. Returns GB/s, without the time to make the ring."""
    storages = [storage for storage in open_checkpoint(path).storages if storage.nbytes]
    copies = [
        TensorCopy(s.key, s.offset, torch.uint8, (1,), torch.empty(s.nbytes, dtype=torch.uint8, device=device))
        for s in storages
    ]
    records = [Record(s.key, s.offset, s.nbytes, s.crc32) for s in storages if verify and s.crc32 is not None]
    synchronize()
    with StagingRing(layout, pinned=device == "cuda") as ring, LocalFile(path) as file:
        stats = transfer(
            file, copies, lambda: ring, num_threads=layout.num_threads, block_bytes=layout.block_bytes, records=records
        )
    return stats.bytes_read / stats.seconds / 1e9


@contextlib.contextmanager
def timed() -> Iterator[dict[str, float]]:
    """Take the time of what the engine's threads call: seconds of all threads together, and of the whole transfer."""
    found: dict[str, float] = defaultdict(float)
    taken: list[tuple[str, float]] = []  # Whose append is atomic.

    def take(name: str, function: Function) -> Function:
        def call(*arguments: Any, **options: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                taken.append((name, time.perf_counter() - started))

        return call  # type: ignore[return-value]

    checks = SimpleNamespace(crc32=take("checksum", zlib_ng.crc32), crc32_combine=zlib_ng.crc32_combine)
    with (
        mock.patch.object(LocalFile, "readv", take("read", LocalFile.readv)),
        mock.patch.object(checksums, "zlib_ng", checks),
        mock.patch.object(engine._Buffer, "wait", take("wait", engine._Buffer.wait)),
        mock.patch.object(engine._Buffer, "mark", take("record", engine._Buffer.mark)),
        mock.patch.object(torch.Tensor, "copy_", take("copy", torch.Tensor.copy_)),
        mock.patch.object(engine._Transfer, "run", take("whole", engine._Transfer.run)),
    ):
        yield found
    for name, seconds in taken:
        found[name] += seconds


def pinned_copy() -> float:
    """Copy from page-locked memory to the GPU as fast as it goes. Returns GB/s."""
    host = torch.empty(128 * MIB, dtype=torch.uint8, pin_memory=True)
    device = torch.empty_like(host, device="cuda")

    def copy() -> None:
        for _ in range(50):
            device.copy_(host, non_blocking=True)
        synchronize()

    copy()
    return 50 * host.numel() / time_of(copy) / 1e9


def layout_of(name: str) -> RingLayout:
    """The layout that is named by its threads, its buffers, and the MiB of each."""
    threads, buffers, mib = name.split("x")
    return RingLayout(int(threads), int(buffers), int(float(mib) * MIB) // 4096 * 4096)


def layout_name(text: str) -> str:
    """Read a layout's name."""
    layout_of(text)
    return text


def table(report: dict[str, Any]) -> str:
    """Format the figures for people."""
    rows = [["threads x buffers x MiB", "GB/s", "unverified", *(f"{share}, %" for share in SHARES)]]
    for name, row in report["layouts"].items():
        figures = [row["gb_per_second"], row["unverified_gb_per_second"], *row["percent"].values()]
        rows.append([name, *(f"{figure:.1f}" for figure in figures)])
    limits = ", ".join(f"{threads}: {rate:.1f}" for threads, rate in report["pread_gb_per_second"].items())
    lines = [*aligned(rows, 1), f"Reading alone, GB/s with so many threads: {limits}"]
    if "pinned_copy_gb_per_second" in report:
        lines.append(f"Copying from page-locked memory: {report['pinned_copy_gb_per_second']:.1f} GB/s")
    return "\n".join(lines)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=sorted(LAYOUTS), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size-mib", type=positive, default=8192, help="of the file (default: %(default)s)")
    parser.add_argument(
        "--layouts", nargs="+", type=layout_name, metavar="THREADSxBUFFERSxMIB", help="of the staging ring"
    )
    parser.add_argument("--repetitions", type=positive, default=3)
    parser.add_argument("--switch-interval", type=float, default=sys.getswitchinterval(), help="of Python, in seconds")
    parser.add_argument("--data", type=Path, default=Path("runs/streaming"), help="where the file is kept")
    parser.add_argument("--output", type=Path, help="write everything to this JSON file")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
