"""From disk to index: which bytes of a file are which tensor, and the file's object with its tensors left there."""

from lightning_memload.checkpoint.chunked import ChunkedTensor, FilePiece
from lightning_memload.checkpoint.erasing import holds_refused
from lightning_memload.checkpoint.formats import (
    CheckpointFormat,
    checkpoints_in,
    find_format,
    is_checkpoint,
    load_mapped,
    local_path,
    open_checkpoint,
)
from lightning_memload.checkpoint.index import (
    Checkpoint,
    ChunkInfo,
    FileSpan,
    PickledGlobal,
    SpecialTensor,
    StorageInfo,
    TensorInfo,
    lay_out,
    span_elements,
)
from lightning_memload.checkpoint.inventory import Damage, Inventory, Section
from lightning_memload.checkpoint.lease import FileWatch
from lightning_memload.checkpoint.mapped import MappedCheckpoint, UnmappableCheckpoint, span_bytes
from lightning_memload.checkpoint.mapping import DetachedError, FileMapping
from lightning_memload.checkpoint.missing import hub_advice
from lightning_memload.checkpoint.pickled_globals import (
    SafeGlobal,
    allow_globals,
    check_safe_globals,
    refused_globals,
)
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
    "PickledGlobal",
    "SafeGlobal",
    "Section",
    "SpecialTensor",
    "StorageInfo",
    "TensorInfo",
    "UnmappableCheckpoint",
    "allow_globals",
    "check_safe_globals",
    "checkpoints_in",
    "find_format",
    "holds_refused",
    "hub_advice",
    "is_checkpoint",
    "lay_out",
    "load_mapped",
    "local_path",
    "open_checkpoint",
    "read_fully",
    "refused_globals",
    "span_bytes",
    "span_elements",
]
