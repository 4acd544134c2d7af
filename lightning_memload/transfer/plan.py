"""The plan of a transfer: which reads, in which order, and where their bytes go. Pure functions on integers.

Reads are in file order and never longer than a block. Tensors that lie close together share a read. A tensor longer
than a block is split. Several targets may use the same bytes of one read (ties, views). Every byte of every target is
covered exactly once. This module does not know devices, files or torch.

Objects that exist once per tensor are named tuples: creating one takes 0.4 us, a frozen dataclass takes 1.5 us.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from lightning_memload.checkpoint import span_elements

__all__ = [
    "Read",
    "RecordSegment",
    "Segment",
    "TargetRange",
    "TensorBlock",
    "complete_records",
    "plan_checks",
    "plan_reads",
    "split_strided",
]

# Records are aligned to 64 bytes after headers of about 100 bytes. Reading such a gap is cheaper than a second read.
MAX_GAP_BYTES = 4096
# Over a network each read is one request, and this is a good size for it.
REQUEST_BYTES = 8 << 20


class TargetRange(NamedTuple):
    """The bytes of one target: ``nbytes`` of the file from ``offset`` on."""

    target: int
    offset: int
    nbytes: int


class Segment(NamedTuple):
    """Part of a read for one target: bytes ``[start, start + nbytes)`` go to the target at ``target_start``."""

    start: int
    nbytes: int
    target: int
    target_start: int


class Read(NamedTuple):
    """One read of ``nbytes`` from file position ``offset``, and its segments, ordered by their start."""

    offset: int
    nbytes: int
    segments: tuple[Segment, ...]


class RecordSegment(NamedTuple):
    """Part of a read that belongs to a record: ``nbytes`` from ``start`` on, at ``record_start`` in the record."""

    start: int
    nbytes: int
    record: int
    record_start: int


@dataclass(frozen=True, slots=True)
class TensorBlock:
    """A part of a strided tensor that spans at most one block.

    Attributes:
        starts: Index of its first element, per dimension.
        shape: Sizes of the block.
        offset: Distance from the tensor's first element to the block's first element, in elements.
        span: Number of elements from the first to the last, both and all gaps included.
    """

    starts: tuple[int, ...]
    shape: tuple[int, ...]
    offset: int
    span: int


def plan_reads(ranges: Iterable[TargetRange], *, block_bytes: int, max_gap_bytes: int = MAX_GAP_BYTES) -> list[Read]:
    """Plans the reads that fill all ranges.

    Args:
        ranges: The ranges of the targets, in any order. They may overlap. Empty ranges are skipped.
        block_bytes: Maximum length of one read.
        max_gap_bytes: A gap between two ranges of up to this length is read too, rather than skipped.

    Returns:
        Reads in file order. Their file ranges do not overlap.

    Raises:
        ValueError: ``block_bytes`` is not positive, or a range has a negative number.
    """
    if block_bytes < 1:
        raise ValueError(f"block_bytes must be at least 1, got {block_bytes}")
    wanted = sorted((r for r in ranges if r.nbytes), key=lambda r: (r.offset, r.nbytes))
    if any(r.offset < 0 or r.nbytes < 0 for r in wanted):
        raise ValueError("ranges must not be negative")
    reads: list[Read] = []
    first = 0
    while first < len(wanted):
        # A run: ranges that touch, overlap, or have only small gaps between them.
        run_start, run_end = wanted[first].offset, wanted[first].offset + wanted[first].nbytes
        last = first + 1
        while last < len(wanted) and wanted[last].offset <= run_end + max_gap_bytes:
            run_end = max(run_end, wanted[last].offset + wanted[last].nbytes)
            last += 1
        reads.extend(_cut_run(wanted[first:last], run_start, run_end, block_bytes))
        first = last
    return reads


def _cut_run(ranges: Sequence[TargetRange], run_start: int, run_end: int, block_bytes: int) -> Iterable[Read]:
    """Splits one run into reads. ``ranges`` are sorted by offset."""
    active: list[TargetRange] = []
    upcoming = 0
    count = len(ranges)
    for start in range(run_start, run_end, block_bytes):
        end = min(start + block_bytes, run_end)
        while upcoming < count and ranges[upcoming].offset < end:
            active.append(ranges[upcoming])
            upcoming += 1
        if len(active) == 1 and active[0].offset <= start and active[0].offset + active[0].nbytes > end:
            # The middle of a large tensor, as most blocks are: a third of the time.
            yield Read(start, block_bytes, (Segment(0, block_bytes, active[0].target, start - active[0].offset),))
            continue
        segments = []
        for r in active:
            low, high = max(r.offset, start), min(r.offset + r.nbytes, end)
            segments.append(Segment(low - start, high - low, r.target, low - r.offset))
        segments.sort(key=lambda segment: (segment.start, segment.target))
        active = [r for r in active if r.offset + r.nbytes > end]
        if segments:
            # A gap at the start or end of a block is not read.
            low = segments[0].start
            high = max(segment.start + segment.nbytes for segment in segments)
            if low:
                segments = [Segment(s.start - low, s.nbytes, s.target, s.target_start) for s in segments]
            yield Read(start + low, high - low, tuple(segments))


def complete_records(
    reads: Sequence[Read], records: Sequence[tuple[int, int]], *, block_bytes: int, untouched: bool = False
) -> list[Read]:
    """Plans reads of what the other reads leave out of their records, so that the checksums can be compared.

    A tensor that is a part of a larger storage needs only a part of the record. Damage of this part would not be found.

    Args:
        reads: The reads for the targets, in file order.
        records: File offset and length of every record, in file order, not overlapping.
        block_bytes: Maximum length of one read.
        untouched: Also cover records that the other reads do not touch.

    Returns:
        Reads without segments. Together with the other reads they cover each record that the other reads touch.
    """
    found: list[Read] = []
    first_read = 0
    for offset, nbytes in records:
        covered, end = offset, offset + nbytes
        while first_read < len(reads) and reads[first_read].offset + reads[first_read].nbytes <= offset:
            first_read += 1
        number = first_read
        if not untouched and (number == len(reads) or reads[number].offset >= end):
            continue
        while covered < end:
            has_read = number < len(reads) and reads[number].offset < end
            start = reads[number].offset if has_read else end
            for at in range(covered, start, block_bytes):
                found.append(Read(at, min(block_bytes, start - at), ()))
            covered = max(covered, start, reads[number].offset + reads[number].nbytes if has_read else end)
            number += 1
    return found


def plan_checks(
    reads: Sequence[Read], records: Sequence[tuple[int, int]]
) -> tuple[list[tuple[RecordSegment, ...]], list[int]]:
    """Assigns the bytes of the reads to the records whose checksums they are part of.

    Only records that the reads cover completely can be checked. A byte that is in two reads counts once.

    Args:
        reads: The reads, in file order.
        records: File offset and length of every record, in file order, not overlapping.

    Returns:
        The checks of each read, and the positions of the records that are checked.
    """
    checks: list[list[RecordSegment]] = [[] for _ in reads]
    checked: list[int] = []
    ends = [offset + nbytes for offset, nbytes, _ in reads]
    first_read = 0
    for position, (offset, nbytes) in enumerate(records):
        if nbytes == 0:
            continue
        end = offset + nbytes
        while first_read < len(ends) and ends[first_read] <= offset:
            first_read += 1
        covered = offset
        found: list[tuple[int, RecordSegment]] = []
        for number in range(first_read, len(reads)):
            start = reads[number].offset
            if start > covered or covered >= end:
                break
            high = min(ends[number], end)
            if high > covered:
                found.append((number, RecordSegment(covered - start, high - covered, position, covered - offset)))
                covered = high
        if covered >= end:
            checked.append(position)
            for number, check in found:
                checks[number].append(check)
    return [tuple(of_read) for of_read in checks], checked


def split_strided(shape: Sequence[int], stride: Sequence[int], *, max_span: int) -> list[TensorBlock]:
    """Splits a strided tensor into blocks that each fit into one buffer.

    Splits along the dimension with the largest stride first, so that the blocks are in file order.

    Args:
        shape: Sizes of the tensor.
        stride: Strides of the tensor in elements, none negative.
        max_span: Maximum span of a block in elements, at least 1.

    Returns:
        Blocks that cover every index exactly once, ordered by their first element. Empty for an empty tensor.

    Raises:
        ValueError: ``max_span`` is not positive.
    """
    if max_span < 1:
        raise ValueError(f"max_span must be at least 1, got {max_span}")
    if 0 in shape:
        return []
    blocks: list[TensorBlock] = []
    stack = [(tuple(0 for _ in shape), tuple(shape))]
    while stack:
        starts, sizes = stack.pop()
        span = span_elements(sizes, stride)
        if span <= max_span:
            blocks.append(TensorBlock(starts, sizes, sum(i * s for i, s in zip(starts, stride, strict=True)), span))
            continue
        axis = max((d for d in range(len(sizes)) if sizes[d] > 1), key=lambda d: stride[d])
        inner_span = span - (sizes[axis] - 1) * stride[axis]
        rows = max(1, (max_span - inner_span) // stride[axis] + 1) if inner_span <= max_span else 1
        for start in range(0, sizes[axis], rows):
            count = min(rows, sizes[axis] - start)
            stack.append(
                (
                    (*starts[:axis], starts[axis] + start, *starts[axis + 1 :]),
                    (*sizes[:axis], count, *sizes[axis + 1 :]),
                )
            )
    blocks.sort(key=lambda block: block.offset)
    return blocks
