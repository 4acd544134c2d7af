"""The functions that the benchmarks share: fresh processes, the page cache, digests, figures as text, and machine."""

from __future__ import annotations

import argparse
import importlib.metadata
import mmap
import multiprocessing
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

import lightning_memload
from lightning_memload.storage import LocalFile

MIB = 1 << 20
GIB = 1 << 30
# Modules that take long to import. A fresh process is forked from one that has imported them.
IMPORTED = ["lightning", "safetensors.torch", "lightning_memload"]

# Fresh processes ------------------------------------------------------------------------------------------------------

Deliver = Callable[[Any], None]


class ProcessFailed(Exception):
    """A process has ended without a result, or has exceeded its time limit."""


def run_fresh(work: Callable[..., None], *arguments: Any, timeout_seconds: float | None = None) -> Any:
    """Call ``work(deliver, *arguments)`` in a fresh process and return what it delivers.

    The process is forked from one that has imported torch and Lightning and has done nothing else, because these
    imports take longer than most of the measured work.

    Args:
        work: A function of a module. Its first argument sends the result.
        arguments: Further arguments of ``work``.
        timeout_seconds: The longest time to wait for the result. ``None``: no limit.

    Raises:
        ProcessFailed: The process ended without a result, or delivered none in time and was killed.
    """
    # Without this, a module that asks for a GPU while it is imported initialises CUDA, and forked processes cannot
    # use CUDA any more. With it, torch asks NVML, which does not initialise CUDA.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(IMPORTED)
    receiver, sender = processes.Pipe(duplex=False)
    process = processes.Process(target=_deliver_result, args=(sender, work, arguments))
    process.start()
    sender.close()
    try:
        if not receiver.poll(timeout_seconds):
            raise ProcessFailed(f"The process took longer than {timeout_seconds} s")
        result = receiver.recv()
    except EOFError:
        process.join()
        raise ProcessFailed(f"The process ended with exit status {process.exitcode}") from None
    except BaseException:
        process.kill()
        raise
    finally:
        process.join()
    return result


def _deliver_result(sender: Connection, work: Callable[..., None], arguments: Iterable[Any]) -> None:
    work(sender.send, *arguments)


# Files and their content ----------------------------------------------------------------------------------------------


def read_all(path: Path, threads: int, block_bytes: int, *, drop: bool = False) -> float:
    """Read the whole file once, block by block, into one buffer per thread, and return the seconds.

    ``drop``: whether each part is dropped from the page cache once it has been read.
    """
    with LocalFile(path, drop_behind=drop) as file:
        starts = iter(range(0, file.size_bytes, block_bytes))

        def work() -> None:
            buffer = memoryview(mmap.mmap(-1, block_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
            for start in starts:
                end = min(start + block_bytes, file.size_bytes)
                while start < end:
                    start += file.readv([buffer[: end - start]], start)

        return time_of(lambda: in_threads(work, threads))


def in_threads(work: Callable[[], None], threads: int) -> None:
    """Call ``work`` once in each of several threads, and wait for all of them."""
    with ThreadPoolExecutor(threads) as pool:
        for future in [pool.submit(work) for _ in range(threads)]:
            future.result()


def warm(path: Path) -> None:
    """Read the whole file, so that it is in the page cache."""
    read_all(path, 4, 8 * MIB)


def flush(path: Path) -> None:
    """Write the file's cached pages to the disk, so that the kernel does not write them during a measurement."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def evict(path: Path) -> None:
    """Drop the file from the page cache."""
    flush(path)
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def digest(module: torch.nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> str:
    """Return the digest of a module's weights and its optimizers' states, computed on their devices.

    Equal bits give equal digests. See :func:`digest_of`.
    """
    return digest_of(module.state_dict(), [optimizer.state_dict() for optimizer in optimizers])


def digest_of(weights: dict[str, Any], optimizer_states: Sequence[dict[str, Any]], device: str | None = None) -> str:
    """Return the digest of the weights and optimizer states of a checkpoint: sums that are weighted by position.

    Args:
        weights: The state dict of the module.
        optimizer_states: The state dict of each optimizer.
        device: The device that computes the sums. ``None``: the device of each tensor.
    """
    tensors = [*weights.values()]
    for optimizer_state in optimizer_states:
        for state in optimizer_state["state"].values():
            tensors.extend(value for value in state.values() if isinstance(value, torch.Tensor))
    total = 0
    for number, tensor in enumerate(tensors):
        flat = tensor.detach().to(device or tensor.device).contiguous().view(-1).view(torch.uint8).view(-1)
        words = flat[: flat.numel() // 4 * 4].view(torch.int32)
        value = 0
        for chunk in words.split(64 * MIB):
            factors = torch.arange(1, 2 * chunk.numel(), 2, device=chunk.device)
            value = value * 31 + int((chunk.long() * factors).sum())
        total = (total * 1_000_003 + value + number) % (1 << 127)
    return f"{len(tensors)}:{total:032x}"


def synchronize() -> None:
    """Wait until the GPU has finished. Does nothing if CUDA is not initialised."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


# Figures --------------------------------------------------------------------------------------------------------------


def time_of(work: Callable[[], object]) -> float:
    """Call ``work`` and return the seconds that it takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def median(values: Sequence[float | None]) -> float | None:
    """Return the median of the known values, ``None`` if no value is known."""
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def above(start: int | None, peak: int | None) -> int | None:
    """Return how far the peak is above the start, at least 0; ``None`` if one of them is unknown."""
    return None if start is None or peak is None else max(0, peak - start)


def number(value: float | None, unit: int) -> str:
    """Format a figure as a multiple of ``unit``. An unknown figure is a dash."""
    return "-" if value is None else f"{value / unit:.2f}"


def rounded(value: Any) -> Any:
    """Round floats to two decimals, also inside dicts and lists."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return round(value, 2) if isinstance(value, float) else value


def lists_in_lines(text: str) -> str:
    """Return indented JSON with each list of numbers in one line."""
    return re.sub(r"\[\s+([-+.,\deE\s]|null)+\]", lambda found: " ".join(found[0].split()), text)


def aligned(rows: Sequence[Sequence[str]], num_labels: int) -> list[str]:
    """Format rows as lines. The first ``num_labels`` columns are aligned to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if column < num_labels else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


# Command, machine, versions -------------------------------------------------------------------------------------------


def header(benchmark: str, arguments: Sequence[str] | None) -> dict[str, Any]:
    """Return the first entries of every result: benchmark, command, machine and versions."""
    # An absolute path has a meaning on this machine only, so the command shows the name of the file.
    given = arguments or sys.argv[1:]
    shown = [Path(argument).name if Path(argument).is_absolute() else argument for argument in given]
    return {
        "benchmark": benchmark,
        "command": " ".join([f"python examples/benchmarks/{benchmark.replace('-', '_')}.py", *shown]),
        "machine": machine(),
        "versions": versions("lightning"),
    }


def machine() -> dict[str, Any]:
    """Return the name of the GPU, the number of CPUs, the memory in bytes, and the operating system."""
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cpus": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "system": platform.platform(),
    }


def versions(*packages: str) -> dict[str, str]:
    """Return the versions of Python, torch, this project and the given packages. Skips packages not installed."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            pass
    return {**found, "lightning_memload": lightning_memload.__version__}


def positive(text: str) -> int:
    """Parse an integer of the command line that must be at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value
