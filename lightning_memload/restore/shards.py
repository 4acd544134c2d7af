"""Streams the shards of one rank: each rank reads the bytes of its own shards, and no whole tensor exists anywhere.

A part of a tensor that lies in the file is a tensor that lies in the file, so the session streams it. The checksums of
the file are those of whole records. Each rank computes the checksums of the parts that it reads, and the ranks compare
them together. Three kinds of records:

* every rank reads all of it (small tensors that are not sharded): each rank compares it alone;
* it is one tensor, or a block of its rows, and only rows are sharded: the parts are the shards;
* any other (columns are sharded, or tensors share it): each rank reads and checks an equal share of it in addition.
  Ranks that read columns read most of this share anyway.
"""

from __future__ import annotations

import math
import operator
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from zlib_ng import zlib_ng

from lightning_memload.bytes import Record
from lightning_memload.checkpoint import ChunkedTensor, FileChunk, part_of
from lightning_memload.distributed.shards import Region, are_rows, first_dimension, regions_of
from lightning_memload.errors import ChecksumError
from lightning_memload.restore.overlaps import is_plain_tensor
from lightning_memload.restore.record_checks import Checks
from lightning_memload.restore.session import Move, RestoreSession
from lightning_memload.storage import checksum_error

__all__ = ["ShardReader", "ShardTarget", "Unshardable", "is_distributed"]


class Unshardable(Exception):
    """Shards cannot be read in this way. Its text is the reason. Nothing has been changed."""


class ShardTarget(NamedTuple):
    """One tensor of the checkpoint, and the memory of this rank for its part of it.

    Attributes:
        name: Its name in messages.
        value: The whole tensor, as the loaded checkpoint holds it.
        destination: The local memory, an ordinary tensor of any device, dtype and strides.
        regions: The regions of ``value`` that the rank holds. ``None``: every rank holds all of it.
        is_rows: Whether the regions of every rank are contiguous in a contiguous tensor.
        layout: Mesh and placements in words. Equal on all ranks.
    """

    name: str
    value: torch.Tensor
    destination: torch.Tensor
    regions: tuple[Region, ...] | None
    is_rows: bool
    layout: str

    @classmethod
    def of(cls, name: str, value: Any, tensor: Any) -> ShardTarget:
        """The target for a tensor of a module or optimizer.

        Args:
            name: Its name in messages.
            value: The whole tensor of the checkpoint.
            tensor: A ``DTensor`` or an ordinary tensor, with memory.

        Raises:
            Unshardable: One of the two is of an unknown kind, or their shapes differ.
        """
        if not (isinstance(value, ChunkedTensor) or is_plain_tensor(value)):
            raise Unshardable(f"{name} of the checkpoint is a {type(value).__name__}")
        if value.shape != tensor.shape:
            raise Unshardable(f"{name} has shape {tuple(value.shape)} on disk and {tuple(tensor.shape)} here")
        if not is_distributed(tensor):
            if not is_plain_tensor(tensor) or tensor.is_meta:
                raise Unshardable(f"{name} is a {type(tensor).__name__} on {tensor.device}")
            return cls(name, value, tensor.detach(), None, True, "")
        mesh, placements = tensor.device_mesh, tensor.placements
        with torch.no_grad():
            local = tensor.to_local().detach()
        regions = regions_of(tensor) if is_plain_tensor(local) and not local.is_meta else None
        if regions is None:
            raise Unshardable(f"{name} has placements {tuple(placements)} on {mesh}, which are not supported")
        sizes = tuple(mesh.shape)
        is_whole = all(size == 1 or placement.is_replicate() for size, placement in zip(sizes, placements, strict=True))
        is_rows = are_rows(tuple(tensor.shape), sizes, placements)
        return cls(name, value, local, None if is_whole else regions, is_rows, f"{sizes} {tuple(placements)}")

    def moves(self) -> Iterator[Move]:
        """The moves of this rank's part."""
        if self.regions is None:
            yield Move(self.name, self.value, self.destination)
            return
        for region in self.regions:
            is_all = region.shape == tuple(self.destination.shape)
            local = self.destination if is_all else part_of(self.destination, region.local_starts, region.shape)
            yield Move(self.name, part_of(self.value, region.starts, region.shape), local)


class ShardReader:
    """Reads the parts of one rank, and compares checksums with the other ranks.

    Args:
        session: The restore.
        rank: This rank.
        world_size: Number of ranks. All of them make the same calls with the same tensors of the same file.

    Attributes:
        unverified_bytes: Bytes of records whose checksum could not be compared.
    """

    def __init__(self, session: RestoreSession, rank: int, world_size: int) -> None:
        self._session = session
        self._rank, self._world_size = rank, world_size
        self._planned: set[int] = set()
        self._shared: list[Record] = []
        self.unverified_bytes = 0

    def read(self, targets: Sequence[ShardTarget]) -> list[tuple[int, int, int]]:
        """Fills the destinations with this rank's parts.

        Args:
            targets: The tensors, in the same order on all ranks.

        Returns:
            For :meth:`compare` on every rank: of each part the offset in the run of all files, the length in bytes and
            the CRC-32.

        Raises:
            CheckpointReadError: Reading failed.
            ChecksumError: A record that this rank reads completely is damaged.

        Peak memory: the session's staging ring.
        """
        found: list[tuple[int, int, int]] = []

        def note(record: Record, crc32: int) -> None:
            found.append((record.offset, record.nbytes, crc32))

        records = self._plan_checks(targets)
        self._session.move([move for target in targets for move in target.moves()], Checks(records, note))
        return sorted(found)

    def compare(self, told: Mapping[int, Sequence[Sequence[int]]]) -> None:
        """Compares the records that the ranks have read together in the last :meth:`read`.

        Args:
            told: For each rank the checksums of its parts.

        Raises:
            ChecksumError: A record is damaged. The error is the same on every rank.
        """
        parts = sorted((part[0], part[1], part[2], rank) for rank, of_rank in told.items() for part in of_rank)
        shared, self._shared = sorted(self._shared, key=lambda record: record.offset), []
        number = 0
        for record in shared:
            end = record.offset + record.nbytes
            whole, covered, last = 0, record.offset, (-1, 0, 0)
            ranks: set[int] = set()
            while number < len(parts) and parts[number][0] < end:
                offset, nbytes, crc32, rank = parts[number]
                number += 1
                ranks.add(rank)
                if (offset, nbytes) == last[:2]:  # A replica. It must have read the same bytes.
                    if crc32 != last[2]:
                        raise self._error(record, crc32, ranks)
                elif offset == covered:
                    whole, covered = zlib_ng.crc32_combine(whole, crc32, nbytes), covered + nbytes
                last = (offset, nbytes, crc32)
            if covered != end:
                self.unverified_bytes += record.nbytes
            elif whole != record.crc32:
                raise self._error(record, whole, ranks)

    def _error(self, record: Record, actual: int, ranks: set[int]) -> ChecksumError:
        error = checksum_error(self._session.checkpoint.source, record, actual)
        readers = ", ".join(map(str, sorted(ranks)))
        error.args = (f"{error.args[0]} Read in parts by rank {readers}.", *error.args[1:])
        return error

    def _plan_checks(self, targets: Sequence[ShardTarget]) -> list[Record]:
        """The records, and parts of records without checksum, whose checksums this rank computes."""
        located = self._session.checkpoint.locate_all([target.value for target in targets])
        users: dict[int, list[tuple[ShardTarget, FileChunk]]] = {}
        for target, chunks in zip(targets, located, strict=True):
            for chunk in chunks or ():
                users.setdefault(chunk.offset, []).append((target, chunk))
        records = [r for r in self._session.records_at(list(users)) if r.nbytes and r.offset not in self._planned]
        offsets = sorted(users)
        planned: list[Record] = []
        for record in records:
            low, high = (bisect_left(offsets, at) for at in (record.offset, record.offset + record.nbytes))
            inside = [user for offset in offsets[low:high] for user in users[offset]]
            if not inside:
                continue  # A record that ends before a tensor without checksum begins.
            self._planned.add(record.offset)
            target, chunk = inside[0]
            is_one = len({id(target.value) for target, _ in inside}) == 1 and _is_all_of(target, chunk, record)
            if is_one and all(target.regions is None for target, _ in inside):
                planned.append(record)
                continue
            self._shared.append(record)
            if is_one and len(inside) == 1 and target.is_rows and _is_block_of_rows(target, chunk):
                planned.extend(_rows(target, chunk, record))
            else:
                planned.extend(self._share(record))
        return planned

    def _share(self, record: Record) -> list[Record]:
        start, end = (record.nbytes * rank // self._world_size for rank in (self._rank, self._rank + 1))
        return [_part(record, start, end - start)] if end > start else []


def is_distributed(tensor: Any) -> bool:
    """Whether a tensor is a ``DTensor``."""
    from torch.distributed.tensor import DTensor

    return type(tensor) is DTensor


def _part(record: Record, start: int, nbytes: int) -> Record:
    return Record(record.name, record.offset + start, nbytes, None)


def _rows(target: ShardTarget, chunk: FileChunk, record: Record) -> list[Record]:
    """The parts of a record that belong to a rank. The record is a chunk of a tensor of which only rows are sharded."""
    itemsize, strides = target.value.dtype.itemsize, _contiguous_stride(chunk.shape)
    parts = []
    for region in target.regions or ():
        low = [max(start, of_chunk) for start, of_chunk in zip(region.starts, chunk.starts, strict=True)]
        ends = zip(region.starts, region.shape, chunk.starts, chunk.shape, strict=True)
        sizes = [max(0, min(r + n, c + m) - at) for at, (r, n, c, m) in zip(low, ends, strict=True)]
        start = sum((at - c) * step for at, c, step in zip(low, chunk.starts, strides, strict=True))
        if math.prod(sizes):
            parts.append(_part(record, start * itemsize, math.prod(sizes) * itemsize))
    return parts


def _is_all_of(target: ShardTarget, chunk: FileChunk, record: Record) -> bool:
    """Whether a record is a chunk of a tensor, with its elements in order."""
    if chunk.offset != record.offset or math.prod(chunk.shape) * target.value.dtype.itemsize != record.nbytes:
        return False
    steps = zip(chunk.shape, chunk.stride, _contiguous_stride(chunk.shape), strict=True)
    return all(size == 1 or step == dense for size, step, dense in steps)


def _is_block_of_rows(target: ShardTarget, chunk: FileChunk) -> bool:
    """Whether a chunk is all of a tensor but for some rows."""
    shape = tuple(target.value.shape)
    first = first_dimension(shape)
    return all(number == first or n == size for number, (n, size) in enumerate(zip(chunk.shape, shape, strict=True)))


def _contiguous_stride(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(accumulate(reversed(shape[1:]), operator.mul, initial=1))[::-1] if shape else ()
