"""Places of files: open files, mappings of them, leases on them, and the replacement of a file in one step."""

from lightning_memload.storage.file_mapping import FileMapping
from lightning_memload.storage.file_set import FileSet
from lightning_memload.storage.lease import FileWatch
from lightning_memload.storage.local import LocalFile
from lightning_memload.storage.reservation import Reservation, map_or_reserve
from lightning_memload.storage.source import (
    ByteSource,
    FileView,
    Place,
    StoredFile,
    checksum_error,
    describe_mismatch,
    read_fully,
)

__all__ = [
    "ByteSource",
    "FileMapping",
    "FileSet",
    "FileView",
    "FileWatch",
    "LocalFile",
    "Place",
    "Reservation",
    "StoredFile",
    "checksum_error",
    "describe_mismatch",
    "map_or_reserve",
    "read_fully",
]
