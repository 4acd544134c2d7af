"""Read a checkpoint into the page cache, so that a job that starts later does not wait for the disk.

What is in the page cache already is not read again. The kernel may take the pages back when memory is short.

Exit status: 0 for success; 2 if the path does not exist or cannot be read.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys

from lightning_memload.cli.arguments import positive_number
from lightning_memload.cli.printing import print_json, printable
from lightning_memload.cli.progress import Progress
from lightning_memload.units import counted, format_bytes, format_speed

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of the verb."""
    parser.add_argument("path", metavar="PATH", help="a file, or a directory with all files in it")
    parser.add_argument(
        "--threads", type=positive_number, help="number of reading threads (default: two for each CPU, 4 to 16)"
    )
    parser.add_argument("--quiet", action="store_true", help="print errors only")


def run(arguments: argparse.Namespace) -> int:
    """Reads the files and prints the figures.

    Raises:
        OSError: A file cannot be read.
    """
    from lightning_memload.memory.host import available_host_bytes
    from lightning_memload.transfer.prefetch import prefetch_checkpoint

    free_bytes = available_host_bytes()
    with Progress("Prefetching", quiet=arguments.quiet) as progress:
        stats = prefetch_checkpoint(arguments.path, num_threads=arguments.threads, progress=progress)
    nbytes = stats.bytes_read + stats.bytes_cached
    if arguments.json:
        print_json(dataclasses.asdict(stats))
    elif not arguments.quiet:
        print(
            f"{printable(stats.path)}: {format_bytes(nbytes)} in {counted(stats.num_files, 'file')}; "
            f"{format_bytes(stats.bytes_read)} read in {stats.seconds:.2f} s, "
            f"{format_speed(stats.bytes_read, stats.seconds)}; {format_bytes(stats.bytes_cached)} were cached already"
        )
    if free_bytes is not None and nbytes > free_bytes and not arguments.quiet:
        print(
            f"{format_bytes(nbytes)} do not fit into the {format_bytes(free_bytes)} of free memory: the kernel has "
            "dropped some of them again.",
            file=sys.stderr,
        )
    return 0
