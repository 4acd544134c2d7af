"""From disk to index: which bytes of a file are which tensor, and the file's object with its tensors left there."""

from lightning_memload.checkpoint.chunked import ChunkedTensor, FileChunk, part_of
from lightning_memload.checkpoint.index import (
    Checkpoint,
    ChunkInfo,
    SpecialTensor,
    StorageInfo,
    TensorInfo,
    span_elements,
)
from lightning_memload.checkpoint.inventory import Damage, Inventory
from lightning_memload.checkpoint.mapped import MappedCheckpoint, end_loading, span_bytes
from lightning_memload.checkpoint.missing import hub_advice
from lightning_memload.checkpoint.sections import TensorGroup

__all__ = [
    "Checkpoint",
    "ChunkInfo",
    "ChunkedTensor",
    "Damage",
    "FileChunk",
    "Inventory",
    "MappedCheckpoint",
    "SpecialTensor",
    "StorageInfo",
    "TensorGroup",
    "TensorInfo",
    "end_loading",
    "hub_advice",
    "part_of",
    "span_bytes",
    "span_elements",
]
