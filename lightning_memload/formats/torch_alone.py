"""Files that only ``torch.load`` can read: of torch < 1.6, or with compressed records. Says what it refuses in them.

Their pickles are read like all others: nothing that they name is imported or run.
"""

from __future__ import annotations

import io
import pickle
import zipfile

from lightning_memload.checkpoint.index import Checkpoint, PickledGlobal
from lightning_memload.pickles.globals import explain_refusal
from lightning_memload.pickles.structure import InertUnpickler, find_globals
from lightning_memload.storage.places import path_of, read_start
from lightning_memload.storage.stream import path_or_stream

__all__ = ["explain_torch_refusal"]

# Of what is not tensors. A larger pickle is not explained.
_MAX_PICKLE_BYTES = 64 << 20
# Files of torch < 1.6 begin with three small pickles: this number, the version of the format, and the system.
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PREFIXES = 3


def explain_torch_refusal(path: str, error: pickle.UnpicklingError) -> pickle.UnpicklingError:
    """Makes a more helpful error from an error of ``torch.load(path, weights_only=True)``.

    Call it in the same context as ``torch.load``, so that the same classes are allowed.

    Args:
        path: The file.
        error: The error.

    Returns:
        An error that names every refused class, as for all other formats. The given error if no class is refused, or
        if the pickle cannot be read.

    Peak memory: 64 MiB, and some 10 times the size of the pickle.
    """
    try:
        found = _globals_in(path_of(path))
    except Exception:  # a damaged or hostile file can fail in any way; torch's own words remain
        return error
    index = Checkpoint(path=path, format="torch", files=(), tensors=(), storages=(), globals=found)
    return explain_refusal(index, error)


def _globals_in(path: str) -> tuple[PickledGlobal, ...]:
    file = path_or_stream(path)
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            name = next(name for name in archive.namelist() if name.partition("/")[2] == "data.pkl")
            with archive.open(name) as record:
                return find_globals(io.BytesIO(record.read(_MAX_PICKLE_BYTES)))
    stream = io.BytesIO(read_start(path, _MAX_PICKLE_BYTES))
    if InertUnpickler(stream).load() != _LEGACY_MAGIC:
        raise pickle.UnpicklingError("it is not a file of torch")
    for _ in range(_LEGACY_PREFIXES - 1):
        find_globals(stream)
    return find_globals(stream)
