"""Compare every checksum of checkpoints, and list all damage.

Exit status: 0 every byte of every checkpoint matches its checksum; 1 a checkpoint is damaged; 2 a path is not a
checkpoint, or cannot be read; 3 no damage was found, but a checkpoint has bytes without a checksum (safetensors).
If several apply, the first of 1, 2, 3.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from typing import TYPE_CHECKING

from lightning_memload.cli.arguments import positive_number
from lightning_memload.cli.printing import print_json
from lightning_memload.cli.progress import Progress
from lightning_memload.errors import MemloadError

if TYPE_CHECKING:
    from lightning_memload.verify import VerifyReport

__all__ = ["add_arguments", "run"]

_VERIFIED, _DAMAGED, _NOT_ANSWERED, _WITHOUT_CHECKSUM = 0, 1, 2, 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of the verb."""
    parser.add_argument(
        "path",
        nargs="+",
        metavar="PATH",
        help="a checkpoint: a file, or a directory; other checkpoints in that directory are verified as well",
    )
    parser.add_argument(
        "--threads", type=positive_number, help="number of reading threads (default: one for each CPU, at most 8)"
    )
    parser.add_argument("--quiet", action="store_true", help="print damage only, and show no progress")


def run(arguments: argparse.Namespace) -> int:
    """Verifies the checkpoints, prints the results and returns the exit status, see the module's docstring."""
    from lightning_memload.verify import verify_checkpoint

    statuses, answers = set(), []
    for path in [path for named in arguments.path for path in (named, *_not_part_of(named))]:
        try:
            with Progress(f"Verifying {os.path.basename(path) or path}", quiet=arguments.quiet) as progress:
                report = verify_checkpoint(path, num_threads=arguments.threads, progress=progress)
        except (MemloadError, OSError) as error:
            if arguments.debug:
                traceback.print_exc(file=sys.stderr)
            statuses.add(_NOT_ANSWERED)
            problem = str(error) if str(path) in str(error) else f"{path}: {error}"
            answers.append({"path": path, "status": _NOT_ANSWERED, "error": problem})
            if not arguments.json:
                print(problem)
            continue
        status = _DAMAGED if report.is_damaged else _VERIFIED if report.is_verified else _WITHOUT_CHECKSUM
        statuses.add(status)
        answers.append(_as_dict(report, status))
        if not arguments.json and (report.is_damaged or not arguments.quiet):
            print(report)
    result = next((status for status in (_DAMAGED, _NOT_ANSWERED, _WITHOUT_CHECKSUM) if status in statuses), _VERIFIED)
    if arguments.json:
        print_json({"status": result, "checkpoints": answers})
    return result


def _as_dict(report: VerifyReport, status: int) -> dict[str, object]:
    return {
        "path": report.path,
        "status": status,
        "format": report.format,
        "bytes_verified": report.bytes_verified,
        "bytes_without_checksum": report.bytes_without_checksum,
        "seconds": report.seconds,
        "damage": [
            {"path": item.path, "problem": item.problem, "key": item.key, "offset": item.offset}
            for item in report.damage
        ],
    }


def _not_part_of(path: str) -> list[str]:
    """Return the files in a directory of weights that are not part of it but checkpoints of their own."""
    from lightning_memload.formats import checkpoints_in, find_format, is_checkpoint
    from lightning_memload.storage.places import is_file, is_folder

    try:
        if not is_folder(path) or not is_checkpoint(path):
            return []
        parts = {os.path.realpath(file.path) for file in find_format(path).take_inventory(path).files}
        found = [beside for beside in checkpoints_in(path) if is_file(beside)]
    except (MemloadError, OSError):
        return []  # The verification of the directory itself reports the error.
    return [beside for beside in found if os.path.realpath(beside) not in parts]
