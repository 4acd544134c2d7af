"""The plan, as integers: every byte once, nothing longer than a block, every checksum whole."""

from __future__ import annotations

import itertools
import time
import zlib
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from zlib_ng import zlib_ng

from lightning_memload.transfer.plan import (
    Read,
    TargetRange,
    complete_records,
    plan_checks,
    plan_reads,
    split_strided,
)

FILE = bytes((7 * n + n // 256) % 256 for n in range(5000))

spans = st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 900)), max_size=12)


def as_ranges(of: list[tuple[int, int]]) -> list[TargetRange]:
    return [TargetRange(number, offset, nbytes) for number, (offset, nbytes) in enumerate(of)]


class TestReads:
    @settings(max_examples=300, deadline=None)
    @given(wanted=spans, block=st.integers(1, 1500), gap=st.integers(0, 300))
    @pytest.mark.slow
    def test_every_byte_of_every_target_exactly_once(self, wanted: list[tuple[int, int]], block: int, gap: int) -> None:
        reads = plan_reads(as_ranges(wanted), block_bytes=block, max_gap_bytes=gap)
        targets = [bytearray(nbytes) for _, nbytes in wanted]
        writes = [Counter[int]() for _ in wanted]
        for read in reads:
            assert 0 < read.nbytes <= block
            data = FILE[read.offset : read.offset + read.nbytes]
            assert list(read.segments) == sorted(read.segments, key=lambda s: (s.start, s.target))
            assert read.segments[0].start == 0  # nothing unwanted at either end
            assert max(s.start + s.nbytes for s in read.segments) == read.nbytes
            for s in read.segments:
                assert s.nbytes > 0
                targets[s.target][s.target_start : s.target_start + s.nbytes] = data[s.start : s.start + s.nbytes]
                writes[s.target].update(range(s.target_start, s.target_start + s.nbytes))
        for (offset, nbytes), target, written in zip(wanted, targets, writes, strict=True):
            assert target == FILE[offset : offset + nbytes]
            assert written == Counter(range(nbytes))
        assert all(a.offset + a.nbytes <= b.offset for a, b in itertools.pairwise(reads))
        covered = [byte for read in reads for byte in range(read.offset, read.offset + read.nbytes)]
        unwanted = set(covered) - {byte for offset, nbytes in wanted for byte in range(offset, offset + nbytes)}
        runs = sum(1 for byte in unwanted if byte - 1 not in unwanted)
        assert len(unwanted) <= gap * runs

    def test_neighbours_share_a_read_and_long_tensors_are_cut(self) -> None:
        reads = plan_reads(as_ranges([(0, 10), (64, 10), (10_000, 25)]), block_bytes=100, max_gap_bytes=64)
        assert [(r.offset, r.nbytes, len(r.segments)) for r in reads] == [(0, 74, 2), (10_000, 25, 1)]
        reads = plan_reads(as_ranges([(5, 250)]), block_bytes=100)
        assert [(r.offset, r.nbytes) for r in reads] == [(5, 100), (105, 100), (205, 50)]

    @pytest.mark.parametrize(
        ("span", "block", "message"), [((0, 4), 0, "block_bytes"), ((-1, 4), 9, "negative"), ((1, -4), 9, "negative")]
    )
    def test_impossible_requests(self, span: tuple[int, int], block: int, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            plan_reads(as_ranges([span]), block_bytes=block)

    @pytest.mark.slow
    def test_a_hundred_thousand_small_targets_take_linear_time(self) -> None:
        def seconds(count: int) -> float:
            wanted = as_ranges([(192 * n, 4) for n in range(count)])
            start = time.process_time()
            reads = plan_reads(wanted, block_bytes=16 << 20)
            plan_checks(reads, [(192 * n, 4) for n in range(count)])
            return time.process_time() - start

        assert seconds(100_000) < 60 * max(seconds(5_000), 0.005)  # quadratic: 400 times


class TestChecks:
    @settings(max_examples=300, deadline=None)
    @given(wanted=spans, block=st.integers(1, 700), cuts=st.lists(st.integers(0, 4900), max_size=14))
    @pytest.mark.slow
    def test_parts_combine_to_the_whole(self, wanted: list[tuple[int, int]], block: int, cuts: list[int]) -> None:
        edges = sorted(set(cuts))
        records = [(a, b - a) for a, b in itertools.pairwise(edges)][::2]
        reads = plan_reads(as_ranges(wanted), block_bytes=block)
        self.verify(reads, records)

    @settings(max_examples=200, deadline=None)
    @given(
        reads=st.lists(st.tuples(st.integers(0, 4000), st.integers(1, 400)), max_size=14),
        cuts=st.lists(st.integers(0, 4400), max_size=10),
    )
    def test_reads_that_overlap(self, reads: list[tuple[int, int]], cuts: list[int]) -> None:
        # Pieces of strided tensors span bytes that other pieces span too.
        edges = sorted(set(cuts))
        records = [(a, b - a) for a, b in itertools.pairwise(edges)]
        self.verify([Read(offset, nbytes, ()) for offset, nbytes in sorted(reads)], records)

    @settings(max_examples=300, deadline=None)
    @given(wanted=spans, block=st.integers(1, 700), cuts=st.lists(st.integers(0, 4900), max_size=14))
    @pytest.mark.slow
    def test_reads_of_unwanted_bytes_complete_the_records(
        self, wanted: list[tuple[int, int]], block: int, cuts: list[int]
    ) -> None:
        records = [(a, b - a) for a, b in itertools.pairwise(sorted(set(cuts)))][::2]
        reads = plan_reads(as_ranges(wanted), block_bytes=block)
        others = complete_records(reads, records, block_bytes=block)
        assert all(0 < read.nbytes <= block and not read.segments for read in others)
        own = {byte for read in reads for byte in range(read.offset, read.offset + read.nbytes)}
        extra = [byte for read in others for byte in range(read.offset, read.offset + read.nbytes)]
        touched = [n for n, (offset, nbytes) in enumerate(records) if own & {*range(offset, offset + nbytes)}]
        missing = {byte for n in touched for byte in range(records[n][0], sum(records[n]))} - own
        assert sorted(extra) == sorted(missing)  # each byte once, and none besides
        everything = sorted([*reads, *others], key=lambda read: read.offset)
        assert plan_checks(everything, records)[1] == touched
        others = complete_records(reads, records, block_bytes=block, untouched=True)
        everything = sorted([*reads, *others], key=lambda read: read.offset)
        assert plan_checks(everything, records)[1] == list(range(len(records)))

    def verify(self, reads: list[Read], records: list[tuple[int, int]]) -> None:
        checks, checked = plan_checks(reads, records)
        covered = {byte for read in reads for byte in range(read.offset, read.offset + read.nbytes)}
        complete = [
            n for n, (offset, nbytes) in enumerate(records) if nbytes and covered >= set(range(offset, offset + nbytes))
        ]
        assert checked == complete  # never partially, never forgotten
        parts: dict[int, list[tuple[int, int, int]]] = {}
        for read, of_read in zip(reads, checks, strict=True):
            for check in of_read:
                assert 0 <= check.start < check.start + check.nbytes <= read.nbytes
                data = FILE[read.offset + check.start : read.offset + check.start + check.nbytes]
                parts.setdefault(check.record, []).append((check.record_start, check.nbytes, zlib.crc32(data)))
        assert sorted(parts) == checked
        for record, found in parts.items():
            offset, nbytes = records[record]
            crc, position = 0, 0
            for start, length, part in sorted(found):
                assert start == position  # no byte twice, none left out
                crc, position = zlib_ng.crc32_combine(crc, part, length), position + length
            assert (position, crc) == (nbytes, zlib.crc32(FILE[offset : offset + nbytes]))


class TestStrided:
    @settings(max_examples=300, deadline=None)
    @given(
        axes=st.lists(st.tuples(st.integers(0, 7), st.integers(0, 60)), max_size=4),
        max_span=st.integers(1, 200),
    )
    def test_every_index_exactly_once(self, axes: list[tuple[int, int]], max_span: int) -> None:
        shape, stride = tuple(size for size, _ in axes), tuple(step for _, step in axes)
        pieces = split_strided(shape, stride, max_span=max_span)
        seen = Counter[tuple[int, ...]]()
        for piece in pieces:
            assert 1 <= piece.span <= max_span
            assert piece.offset == sum(i * s for i, s in zip(piece.starts, stride, strict=True))
            for inner in itertools.product(*map(range, piece.shape)):
                seen[tuple(a + b for a, b in zip(piece.starts, inner, strict=True))] += 1
                assert sum(i * s for i, s in zip(inner, stride, strict=True)) < piece.span
        assert seen == Counter(itertools.product(*map(range, shape)))
        assert [piece.offset for piece in pieces] == sorted(piece.offset for piece in pieces)

    def test_contiguous_and_transposed_are_cut_along_the_file(self) -> None:
        for shape, stride in (((100, 50), (50, 1)), ((50, 100), (1, 50))):
            pieces = split_strided(shape, stride, max_span=500)
            assert [piece.span for piece in pieces] == [500] * 10
            assert sum(piece.span for piece in pieces) == 5000

    def test_huge_strides_cost_only_pieces(self) -> None:
        pieces = split_strided((3, 4), (1 << 60, 1), max_span=16)
        assert [(piece.offset, piece.span) for piece in pieces] == [(n << 60, 4) for n in range(3)]

    def test_no_room(self) -> None:
        with pytest.raises(ValueError, match="max_span"):
            split_strided((1,), (1,), max_span=0)
