"""The cut of reads into stripes. Only integers."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_memload.distributed.stripes import (
    ALIGNMENT_BYTES,
    choose_read_bytes,
    choose_stripe_bytes,
    cut_stripes,
    digest_plan,
)


def aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


@settings(max_examples=300, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 4000), max_size=80),
    num_ranks=st.integers(1, 9),
    stripe_bytes=st.integers(8192, 40000),
)
def test_every_read_has_one_place(sizes: list[int], num_ranks: int, stripe_bytes: int) -> None:
    rounds = cut_stripes(sizes, num_ranks, stripe_bytes)
    reads: list[int] = []
    for of_round in rounds:
        assert len(of_round.stripes) == num_ranks
        longest = 0
        for stripe in of_round.stripes:
            numbers = range(stripe.first, stripe.last)
            reads += numbers
            assert len(stripe.places) == len(numbers)
            ends = [place + sizes[number] for place, number in zip(stripe.places, numbers, strict=True)]
            assert all(place % ALIGNMENT_BYTES == 0 for place in stripe.places)
            for end, place in zip(ends, stripe.places[1:], strict=False):
                assert end <= place
            longest = max([longest, *ends])
        assert longest <= of_round.nbytes <= stripe_bytes
        assert of_round.nbytes < longest + ALIGNMENT_BYTES
    assert reads == list(range(len(sizes)))
    # As few rounds as possible, but for one read in each stripe.
    room = num_ranks * (stripe_bytes - max(map(aligned, sizes), default=0))
    assert len(rounds) == -(-sum(map(aligned, sizes)) // room)


def test_ranks_read_about_the_same() -> None:
    (first, second) = cut_stripes([1024] * 100, 4, 16 << 10)
    read = [sum(r.stripes[rank].last - r.stripes[rank].first for r in (first, second)) for rank in range(4)]
    assert sum(read) == 100
    assert max(read) - min(read) <= 2


def test_more_ranks_than_reads() -> None:
    (only,) = cut_stripes([10, 10], 5, 4096)
    assert sorted(stripe.last - stripe.first for stripe in only.stripes) == [0, 0, 0, 1, 1]
    assert cut_stripes([], 5, 4096) == []


def test_a_read_that_is_too_long_is_refused() -> None:
    with pytest.raises(ValueError, match="read of 2112 bytes is too long for stripes of 4096 bytes"):
        cut_stripes([2100], 2, 4096)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8, 64, 500])
def test_two_rounds_fit_into_the_budget(num_ranks: int) -> None:
    for budget in (1 << 20, 16 << 20, 128 << 20):
        stripe = choose_stripe_bytes(budget, num_ranks)
        if stripe is None:
            assert budget / (2 * num_ranks) < (64 << 10) + 2 * ALIGNMENT_BYTES
            continue
        assert 2 * num_ranks * (stripe + ALIGNMENT_BYTES) <= budget
        assert stripe % ALIGNMENT_BYTES == 0
        assert 2 * aligned(choose_read_bytes(stripe, 1 << 20)) <= stripe
        assert choose_read_bytes(stripe, 1024) == 1024


def test_digest_tells_other_plans() -> None:
    plans = [[(0, 10), (10, 20)], [(0, 10), (10, 21)], [(0, 10)], [(10, 20), (0, 10)], []]
    digests = {digest_plan(plan, 64) for plan in plans}
    assert len(digests) == len(plans)
    assert digest_plan(plans[0], 128) not in digests
    assert digest_plan(iter(plans[0]), 64) in digests
