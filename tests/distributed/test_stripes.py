"""The cut of reads into pieces. Only integers."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_memload.distributed.stripes import (
    ALIGNMENT_BYTES,
    choose_piece_bytes,
    choose_read_bytes,
    cut_stripes,
    digest_plan,
)


def aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


@settings(max_examples=300, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 4000), max_size=80),
    num_ranks=st.integers(1, 9),
    piece_bytes=st.integers(8192, 40000),
)
def test_every_read_has_one_place(sizes: list[int], num_ranks: int, piece_bytes: int) -> None:
    rounds = cut_stripes(sizes, num_ranks, piece_bytes)
    reads: list[int] = []
    for of_round in rounds:
        assert len(of_round.pieces) == num_ranks
        longest = 0
        for piece in of_round.pieces:
            numbers = range(piece.first, piece.last)
            reads += numbers
            assert len(piece.places) == len(numbers)
            ends = [place + sizes[number] for place, number in zip(piece.places, numbers, strict=True)]
            assert all(place % ALIGNMENT_BYTES == 0 for place in piece.places)
            for end, place in zip(ends, piece.places[1:], strict=False):
                assert end <= place
            longest = max([longest, *ends])
        assert longest <= of_round.nbytes <= piece_bytes
        assert of_round.nbytes < longest + ALIGNMENT_BYTES
    assert reads == list(range(len(sizes)))
    # As few rounds as possible, but for one read in each piece.
    room = num_ranks * (piece_bytes - max(map(aligned, sizes), default=0))
    assert len(rounds) == -(-sum(map(aligned, sizes)) // room)


def test_ranks_read_about_the_same() -> None:
    (first, second) = cut_stripes([1024] * 100, 4, 16 << 10)
    read = [sum(r.pieces[rank].last - r.pieces[rank].first for r in (first, second)) for rank in range(4)]
    assert sum(read) == 100
    assert max(read) - min(read) <= 2


def test_more_ranks_than_reads() -> None:
    (only,) = cut_stripes([10, 10], 5, 4096)
    assert sorted(piece.last - piece.first for piece in only.pieces) == [0, 0, 0, 1, 1]
    assert cut_stripes([], 5, 4096) == []


def test_a_read_that_is_too_long_is_refused() -> None:
    with pytest.raises(ValueError, match="read of 2112 bytes is too long for pieces of 4096 bytes"):
        cut_stripes([2100], 2, 4096)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8, 64, 500])
def test_two_rounds_fit_into_the_budget(num_ranks: int) -> None:
    for budget in (1 << 20, 16 << 20, 128 << 20):
        piece = choose_piece_bytes(budget, num_ranks)
        if piece is None:
            assert budget / (2 * num_ranks) < (64 << 10) + 2 * ALIGNMENT_BYTES
            continue
        assert 2 * num_ranks * (piece + ALIGNMENT_BYTES) <= budget
        assert piece % ALIGNMENT_BYTES == 0
        assert 2 * aligned(choose_read_bytes(piece, 1 << 20)) <= piece
        assert choose_read_bytes(piece, 1024) == 1024


def test_digest_tells_other_plans() -> None:
    plans = [[(0, 10), (10, 20)], [(0, 10), (10, 21)], [(0, 10)], [(10, 20), (0, 10)], []]
    digests = {digest_plan(plan, 64) for plan in plans}
    assert len(digests) == len(plans)
    assert digest_plan(plans[0], 128) not in digests
    assert digest_plan(iter(plans[0]), 64) in digests
