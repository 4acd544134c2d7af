"""Tell how much memory a resume will need, and whether that is free here now.

There is one row for Lightning alone (stock) and one for each mode of this package. The figures are above the process
before the module was built. They do not contain Python, torch and Lightning themselves, the CUDA context, and what
training needs on top: gradients and activations. No tensor is read.

Exit status: 0 a resume with this package fits, or the free memory is unknown; 1 it does not fit; 2 there is no
checkpoint at this path, or it is damaged.
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import TYPE_CHECKING

from lightning_memload.cli.arguments import positive_number
from lightning_memload.cli.printing import lay_out_table, print_json, printable, terminal_width
from lightning_memload.units import format_bytes

if TYPE_CHECKING:
    from lightning_memload.forecast import PlannedWay, ResumePlan

__all__ = ["add_arguments", "run"]

_FITS, _DOES_NOT_FIT = 0, 1
_ANSWERS = {True: "yes", False: "no", None: "unknown"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of the verb."""
    parser.add_argument("path", metavar="PATH", help="a checkpoint: a file or a directory")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where training runs (default: cpu)")
    parser.add_argument(
        "--stage", choices=["fit", "validate"], default="fit", help="what the resume is for (default: fit)"
    )
    parser.add_argument(
        "--host-budget-mib", type=positive_number, default=128, help="as for MemoryEfficientRestore (default: 128)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Prints the plan and returns the exit status, see the module's docstring.

    Raises:
        CheckpointFormatError: The path is not a checkpoint, or the checkpoint is damaged.
        OSError: The checkpoint cannot be read.
    """
    from lightning_memload.forecast import plan_resume

    plan = plan_resume(
        arguments.path,
        device=arguments.device,
        stage=arguments.stage,
        host_budget_mib=arguments.host_budget_mib,
    )
    if arguments.json:
        print_json(dataclasses.asdict(plan))
    else:
        print("\n".join(_lines(plan, terminal_width())))
    ours = [way.fits for way in plan.ways if way.name != "stock"]
    return _DOES_NOT_FIT if all(fits is False for fits in ours) else _FITS


def _lines(plan: ResumePlan, width: int | None) -> list[str]:
    parts = (f"weights {format_bytes(plan.weight_bytes)}", f"optimizer states {format_bytes(plan.optimizer_bytes)}")
    lines = [f"{printable(plan.path)}, {plan.stage} on {plan.device}: {', '.join(parts)}"]
    rows: list[tuple[str, ...]] = [("resume", "host peak", "of it stays", "pages of the file", "GPU", "fits")]
    for way in plan.ways:
        sizes = map(format_bytes, (way.host_bytes, way.kept_bytes, way.file_bytes, way.device_bytes))
        rows.append((_name_of(way), *sizes, _ANSWERS[way.fits]))
    lines += lay_out_table(rows, (1, 2, 3, 4), width=width)
    free = f"free now: {_known(plan.free_host_bytes)} of host memory"
    if plan.device == "cuda":
        free += f", {_known(plan.free_device_bytes)} of GPU memory"
    return [*lines, free]


def _name_of(way: PlannedWay) -> str:
    return f"{way.name}, meta_init" if way.meta_init else way.name


def _known(nbytes: int | None) -> str:
    return "an unknown part" if nbytes is None else format_bytes(nbytes)
