"""Compare the tensors of two checkpoints, and tell which differ and by how much.

The weights are compared, and with --optimizer the tensors of the optimizers too. The formats may differ. 0.0 and -0.0,
and two NaNs with different bits, are equal values with different bits: values and bits are counted apart. Objects that
are no tensors are not compared.

Exit status: 0 all tensors are the same, bit for bit; 1 there is a difference; 2 a path is not a checkpoint, or cannot
be read.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from lightning_memload.cli.arguments import positive_number
from lightning_memload.cli.printing import lay_out_table, print_json, printable, terminal_width
from lightning_memload.cli.progress import Progress
from lightning_memload.units import counted, format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lightning_memload.diff import DiffReport

__all__ = ["add_arguments", "run"]

_EQUAL, _DIFFERENT = 0, 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of the verb."""
    parser.add_argument("first", metavar="A", help="a checkpoint: a file or a directory")
    parser.add_argument("second", metavar="B", help="the other checkpoint")
    parser.add_argument("--optimizer", action="store_true", help="compare the tensors of the optimizers too")
    parser.add_argument(
        "--threads", type=positive_number, help="number of reading threads (default: one for each CPU, at most 4)"
    )
    parser.add_argument("--quiet", action="store_true", help="print nothing, and show no progress")


def run(arguments: argparse.Namespace) -> int:
    """Prints the differences and returns the exit status, see the module's docstring.

    Raises:
        CheckpointFormatError: A path is not a checkpoint.
        OSError: A checkpoint cannot be read.
    """
    from lightning_memload.diff import diff_checkpoints

    with Progress("Comparing", quiet=arguments.quiet) as progress:
        report = diff_checkpoints(
            arguments.first,
            arguments.second,
            optimizer=arguments.optimizer,
            num_threads=arguments.threads,
            progress=progress,
        )
    if arguments.json:
        print_json(_as_dict(report))
    elif not arguments.quiet:
        print("\n".join(_lines(report, terminal_width())))
    return _EQUAL if report.is_equal else _DIFFERENT


def _lines(report: DiffReport, width: int | None) -> list[str]:
    lines = []
    if report.different:
        rows = [("tensor", "values", "differ", "differ in bits", "max abs", "max relative", "")]
        for item in report.different:
            numbers = (f"{item.num_values:,}", f"{item.num_different:,}", f"{item.num_different_bits:,}")
            nan = f"{item.num_nan:,} NaN in one only" if item.num_nan else ""
            rows.append((printable(item.name), *numbers, f"{item.max_abs:.3g}", f"{item.max_relative:.3g}", nan))
        lines += lay_out_table(rows, (1, 2, 3, 4, 5), width=width)
    lines += [f"{printable(name)}: shape {_shape(a)} and {_shape(b)}" for name, (a, b) in report.shapes.items()]
    lines += [f"{printable(name)}: dtype {_dtype(a)} and {_dtype(b)}" for name, (a, b) in report.dtypes.items()]
    lines += [f"{printable(name)}: only in {printable(report.first)}" for name in report.only_in_first]
    lines += [f"{printable(name)}: only in {printable(report.second)}" for name in report.only_in_second]
    equal = report.num_compared - len(report.different)
    lines.append(
        f"{equal:,} of {counted(report.num_compared, 'compared tensor')} "
        f"({format_bytes(report.bytes_compared)} in each checkpoint) are the same, bit for bit"
    )
    bits_only = sum(not item.num_different for item in report.different)
    if bits_only:
        lines.append(f"{bits_only:,} of the others have equal values with different bits, such as 0.0 and -0.0")
    return lines


def _shape(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _dtype(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


def _as_dict(report: DiffReport) -> dict[str, object]:
    return {
        "equal": report.is_equal,
        "first": report.first,
        "second": report.second,
        "compared": report.num_compared,
        "bytes_compared": report.bytes_compared,
        "different": [
            {
                "name": item.name,
                "values": item.num_values,
                "different": item.num_different,
                "different_bits": item.num_different_bits,
                "nan_in_one": item.num_nan,
                "max_abs": item.max_abs,
                "max_relative": item.max_relative,
            }
            for item in report.different
        ],
        "only_in_first": list(report.only_in_first),
        "only_in_second": list(report.only_in_second),
        "shapes": {name: [list(a), list(b)] for name, (a, b) in report.shapes.items()},
        "dtypes": {name: [_dtype(a), _dtype(b)] for name, (a, b) in report.dtypes.items()},
    }
