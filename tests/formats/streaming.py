"""All tensors of a checkpoint, read by the engine."""

from __future__ import annotations

import torch

from lightning_memload.bytes import Record
from lightning_memload.checkpoint import Checkpoint, MappedCheckpoint
from lightning_memload.transfer import StagingRing, TensorCopy, choose_layout, transfer


def stream(index: Checkpoint, mapped: MappedCheckpoint, *, verify: bool = True) -> dict[str, torch.Tensor]:
    """Every tensor, read by the engine, several threads at once."""
    values = {tensor.name: torch.empty(tensor.shape, dtype=tensor.dtype) for tensor in index}
    copies = [TensorCopy(t.name, t.file_range[0], t.dtype, t.stride, values[t.name]) for t in index]
    records = [Record(s.key, s.offset, s.nbytes, s.crc32) for s in index.storages if s.crc32 is not None]
    layout = choose_layout(8 << 20, 4)
    with StagingRing(layout, pinned=False) as ring:
        transfer(
            mapped.source, copies, lambda: ring, num_threads=4, block_bytes=layout.block_bytes,
            records=records if verify else (),
        )  # fmt: skip
    return values
