"""Measure the transfer engine alone: the speed from the page cache to a device, for several layouts of its buffers.

A layout of the staging ring is a number of threads, a number of buffers and the size of a block. For each layout the
table shows GB/s with and without checksums, and how the threads spend their time, in percent. The reading threads
read and compute checksums; in the rest of their time they wait for a buffer. The calling thread submits copies,
records the event that marks the end of a copy, and waits for that event; in the rest of its time it waits for a
buffer. Each share includes the time to get Python's global lock back. The limits of the machine are measured as well:
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
from lightning_memload.bytes import Record
from lightning_memload.save import save_torch
from lightning_memload.storage import LocalFile
from lightning_memload.transfer import RingLayout, StagingRing, TensorCopy, buffer, checksums, engine, transfer

# Threads x buffers x MiB of a block. Most rings are 128 MiB. The last two of "cuda" are smaller, because a smaller ring
# may fit into the processor's cache.
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
# The sizes of the file's tensors, in MiB. They are those of a transformer layer, repeated.
TENSORS = (30, 40, 40, 10, 0.006, 0.03)
# The measured shares of time. The first two belong to the reading threads, the others to the calling thread.
SHARES = ("read", "checksum", "copy", "record", "wait")
READING = SHARES[:2]

Function = TypeVar("Function", bound=Callable[..., Any])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark in this process, print a table, write the JSON, and return the exit status."""
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
    """Write a file of random bytes, as uint8 tensors."""
    weights: dict[str, torch.Tensor] = {}
    missing = options.size_mib * MIB
    while missing > 0:
        for mib in TENSORS:
            nbytes = int(mib * MIB)
            weights[str(len(weights))] = torch.randint(256, (nbytes,), dtype=torch.uint8, device=options.device)
            missing -= nbytes
    save_torch(weights, path, durable=False)


def measure(path: Path, layout: RingLayout, options: argparse.Namespace) -> dict[str, Any]:
    """Return the speeds and the shares of time with one layout."""
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
    """Stream every storage of a checkpoint onto a device and return GB/s. The creation of the ring is not timed."""
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
    """Time the calls of the engine's threads within the block.

    Yields a dict. After the block it contains the seconds of each share, added over all threads, and the seconds of
    the whole transfer as ``"whole"``.
    """
    found: dict[str, float] = defaultdict(float)
    taken: list[tuple[str, float]] = []  # A list, because several threads append to it, and append is atomic.

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
        mock.patch.object(buffer.Buffer, "wait", take("wait", buffer.Buffer.wait)),
        mock.patch.object(buffer.Buffer, "mark", take("record", buffer.Buffer.mark)),
        mock.patch.object(torch.Tensor, "copy_", take("copy", torch.Tensor.copy_)),
        mock.patch.object(engine.Transfer, "run", take("whole", engine.Transfer.run)),
    ):
        yield found
    for name, seconds in taken:
        found[name] += seconds


def pinned_copy() -> float:
    """Return the speed of copies from page-locked memory to the GPU, in GB/s."""
    host = torch.empty(128 * MIB, dtype=torch.uint8, pin_memory=True)
    device = torch.empty_like(host, device="cuda")

    def copy() -> None:
        for _ in range(50):
            device.copy_(host, non_blocking=True)
        synchronize()

    copy()
    return 50 * host.numel() / time_of(copy) / 1e9


def layout_of(name: str) -> RingLayout:
    """Return the layout for a name such as ``"8x16x8"``: threads, buffers, and MiB of each buffer."""
    threads, buffers, mib = name.split("x")
    return RingLayout(int(threads), int(buffers), int(float(mib) * MIB) // 4096 * 4096)


def layout_name(text: str) -> str:
    """Check the name of a layout from the command line and return it."""
    layout_of(text)
    return text


def table(report: dict[str, Any]) -> str:
    """Return the figures as a table with the machine's limits below."""
    rows = [["threads x buffers x MiB", "GB/s", "unverified", *(f"{share}, %" for share in SHARES)]]
    for name, row in report["layouts"].items():
        figures = [row["gb_per_second"], row["unverified_gb_per_second"], *row["percent"].values()]
        rows.append([name, *(f"{figure:.1f}" for figure in figures)])
    limits = ", ".join(f"{threads}: {rate:.1f}" for threads, rate in report["pread_gb_per_second"].items())
    lines = [*aligned(rows, 1), f"Reading alone, GB/s for each number of threads: {limits}"]
    if "pinned_copy_gb_per_second" in report:
        lines.append(f"Copying from page-locked memory: {report['pinned_copy_gb_per_second']:.1f} GB/s")
    return "\n".join(lines)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=sorted(LAYOUTS), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size-mib", type=positive, default=8192, help="size of the file (default: %(default)s)")
    parser.add_argument(
        "--layouts", nargs="+", type=layout_name, metavar="THREADSxBUFFERSxMIB", help="layouts of the staging ring"
    )
    parser.add_argument("--repetitions", type=positive, default=3, help="default: %(default)s")
    parser.add_argument(
        "--switch-interval",
        type=float,
        default=sys.getswitchinterval(),
        help="thread switch interval of Python, in seconds (default: %(default)s)",
    )
    parser.add_argument(
        "--data", type=Path, default=Path("runs/streaming"), help="folder for the file (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, help="write all results to this JSON file")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
