"""Compare every checksum of checkpoints, and list all damage.

Exit status: 0 every byte of every checkpoint has its checksum; 1 something is damaged; 2 something is no checkpoint,
or cannot be read; 3 nothing wrong was found, but the checkpoint holds bytes without a checksum (safetensors).
Of several, the first of 1, 2, 3 that applies.
"""

from __future__ import annotations

import argparse
import os
import sys

from lightning_memload.checkpoint import checkpoints_in, find_format, is_checkpoint
from lightning_memload.errors import MemloadError
from lightning_memload.transfer import verify_checkpoint

__all__ = ["add_arguments", "run"]

_VERIFIED, _DAMAGED, _NOT_ANSWERED, _WITHOUT_CHECKSUM = 0, 1, 2, 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of the verb."""
    parser.add_argument(
        "path",
        nargs="+",
        metavar="PATH",
        help="a checkpoint: a file or a directory, whose other checkpoints are verified as well",
    )
    parser.add_argument("--threads", type=_positive, help="threads that read (default: one for each CPU, 8 at most)")
    parser.add_argument("--quiet", action="store_true", help="print damage only, and show no bar")


def run(arguments: argparse.Namespace) -> int:
    """Verifies and prints; returns the exit status that the module's docstring lists."""
    statuses = set()
    for path in [path for named in arguments.path for path in (named, *_not_part_of(named))]:
        try:
            report = verify_checkpoint(
                path, num_threads=arguments.threads, progress=not arguments.quiet and sys.stderr.isatty()
            )
        except (MemloadError, OSError) as error:
            print(error if str(path) in str(error) else f"{path}: {error}", file=sys.stderr)
            statuses.add(_NOT_ANSWERED)
            continue
        if report.is_damaged or not arguments.quiet:
            print(report)
        statuses.add(_DAMAGED if report.is_damaged else _VERIFIED if report.is_verified else _WITHOUT_CHECKSUM)
    return next((status for status in (_DAMAGED, _NOT_ANSWERED, _WITHOUT_CHECKSUM) if status in statuses), _VERIFIED)


def _not_part_of(path: str) -> list[str]:
    """Files in a directory of weights that are checkpoints of their own: who names the directory means them as well."""
    try:
        if not os.path.isdir(path) or not is_checkpoint(path):
            return []
        parts = {os.path.realpath(file.path) for file in find_format(path).take_inventory(path).files}
        found = [beside for beside in checkpoints_in(path) if os.path.isfile(beside)]
    except (MemloadError, OSError):
        return []  # What is wrong is said of the directory.
    return [beside for beside in found if os.path.realpath(beside) not in parts]


def _positive(word: str) -> int:
    number = int(word)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number
