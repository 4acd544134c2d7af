"""The arguments and results of a transfer: the tensors to fill, and the counters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

__all__ = ["TensorCopy", "TransferStats"]


class TensorCopy(NamedTuple):
    """One tensor to copy from the file to its destination.

    Attributes:
        name: Name of the tensor in messages.
        offset: File position of its first element.
        dtype: Element type in the file.
        stride: Strides in the file, in elements. The shape is the destination's.
        destination: Tensor to fill; any device, dtype and strides. Values are converted as by ``Tensor.copy_``.
    """

    name: str
    offset: int
    dtype: torch.dtype
    stride: tuple[int, ...]
    destination: torch.Tensor


@dataclass(frozen=True, slots=True)
class TransferStats:
    """The counters of a transfer.

    Attributes:
        bytes_read: Bytes read from the source.
        bytes_verified: Bytes of the records whose checksum was compared.
        seconds: Wall time from the first read to the end of the last copy.
        num_threads: Number of threads that read.
        staging_bytes: Host memory of the staging ring. 0 if the transfer needs no ring.
        bytes_received: Bytes that other ranks have read and sent.
    """

    bytes_read: int = 0
    bytes_verified: int = 0
    seconds: float = 0.0
    num_threads: int = 0
    staging_bytes: int = 0
    bytes_received: int = 0

    def __add__(self, other: TransferStats) -> TransferStats:
        return TransferStats(
            self.bytes_read + other.bytes_read,
            self.bytes_verified + other.bytes_verified,
            self.seconds + other.seconds,
            max(self.num_threads, other.num_threads),
            max(self.staging_bytes, other.staging_bytes),
            self.bytes_received + other.bytes_received,
        )
