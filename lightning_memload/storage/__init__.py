"""Where bytes are: open files, mappings of them, leases on them, and what replaces a file in one step."""

from lightning_memload.storage.lease import FileWatch
from lightning_memload.storage.local import ByteSource, FilePart, FileSet, LocalFile, read_fully
from lightning_memload.storage.mapping import FileMapping

__all__ = ["ByteSource", "FileMapping", "FilePart", "FileSet", "FileWatch", "LocalFile", "read_fully"]
