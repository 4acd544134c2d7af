"""Messages between processes through a store. Threads stand for the ranks; the store is that of torch."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from torch.distributed import HashStore

from lightning_memload.distributed import Companions, LostCompanion, companions
from tests.distributed.ranks import in_ranks


def met(store: Any, world_size: int, agreeing: list[bool | None]) -> dict[int, Companions]:
    """The companions after their barrier, by rank; ``None`` for a rank that does not take part."""
    announced = {
        rank: Companions(store, rank, world_size, agrees=agrees)
        for rank, agrees in enumerate(agreeing)
        if agrees is not None
    }
    for companion in announced.values():
        companion.meet()
    return announced


@pytest.fixture
def store() -> Any:
    return HashStore()


def test_exchange_is_among_those_that_announced_themselves(store: Any) -> None:
    """No rank waits for a rank without the callback."""
    cases: list[list[bool | None]] = [[True, True, True], [None, True, False], [False, None, None], [True, True, None]]
    for agreeing in cases:
        ranks = met(store, 3, agreeing)
        told = in_ranks(lambda rank, ranks=ranks: ranks[rank].exchange({"rank": rank}), list(ranks))  # type: ignore[misc]
        assert told == [{rank: {"rank": rank} for rank in ranks}] * len(ranks)
        assert all(companion.can_agree is (agreeing == [True, True, True]) for companion in ranks.values())
        for companion in ranks.values():
            companion.leave()
            companion.leave()


def test_runs_do_not_mix(store: Any) -> None:
    for number in range(3):
        ranks = met(store, 2, [True, True])
        assert ranks[0].can_agree
        told = in_ranks(lambda rank, ranks=ranks, number=number: ranks[rank].agree(number), [0, 1])  # type: ignore[misc]
        assert told == [{0: number, 1: number}] * 2
        claims = [ranks[rank].claim("file") for rank in (1, 0)]
        assert claims == [True, False]
        in_ranks(lambda rank, ranks=ranks: ranks[rank].agree(""), [0, 1])  # type: ignore[misc]
        assert ranks[0].claim("file")
        for companion in ranks.values():
            companion.leave()
    # Where one leaves before it takes part the next run counts anew.
    assert met(store, 2, [True, None])[0].can_agree is False


@pytest.mark.parametrize("gone", [0, 1, 2])
def test_one_that_leaves_is_not_waited_for(gone: int, store: Any) -> None:
    ranks = met(store, 3, [True, True, True])
    ranks.pop(gone).leave()
    told = in_ranks(lambda rank: ranks[rank].exchange(rank), list(ranks))
    assert told == [{rank: rank for rank in ranks}] * 2


@pytest.mark.parametrize("gone", [0, 1, 2])
def test_one_that_leaves_ends_an_agreement(gone: int, store: Any) -> None:
    ranks = met(store, 3, [True, True, True])
    waiting = threading.Event()

    def work(rank: int) -> Any:
        if rank == gone:
            waiting.wait(30)
            return ranks[rank].leave()
        waiting.set()
        return ranks[rank].agree(rank)

    for rank, result in enumerate(in_ranks(work, [0, 1, 2])):
        assert rank == gone or (isinstance(result, LostCompanion) and result.ranks == (gone,)), result


def test_one_that_is_silent_is_named(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(companions, "_SILENCE_SECONDS", 0.05)
    monkeypatch.setattr(companions, "_EXCHANGE_SECONDS", 0.0)
    ranks = met(store, 2, [True, True])
    with pytest.raises(LostCompanion, match="rank 1 failed, or was silent"):
        ranks[0].agree("hello")
    assert ranks[0].exchange("hello") == {0: "hello"}


def test_signs_of_life_are_waited_for(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that reads for longer than the limit, and says so, is no lost one."""
    now = [0.0]
    monkeypatch.setattr(companions.time, "monotonic", lambda: now[0])
    first, second = met(store, 2, [True, True]).values()

    def pause(_: float) -> None:
        now[0] += 500
        if now[0] < 2000:
            second.sign()
        elif now[0] == 2000:
            store.set(second._key("round1/1"), '[1, "late"]')

    monkeypatch.setattr(companions.time, "sleep", pause)
    assert first.agree("early") == {0: "early", 1: "late"}
    with pytest.raises(LostCompanion):
        first.agree("again")
    assert now[0] == 3000


def sharing(store: Any, world_size: int) -> list[Companions]:
    """Companions that share what they read."""
    found = [Companions(store, rank, world_size, agrees=False, shares=True) for rank in range(world_size)]
    for companion in reversed(found):  # slots are not ranks
        companion.meet()
    return found


def test_only_ranks_that_all_share_can_share(store: Any) -> None:
    first, second = sharing(store, 2)
    # The first one to meet was not alone, so both know that all share.
    assert first.can_share
    assert second.can_share
    assert not first.can_agree
    for companion in (first, second):
        companion.leave()
    first, second = (Companions(store, rank, 2, agrees=True, shares=rank == 0) for rank in range(2))
    for companion in (first, second):
        companion.meet()
    assert first.can_agree
    assert not first.can_share
    assert not [thread for thread in threading.enumerate() if thread.name == "memload-signs"]


def test_live_ranks_are_seen(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(companions, "_HEARTBEAT_SECONDS", 0.01)
    first, second, third = sharing(store, 3)
    counted = threading.Event()
    monkeypatch.setattr(second, "_store", Counting(store, 5, counted))
    first.look()
    assert counted.wait(30)
    first.look()  # it has seen other counters
    third.leave("ValueError: boom")
    second.leave("OSError: later")
    with pytest.raises(LostCompanion) as lost:
        first.look()
    assert lost.value.ranks == (1, 2)
    assert first.failure() == (2, "ValueError: boom")
    with pytest.raises(LostCompanion):
        first.agree_or_notice("hello")
    first.leave()


class Counting:
    """A store that tells after some additions."""

    def __init__(self, store: Any, number: int, counted: threading.Event) -> None:
        self.store, self.left, self.counted = store, number, counted

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)

    def add(self, key: str, value: int) -> int:
        self.left -= 1
        if not self.left:
            self.counted.set()
        return int(self.store.add(key, value))


def test_a_silent_rank_is_seen(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(companions, "_HEARTBEAT_SECONDS", 1e6)
    first, second = sharing(store, 2)
    now = [0.0]
    monkeypatch.setattr(companions.time, "monotonic", lambda: now[0])
    first.look()
    now[0] = 19
    first.look()
    now[0] = 21
    with pytest.raises(LostCompanion, match="rank 1 failed, or was silent for 20 s"):
        first.look()
    second.sign()
    first.look()
    monkeypatch.setattr(companions, "_HEARTBEAT_SECONDS", 0.0)
    for companion in (first, second):
        companion.leave()


def test_a_wait_for_a_live_rank_ends(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may wait for this one at another place."""
    now = [0.0]
    monkeypatch.setattr(companions.time, "monotonic", lambda: now[0])
    first, second = sharing(store, 2)

    def pause(_: float) -> None:
        now[0] += 10
        store.add(second._key(f"sign/{second._slot}"), 1)

    monkeypatch.setattr(companions.time, "sleep", pause)
    with pytest.raises(LostCompanion):
        first.agree_or_notice("hello")
    assert 600 <= now[0] <= 620
    for companion in (first, second):
        companion.leave()


def test_a_store_that_fails_costs_no_run(store: Any) -> None:
    class Failing:
        def __init__(self) -> None:
            self.fails = False

        def __getattr__(self, name: str) -> Any:
            if self.fails:
                raise RuntimeError("Connection reset by peer")
            return getattr(store, name)

    failing = Failing()
    companion = Companions(failing, 0, 1, agrees=True)
    companion.meet()
    failing.fails = True
    assert companion.exchange("hello") == {0: "hello"}
    companion.sign()
    with pytest.raises(LostCompanion, match="rank 0"):
        companion.agree("hello")
    companion.leave()
    later = Companions(store, 0, 1, agrees=True)
    later._store = failing
    later.meet()
    assert not later.can_agree
    assert later.exchange("hello") == {0: "hello"}


def test_without_a_process_group_there_are_none() -> None:
    assert Companions.announce(agrees=True) is None


def test_the_store_of_the_default_group_is_where_torch_keeps_it() -> None:
    """It has no public name. A torch without it takes the figures of the other ranks away, no more."""
    import torch.distributed as dist

    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        companion = Companions.announce(agrees=False)
        assert companion is not None
        companion.meet()
        assert companion.exchange(7) == {0: 7}
    finally:
        dist.destroy_process_group()
