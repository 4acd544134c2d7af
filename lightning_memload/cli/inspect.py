"""Show what a checkpoint holds: its sections, and on demand its tensors.

The summary has one row for each section: weights, each optimizer, schedulers, callbacks, loops, hyperparameters, other.
Tensors at the same place of the file count once. Below it are shared storages, tensors of other kinds (quantised,
sparse), and classes that torch.load(weights_only=True) refuses.

Reads no tensor and runs no code from the file, so it is safe and fast for files of any size and origin.

Exit status: 0 for success; 2 if there is no checkpoint at this path, or it is damaged.
"""

from __future__ import annotations

import argparse
import textwrap
from typing import TYPE_CHECKING

from lightning_memload.cli.arguments import regular_expression
from lightning_memload.cli.printing import (
    lay_out_list,
    lay_out_table,
    print_json,
    printable,
    shortened,
    terminal_width,
)
from lightning_memload.collector import paused_collector
from lightning_memload.units import counted, format_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning_memload.checkpoint import Checkpoint, SpecialTensor, TensorInfo

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of the verb."""
    parser.add_argument("path", metavar="PATH", help="a checkpoint: a file or a directory")
    parser.add_argument("--tensors", action="store_true", help="list all tensors: name, shape, dtype, bytes, ties")
    parser.add_argument("--tree", action="store_true", help="show the tensors as a tree with the bytes of each branch")
    parser.add_argument(
        "--match",
        type=regular_expression,
        metavar="REGEX",
        help="only tensors whose name has a match; implies --tensors",
    )
    parser.add_argument("--sort", choices=["bytes", "name"], help="list the tensors in this order")


def run(arguments: argparse.Namespace) -> int:
    """Prints the summary and returns the exit status, see the module's docstring.

    Raises:
        CheckpointFormatError: The path is not a checkpoint, or the checkpoint is damaged.
        OSError: The checkpoint cannot be read.
    """
    from lightning_memload.formats import open_checkpoint

    with paused_collector():
        index = open_checkpoint(arguments.path)
        tensors = _chosen(index, arguments)
        if arguments.json:
            print_json(_as_dict(index, tensors))
            return 0
        width = terminal_width()
        lines = _summary(index, width)
        if arguments.tree:
            lines += ["", *_tree(tensors, width)]
        elif arguments.tensors or arguments.match or arguments.sort:
            lines += ["", *_table(index, tensors, arguments, width)]
        print("\n".join(lines))
    return 0


def _chosen(index: Checkpoint, arguments: argparse.Namespace) -> list[TensorInfo]:
    tensors = [t for t in index if arguments.match is None or arguments.match.search(t.name)]
    if arguments.sort == "bytes":
        tensors.sort(key=lambda tensor: -tensor.nbytes)
    elif arguments.sort == "name":
        tensors.sort(key=lambda tensor: tensor.name)
    return tensors


def _summary(index: Checkpoint, width: int | None) -> list[str]:
    whole = (
        f"{printable(index.path)} ({index.format}): {counted(len(index), 'tensor')}, {index.nbytes:,} bytes in "
        f"{counted(len(index.storages), 'storage')}; {counted(len(index.files), 'file')} of {index.file_size:,} bytes"
    )
    lines = [*(textwrap.wrap(whole, width) if width else [whole]), ""]
    rows = [("section", "tensors", "values", "bytes", "size", "dtypes")]
    for section in index.sections:
        dtypes = ", ".join(section.dtypes)
        sizes = (f"{section.num_values:,}", f"{section.nbytes:,}", format_bytes(section.nbytes))
        rows.append((section.name, f"{len(section.tensors):,}", *sizes, dtypes))
    if len(rows) > 1:
        lines += lay_out_table(rows, (1, 2, 3, 4), width=width)
    empty = _keys_without_tensors(index)
    if empty:
        lines += lay_out_list("without tensors:", map(printable, empty), width=width)
    lines += _ties(index, width) + _specials(index.special, width) + _globals(index, width)
    return lines


def _keys_without_tensors(index: Checkpoint) -> list[str]:
    from lightning_memload.errors import MemloadError
    from lightning_memload.formats.outline import top_level_keys

    with_tensors = {str(item.path[0]) for item in (*index, *index.special) if item.path}
    try:
        return [key for key in top_level_keys(index) if key not in with_tensors]
    except (MemloadError, OSError):
        return []  # The index does not depend on them.


def _ties(index: Checkpoint, width: int | None) -> list[str]:
    if not index.ties:
        return []
    lines = [f"{counted(len(index.ties), 'storage')} shared by several tensors:"]
    for group in index.ties[:10]:
        lines += lay_out_list(" ", (printable(tensor.name) for tensor in group), width=width)
    if len(index.ties) > 10:
        lines.append(f"  and {len(index.ties) - 10} more")
    return lines


def _specials(special: Sequence[SpecialTensor], width: int | None) -> list[str]:
    if not special:
        return []
    rows = []
    for item in special:
        shape = "?" if item.shape is None else "x".join(map(str, item.shape)) or "scalar"
        dtype = "?" if item.dtype is None else str(item.dtype).removeprefix("torch.")
        rows.append((f"  {printable(item.name)}", shape, dtype, f"{item.nbytes:,}", printable(item.kind)))
    title = f"{counted(len(special), 'tensor')} of other kinds (name, shape, dtype, bytes, kind):"
    return [title, *lay_out_table(rows, (1, 3), width=width)]


def _globals(index: Checkpoint, width: int | None) -> list[str]:
    from lightning_memload.pickles import refused_globals

    lines = []
    refused = refused_globals(index.globals)
    if refused:
        lines.append(f"{counted(len(refused), 'class', 'classes')} that torch.load(weights_only=True) refuses:")
        lines += [f"  {printable(item.name)}, at {printable(item.place)}" for item in refused]
    allowed = [printable(item.name) for item in index.globals if item not in refused]
    if allowed:
        count = counted(len(allowed), "class or function", "classes and functions")
        lines += lay_out_list(f"{count} that it allows:", allowed, width=width)
    return lines


def _table(
    index: Checkpoint, tensors: Sequence[TensorInfo], arguments: argparse.Namespace, width: int | None
) -> list[str]:
    first = {group[0].storage.key: group[0].name for group in index.ties}
    rows = []
    for tensor in tensors:
        owner = first.get(tensor.storage.key) if tensor.numel else None
        note = f"shares the storage of {printable(owner)}" if owner not in (None, tensor.name) else ""
        if width is not None:
            note = shortened(note, max(20, width // 3))
        rows.append((printable(tensor.name), _shape(tensor), _dtype(tensor), f"{tensor.nbytes:,}", note))
    lines = lay_out_table(rows, (1, 3), width=width)
    if arguments.match is not None:
        lines.append(f"{len(tensors):,} of {counted(len(index), 'tensor')} match")
    return lines


def _tree(tensors: Sequence[TensorInfo], width: int | None) -> list[str]:
    """One row for each branch and each tensor. Names are divided at dots too, as modules are."""
    sizes: dict[tuple[str, ...], list[int]] = {}
    leaves: dict[tuple[str, ...], TensorInfo] = {}
    for tensor in tensors:
        parts = tuple(part for key in tensor.path for part in str(key).split("."))
        leaves[parts] = tensor
        for depth in range(1, len(parts) + 1):
            size = sizes.setdefault(parts[:depth], [0, 0])
            size[0], size[1] = size[0] + 1, size[1] + tensor.nbytes
    rows = []
    for parts, (count, nbytes) in sizes.items():
        leaf = leaves.get(parts)
        what = (_shape(leaf), _dtype(leaf)) if leaf is not None else (counted(count, "tensor"), "")
        rows.append((f"{'  ' * (len(parts) - 1)}{printable(parts[-1])}", *what, f"{nbytes:,}"))
    return lay_out_table(rows, (1, 3), width=width)


def _shape(tensor: TensorInfo) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"


def _dtype(tensor: TensorInfo) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _as_dict(index: Checkpoint, tensors: Sequence[TensorInfo]) -> dict[str, object]:
    from lightning_memload.pickles import refused_globals

    refused = refused_globals(index.globals)
    return {
        "path": index.path,
        "format": index.format,
        "file_bytes": index.file_size,
        "tensor_bytes": index.nbytes,
        "sections": [
            {
                "name": section.name,
                "tensors": len(section.tensors),
                "values": section.num_values,
                "nbytes": section.nbytes,
                "dtypes": section.dtypes,
            }
            for section in index.sections
        ],
        "without_tensors": _keys_without_tensors(index),
        "tensors": [
            {
                "name": tensor.name,
                "shape": list(tensor.shape),
                "dtype": _dtype(tensor),
                "nbytes": tensor.nbytes,
                "storage": tensor.storage.key,
            }
            for tensor in tensors
        ],
        "ties": [[tensor.name for tensor in group] for group in index.ties],
        "metadata": dict(index.metadata),
        "special": [
            {
                "name": special.name,
                "kind": special.kind,
                "shape": None if special.shape is None else list(special.shape),
                "dtype": None if special.dtype is None else str(special.dtype).removeprefix("torch."),
                "nbytes": special.nbytes,
            }
            for special in index.special
        ],
        "globals": [{"name": item.name, "place": item.place, "allowed": item not in refused} for item in index.globals],
    }
