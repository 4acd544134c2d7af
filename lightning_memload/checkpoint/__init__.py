"""From disk to index: which bytes of a file are which tensor, and the file's object with its tensors left there."""

from lightning_memload.checkpoint.index import Checkpoint, StorageInfo, TensorInfo, span_elements
from lightning_memload.checkpoint.load import (
    MappedCheckpoint,
    UnmappableCheckpoint,
    load_mapped,
    open_checkpoint,
    span_bytes,
)
from lightning_memload.checkpoint.source import ByteSource, LocalFile

__all__ = [
    "ByteSource",
    "Checkpoint",
    "LocalFile",
    "MappedCheckpoint",
    "StorageInfo",
    "TensorInfo",
    "UnmappableCheckpoint",
    "load_mapped",
    "open_checkpoint",
    "span_bytes",
    "span_elements",
]
