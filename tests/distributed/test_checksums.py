"""Checksums of records that several ranks have read together."""

from __future__ import annotations

import itertools
import json
import random
import zlib
from typing import Any

import pytest

from lightning_memload.distributed import (
    CombinedChecksum,
    PartChecksum,
    combine_parts,
    gather_checksums,
    merge_parts,
)

RECORD = random.Random(0).randbytes(1000)
WHOLE = zlib.crc32(RECORD)


def part(start: int, end: int, data: bytes = RECORD) -> PartChecksum:
    return PartChecksum(start, end - start, zlib.crc32(data[start:end]))


@pytest.mark.parametrize("seed", range(20))
def test_parts_of_any_cut_give_the_checksum_of_the_record(seed: int) -> None:
    rng = random.Random(seed)
    cuts = sorted({0, 1000, *(rng.randrange(1001) for _ in range(rng.randrange(30)))})
    parts: dict[int, list[PartChecksum]] = {}
    for start, end in itertools.pairwise(cuts):
        parts.setdefault(rng.randrange(4), []).append(part(start, end))
    for of_rank in parts.values():
        rng.shuffle(of_rank)
    expected = [CombinedChecksum(WHOLE, tuple(sorted(parts)))]
    assert combine_parts(parts, 1000) == expected
    merged = {rank: merge_parts(of_rank) for rank, of_rank in parts.items()}
    assert combine_parts(merged, 1000) == expected
    for of_rank in merged.values():
        assert all(a.start + a.nbytes < b.start for a, b in itertools.pairwise(of_rank))


def test_missing_bytes_give_nothing() -> None:
    assert combine_parts({0: [part(0, 400)], 1: [part(401, 1000)]}, 1000) == []
    assert combine_parts({0: [part(0, 400)], 1: [part(400, 999)]}, 1000) == []
    assert combine_parts({0: [part(1, 1000)]}, 1000) == []
    assert combine_parts({0: [part(0, 600)], 1: [part(400, 1000)]}, 1000) == []  # they overlap
    assert combine_parts({}, 1000) == []


def test_empty_parts_are_ignored() -> None:
    assert combine_parts({0: [part(0, 0), part(0, 1000)], 1: [part(500, 500)]}, 1000) == [CombinedChecksum(WHOLE, (0,))]


def test_same_bytes_read_by_several_ranks_count_once() -> None:
    parts = {0: [part(0, 1000)], 1: [part(0, 400), part(400, 1000)], 2: [part(400, 1000)]}
    assert combine_parts(parts, 1000) == [CombinedChecksum(WHOLE, (0, 1, 2))]


def test_one_rank_that_reads_other_bytes_is_seen() -> None:
    damaged = bytearray(RECORD)
    damaged[500] ^= 1
    parts = {0: [part(0, 1000)], 1: [part(0, 400)], 2: [part(400, 1000, bytes(damaged))]}
    found = combine_parts(parts, 1000)
    assert sorted(found) == sorted([CombinedChecksum(WHOLE, (0,)), CombinedChecksum(zlib.crc32(damaged), (1, 2))])


def test_ranks_exchange_their_parts() -> None:
    parts: list[dict[int, list[PartChecksum]]] = [
        {64: [part(0, 100), part(100, 400)], 5000: [part(0, 1000)]},
        {64: [part(400, 1000)], 9000: [part(0, 10)]},
        {},
    ]
    sent: list[Any] = []
    for of_rank in parts:
        gather_checksums(of_rank, {64: 1000, 5000: 1000, 9000: 1000}, lambda message: sent.append(message) or {})
    assert [[record, len(of_record)] for record, of_record in sent[0]] == [[64, 1], [5000, 1]]  # touching parts merged
    told = {rank: json.loads(json.dumps(message)) for rank, message in enumerate(sent)}
    found = gather_checksums(parts[0], {64: 1000, 5000: 1000, 9000: 1000}, lambda _: told)
    assert found == {64: [CombinedChecksum(WHOLE, (0, 1))], 5000: [CombinedChecksum(WHOLE, (0,))], 9000: []}
