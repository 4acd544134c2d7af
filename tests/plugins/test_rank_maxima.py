"""Maxima over ranks, with the rank that has each. Threads play the ranks."""

from __future__ import annotations

from typing import Any

import pytest
from torch.distributed import HashStore

from lightning_memload.distributed import Companions, companions
from lightning_memload.plugins.rank_maxima import reduce_maxima
from lightning_memload.report import RankMaximum
from tests.distributed.ranks import in_ranks

NAMES = ["bytes", "seconds", "unknown"]
LARGE = 2**53 + 1  # a float32 or a float64 would round it


def met(world_size: int) -> list[Companions]:
    store = HashStore()
    ranks = [Companions(store, rank, world_size, agrees=True) for rank in range(world_size)]
    for rank in ranks:
        rank.meet()
    return ranks


def reduced(figures: list[dict[str, int]]) -> list[Any]:
    ranks = met(len(figures))
    return in_ranks(lambda rank: reduce_maxima(figures[rank], NAMES, rank, ranks[rank]), list(range(len(figures))))


def test_the_largest_value_and_its_rank() -> None:
    told = reduced([{"bytes": LARGE, "seconds": 0}, {"bytes": LARGE + 1, "seconds": 0}, {"bytes": 5}])
    maxima = {"bytes": RankMaximum(LARGE + 1, 1), "seconds": RankMaximum(0, 0)}
    assert told == [(maxima, (0, 1, 2))] * 3


def test_zero_is_a_figure_and_a_missing_one_is_none() -> None:
    ((maxima, ranks),) = reduced([{"seconds": 0}])
    assert maxima == {"seconds": RankMaximum(0, 0)}
    assert ranks == (0,)


def test_a_figure_that_one_rank_knows() -> None:
    told = reduced([{}, {"unknown": 3}])
    assert told == [({"unknown": RankMaximum(3, 1)}, (0, 1))] * 2


def test_a_rank_that_has_left_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(companions, "_EXCHANGE_SECONDS", 30.0)
    ranks = met(2)
    ranks[0].leave()
    assert reduce_maxima({"bytes": 7}, NAMES, 1, ranks[1]) == ({"bytes": RankMaximum(7, 1)}, (1,))
