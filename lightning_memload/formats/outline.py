"""Lists the keys at the top of a checkpoint, those without tensors too, without running code from it."""

from __future__ import annotations

import os

from lightning_memload.checkpoint.index import Checkpoint
from lightning_memload.formats.tensor_directory.manifest import STATE_FILE
from lightning_memload.formats.torch_zip.records import read_records
from lightning_memload.pickles.structure import read_structure
from lightning_memload.storage.places import is_file, is_folder, open_file

__all__ = ["top_level_keys"]

# The files with the pickled objects, in directories of the two formats that have one.
_STATE_FILES = (STATE_FILE, "meta.pt")


def top_level_keys(index: Checkpoint) -> tuple[str, ...]:
    """The keys of the saved dict, in its order. Of a format without pickled objects: the first keys of the tensors.

    Args:
        index: The index of the checkpoint.

    Raises:
        CheckpointFormatError: The pickle is damaged.
        OSError: It cannot be read.
    """
    keys = dict.fromkeys(str(tensor.path[0]) for tensor in index if tensor.path)
    path = index.path
    if is_folder(path):
        path = next(filter(is_file, (os.path.join(path, name) for name in _STATE_FILES)), path)
    elif index.format != "torch":
        return tuple(keys)
    if is_file(path):
        with open_file(path) as file:
            records, pickled = read_records(file)
        root = read_structure(path, pickled, records)
        if isinstance(root, dict):
            keys = dict.fromkeys([*map(str, root), *keys])
    return tuple(keys)
