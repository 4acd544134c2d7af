"""From disk to index: which bytes of a file are which tensor, and the file's object with its tensors left there."""

from lightning_memload.checkpoint.chunked import ChunkedTensor, FilePiece
from lightning_memload.checkpoint.formats import CheckpointFormat, find_format, load_mapped, open_checkpoint
from lightning_memload.checkpoint.index import (
    Checkpoint,
    ChunkInfo,
    FileSpan,
    StorageInfo,
    TensorInfo,
    lay_out,
    span_elements,
)
from lightning_memload.checkpoint.inventory import Damage, Inventory, Section
from lightning_memload.checkpoint.lease import FileWatch
from lightning_memload.checkpoint.mapped import MappedCheckpoint, UnmappableCheckpoint, span_bytes
from lightning_memload.checkpoint.mapping import DetachedError, FileMapping
from lightning_memload.checkpoint.safetensors_header import SAFETENSORS_DTYPES
from lightning_memload.checkpoint.source import ByteSource, FilePart, FileSet, LocalFile, read_fully

__all__ = [
    "SAFETENSORS_DTYPES",
    "ByteSource",
    "Checkpoint",
    "CheckpointFormat",
    "ChunkInfo",
    "ChunkedTensor",
    "Damage",
    "DetachedError",
    "FileMapping",
    "FilePart",
    "FilePiece",
    "FileSet",
    "FileSpan",
    "FileWatch",
    "Inventory",
    "LocalFile",
    "MappedCheckpoint",
    "Section",
    "StorageInfo",
    "TensorInfo",
    "UnmappableCheckpoint",
    "find_format",
    "lay_out",
    "load_mapped",
    "open_checkpoint",
    "read_fully",
    "span_bytes",
    "span_elements",
]
