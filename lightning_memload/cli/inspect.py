"""List the tensors of a checkpoint (name, shape, dtype, bytes, ties) and the classes of its other objects.

Reads no tensor and runs no code from the file, so it is safe and fast for files of any size and origin.

Exit status: 0 for success; 2 if there is no checkpoint at this path, or it is damaged.
"""

from __future__ import annotations

import argparse
import json

from lightning_memload.checkpoint import Checkpoint
from lightning_memload.collector import paused_collector
from lightning_memload.formats import open_checkpoint
from lightning_memload.pickles import refused_globals
from lightning_memload.units import counted

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of the verb."""
    parser.add_argument("path", metavar="PATH", help="a checkpoint: a file or a directory")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")


def run(arguments: argparse.Namespace) -> int:
    """Prints the list and returns the exit status, see the module's docstring.

    Raises:
        CheckpointFormatError: The path is not a checkpoint, or the checkpoint is damaged.
        OSError: The checkpoint cannot be read.
    """
    with paused_collector():
        index = open_checkpoint(arguments.path)
        print(json.dumps(_as_dict(index)) if arguments.json else _as_table(index))
    return 0


def _as_table(index: Checkpoint) -> str:
    first = {group[0].storage.key: group[0].name for group in index.ties}
    rows = []
    for tensor in index:
        owner = first.get(tensor.storage.key) if tensor.numel else None
        note = f"shares the storage of {_printable(owner)}" if owner not in (None, tensor.name) else ""
        shape = "x".join(map(str, tensor.shape)) or "scalar"
        dtype = str(tensor.dtype).removeprefix("torch.")
        rows.append((_printable(tensor.name), shape, dtype, f"{tensor.nbytes:,}", note))
    for special in index.special:
        shape = "?" if special.shape is None else "x".join(map(str, special.shape)) or "scalar"
        dtype = "?" if special.dtype is None else str(special.dtype).removeprefix("torch.")
        rows.append((_printable(special.name), shape, dtype, f"{special.nbytes:,}", _printable(special.kind)))
    widths = [max((len(row[column]) for row in rows), default=0) for column in range(4)]
    lines = [
        f"{name:<{widths[0]}}  {shape:>{widths[1]}}  {dtype:<{widths[2]}}  {nbytes:>{widths[3]}}  {note}".rstrip()
        for name, shape, dtype, nbytes, note in rows
    ]
    lines.append(
        f"{index.path} ({index.format}): {counted(len(index), 'tensor')}, {index.nbytes:,} bytes in "
        f"{counted(len(index.storages), 'storage')}; {counted(len(index.files), 'file')} of {index.file_size:,} bytes; "
        f"{counted(len(index.ties), 'tie')}"
    )
    refused = refused_globals(index.globals)
    if refused:
        lines.append(f"{counted(len(refused), 'class', 'classes')} that torch.load(weights_only=True) refuses:")
        lines += [f"  {_printable(item.name)}, at {_printable(item.place)}" for item in refused]
    allowed = [_printable(item.name) for item in index.globals if item not in refused]
    if allowed:
        count = counted(len(allowed), "class or function", "classes and functions")
        lines.append(f"{count} that it allows: {', '.join(allowed)}")
    return "\n".join(lines)


def _as_dict(index: Checkpoint) -> dict[str, object]:
    refused = refused_globals(index.globals)
    tensors = [
        {
            "name": tensor.name,
            "shape": list(tensor.shape),
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "nbytes": tensor.nbytes,
            "storage": tensor.storage.key,
        }
        for tensor in index
    ]
    return {
        "path": index.path,
        "format": index.format,
        "file_bytes": index.file_size,
        "tensor_bytes": index.nbytes,
        "tensors": tensors,
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


def _printable(name: str | None) -> str:
    """Return a name on one line, without the terminal control codes that a hostile file may put in it."""
    return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in name or "")
