"""Messages between the processes of one run, through the key-value store of the default process group.

No collective is used. A collective needs every rank: it would hang on a rank without the callback, or match another
collective of that rank. Writing a message to the store never blocks, and a reader knows which ranks it may wait for:

1. each process that takes part announces itself before a barrier that the run has anyway;
2. after that barrier each process learns whether every rank takes part, and gets a slot;
3. from then on the processes exchange small JSON messages, with a limit for each wait;
4. a process that leaves sets a key, and no other process waits for it. If it leaves because of an error, the others
   can read the error.

Processes that share what they read also use collectives, see ``exchange.py``. While they do, a thread of each process
gives signs of life, so the others notice within seconds that it was killed or stopped.

Several runs may use one store one after the other. Keys contain the number of announcements so far, which differs
between runs.
"""

from __future__ import annotations

import contextlib
import json
import math
import threading
import time
from typing import Any, NamedTuple, Protocol

import torch

from lightning_memload.torch_private import default_store

__all__ = ["Companions", "Failure", "KeyValueStore", "LostCompanion"]

_ANNOUNCED = "lightning_memload/announced"
_AGREEING = "lightning_memload/agreeing"
_SHARING = "lightning_memload/sharing"

_EXCHANGE_SECONDS = 5.0
# A rank that reads a checkpoint gives a sign of life at least this often.
_SIGN_SECONDS = 5.0
# This is also the default timeout of a collective with NCCL.
_SILENCE_SECONDS = 600.0
_FIRST_POLL_SECONDS = 0.001
_LAST_POLL_SECONDS = 0.1
# While processes share what they read, a thread gives signs of life. If they stop, the process is dead or suspended.
_HEARTBEAT_SECONDS = 0.5
_DEAD_SECONDS = 20.0
# Each process looks after this many others, so the number of requests to the store does not grow with the square.
_WATCHED = 16


class KeyValueStore(Protocol):
    """The methods of ``torch.distributed.Store`` that this package uses."""

    def add(self, key: str, value: int, /) -> int:
        """Adds to a counter, which starts at 0, and returns its new value."""
        ...

    def set(self, key: str, value: str, /) -> object:
        """Sets a value."""
        ...

    def get(self, key: str, /) -> bytes:
        """Returns the value of a key that is set."""
        ...

    def check(self, keys: list[str], /) -> bool:
        """Returns whether all keys are set, without waiting."""
        ...


class LostCompanion(Exception):
    """A rank has left the run, or has been silent for too long.

    Args:
        ranks: The ranks whose message is missing.
        silence_seconds: For how long this process has waited for a sign of life.

    Attributes:
        ranks: The argument.
    """

    def __init__(self, ranks: tuple[int, ...], silence_seconds: float = _SILENCE_SECONDS) -> None:
        super().__init__(f"rank {', '.join(map(str, ranks))} failed, or was silent for {silence_seconds:.0f} s")
        self.ranks = ranks


class Failure(NamedTuple):
    """The error with which a process has left."""

    rank: int
    message: str


class Companions:
    """The processes of one run that have announced themselves.

    Args:
        store: The key-value store that all processes of the run share.
        rank: The rank of this process.
        world_size: Number of processes of the run, including those that do not take part.
        agrees: Whether this process takes part in agreements, not only in exchanges.
        shares: Whether this process shares what it reads, which takes agreements of its own.
    """

    def __init__(self, store: KeyValueStore, rank: int, world_size: int, *, agrees: bool, shares: bool = False) -> None:
        self._store = store
        self._rank, self._world_size, self._agrees, self._shares = rank, world_size, agrees, shares
        self._run = 0
        self._slot: int | None = None
        self._rounds = 0
        self._everyone_agrees = self._everyone_shares = False
        self._has_left = False
        self._signed_at = 0.0
        self._ended = threading.Event()
        self._signing: threading.Thread | None = None
        # For each watched slot: its last counter of signs, and when it changed.
        self._seen: dict[int, tuple[int, float]] = {}
        self._store.add(_ANNOUNCED, 1)
        self._store.add(_AGREEING, int(agrees))
        self._store.add(_SHARING, int(shares))

    @classmethod
    def announce(cls, *, agrees: bool, shares: bool = False) -> Companions | None:
        """Announces this process to the others of its default process group.

        Returns:
            The companions. ``None`` if there is no process group, or it has no usable store.
        """
        if not torch.distributed.is_available() or not torch.distributed.is_initialized():
            return None
        rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        # MPI has no store. Errors are ignored: a missing message must not fail the run.
        with contextlib.suppress(Exception):
            return cls(default_store(), rank, world_size, agrees=agrees, shares=shares)
        return None

    def meet(self) -> None:
        """Counts the processes that take part. Call it after a barrier that follows all announcements of the run."""
        with contextlib.suppress(Exception):
            self._run = self._store.add(_ANNOUNCED, 0)
            self._everyone_agrees = self._store.add(_AGREEING, 0) == self._world_size
            self._everyone_shares = self._store.add(_SHARING, 0) == self._world_size
            slot = self._store.add(self._key("slots"), 1) - 1
            self._store.set(self._key(f"rank/{slot}"), str(self._rank))
            self._slot = slot
        if self.can_share:
            # Ends with leave(). A daemon: it must not keep a process alive that ends without.
            self._signing = threading.Thread(target=self._give_signs, name="memload-signs", daemon=True)
            # If no thread can be started, only waits for other ranks give signs.
            with contextlib.suppress(RuntimeError):
                self._signing.start()

    @property
    def can_agree(self) -> bool:
        """Whether every rank of the run takes part in agreements. The same on all ranks, unless a rank fails."""
        return self._everyone_agrees and self._slot is not None

    @property
    def can_share(self) -> bool:
        """Whether every rank of the run shares what it reads. The same on all ranks, unless a rank fails."""
        return self._everyone_shares and self._slot is not None

    @property
    def rank(self) -> int:
        """The rank of this process."""
        return self._rank

    @property
    def world_size(self) -> int:
        """Number of processes of the run."""
        return self._world_size

    def agree(
        self, message: Any, *, silence_seconds: float | None = None, limit_seconds: float | None = None
    ) -> dict[int, Any]:
        """Sends a message to all ranks and waits for their messages. Every rank must call it equally often.

        Args:
            message: Any value that JSON can represent.
            silence_seconds: The longest time without a sign of life. ``None``: ten minutes.
            limit_seconds: The longest wait. ``None``: no limit as long as each rank gives signs of life.

        Returns:
            The messages of all ranks, by rank. Equal on every rank.

        Raises:
            LostCompanion: A rank has left, was silent for so long, or has sent no message within the limit.
        """
        assert self.can_agree or self.can_share
        silence = _SILENCE_SECONDS if silence_seconds is None else silence_seconds
        self._rounds += 1
        try:
            deadline = None if limit_seconds is None else time.monotonic() + limit_seconds
            told = self._gather(f"round{self._rounds}", message, self._world_size, deadline=deadline, silence=silence)
        except Exception as error:
            raise LostCompanion((0,), silence) from error  # the process of rank 0 holds the store
        missing = tuple(sorted(set(range(self._world_size)) - set(told)))
        if missing:
            raise LostCompanion(missing, silence)
        return told

    def agree_or_notice(self, message: Any) -> dict[int, Any]:
        """Does what :meth:`agree` does, among processes that share, and notices within seconds that one is dead.

        A live process may wait for this one at another place, so the wait ends after ten minutes in any case.
        """
        return self.agree(message, silence_seconds=_DEAD_SECONDS, limit_seconds=_SILENCE_SECONDS)

    def look(self, silence_seconds: float | None = None) -> None:
        """Looks for ranks that have stopped, among processes that share. Call it about once a second while waiting.

        Args:
            silence_seconds: The longest time without a sign of life. ``None``: 20 seconds.

        Raises:
            LostCompanion: A rank has left or is silent.
        """
        silence_seconds = _DEAD_SECONDS if silence_seconds is None else silence_seconds
        assert self._slot is not None
        lost: list[int] = []
        now = time.monotonic()
        try:
            for distance in range(1, min(_WATCHED + 1, self._world_size)):
                slot = (self._slot + distance) % self._world_size
                if self._store.check([self._key(f"left/{slot}")]):
                    lost.append(self._rank_of(slot))
                    continue
                signs = self._store.add(self._key(f"sign/{slot}"), 0)
                known, since = self._seen.get(slot, (-1, now))
                if signs != known:
                    self._seen[slot] = (signs, now)
                elif now - since > silence_seconds:
                    lost.append(self._rank_of(slot))
            failure = self.failure()
        except Exception as error:
            raise LostCompanion((0,), silence_seconds) from error
        if failure is not None and failure.rank != self._rank:
            lost.append(failure.rank)
        if lost:
            raise LostCompanion(tuple(sorted(set(lost))), silence_seconds)

    def failure(self) -> Failure | None:
        """The first error with which a process of this run has left, ``None`` if none has."""
        with contextlib.suppress(Exception):
            if self._store.check([self._key("failure")]):
                return Failure(*json.loads(self._store.get(self._key("failure"))))
        return None

    def claim(self, name: str) -> bool:
        """Claims a piece of work. Returns whether this process is the first of all ranks since the last agreement.

        Raises:
            LostCompanion: The store is gone.
        """
        try:
            return self._store.add(self._key(f"claim{self._rounds}/{name}"), 1) == 1
        except Exception as error:
            raise LostCompanion((0,)) from error

    def sign(self, *_: object) -> None:
        """Gives a sign of life. May be called from any thread, and is cheap enough to call after every read."""
        now = time.monotonic()
        if now - self._signed_at > _SIGN_SECONDS:
            self._signed_at = now
            with contextlib.suppress(Exception):
                self._store.add(self._key(f"sign/{self._slot}"), 1)

    def exchange(self, message: Any) -> dict[int, Any]:
        """Sends a message to all companions and collects their messages, for some seconds at most.

        Call it once in a run, after a barrier that follows :meth:`meet`. Never raises.

        Returns:
            The messages by rank, in the order of ranks: of this rank and of all ranks that answered in time.
        """
        if self._slot is not None:
            with contextlib.suppress(Exception):
                slots = self._store.add(self._key("slots"), 0)
                return self._gather("exchange", message, slots, deadline=time.monotonic() + _EXCHANGE_SECONDS)
        return {self._rank: message}

    def leave(self, failure: str | None = None) -> None:
        """Leaves the companions. From then on none of them waits for this process. A second call does nothing.

        Args:
            failure: The error that ends this process, for the others. ``None`` if there is none.
        """
        if self._has_left:
            return
        self._has_left = True
        self._ended.set()
        if self._signing is not None:
            with contextlib.suppress(RuntimeError):
                self._signing.join(_HEARTBEAT_SECONDS)
        with contextlib.suppress(Exception):
            self._store.add(_AGREEING, -int(self._agrees))
            self._store.add(_SHARING, -int(self._shares))
            if self._slot is not None:
                if failure is not None and self._store.add(self._key("failures"), 1) == 1:
                    self._store.set(self._key("failure"), json.dumps([self._rank, failure]))
                self._store.set(self._key(f"left/{self._slot}"), "")

    # --------------------------------------------------------------------------------------------------------------

    def _key(self, name: str) -> str:
        return f"lightning_memload/{self._run}/{name}"

    def _rank_of(self, slot: int) -> int:
        return int(self._store.get(self._key(f"rank/{slot}")))

    def _give_signs(self) -> None:
        with contextlib.suppress(Exception):  # The store is gone: its process notices nothing any more.
            while not self._ended.wait(_HEARTBEAT_SECONDS):
                self._store.add(self._key(f"sign/{self._slot}"), 1)

    def _gather(
        self, topic: str, message: Any, slots: int, *, deadline: float | None, silence: float | None = None
    ) -> dict[int, Any]:
        """Sends a message and collects those of all slots.

        The first live slot reads all messages and publishes them under one key. So every other process reads one key,
        not one for each rank.
        """
        self._store.set(self._key(f"{topic}/{self._slot}"), json.dumps([self._rank, message]))
        for leader in range(slots):
            if leader == self._slot:
                heard = [self._receive(f"{topic}/{slot}", slot, deadline, silence) for slot in range(slots)]
                told = sorted((item for item in heard if item is not None), key=lambda item: item[0])
                self._store.set(self._key(f"{topic}/all"), json.dumps(told))
                return dict(told)
            # If the leader leaves before it has published them, the next slot becomes the leader. The leader itself
            # waits until the deadline, so the others wait one second longer.
            told = self._receive(f"{topic}/all", leader, None if deadline is None else deadline + 1, silence)
            if told is not None:
                return dict(told)
        return {self._rank: message}

    def _receive(self, name: str, slot: int, deadline: float | None, silence: float | None) -> Any:
        """Waits for a message of a slot. ``None`` if the slot has left, is silent for too long, or missed the deadline.

        ``None`` for a limit means that there is none.
        """
        key, left, sign = self._key(name), self._key(f"left/{slot}"), self._key(f"sign/{slot}")
        last = math.inf if deadline is None else deadline
        limit = math.inf if silence is None else time.monotonic() + silence
        pause, signs = _FIRST_POLL_SECONDS, 0
        # Polling instead of store.wait(), which cannot be interrupted and holds a lock that other torch threads need.
        while not self._store.check([key]):
            if self._store.check([left]):
                if self._store.check([key]):
                    break
                return None
            if silence is not None:
                self.sign()
                seen = self._store.add(sign, 0)
                if seen != signs:
                    signs, limit = seen, time.monotonic() + silence
            if time.monotonic() > min(limit, last):
                return None
            time.sleep(pause)
            pause = min(2 * pause, _LAST_POLL_SECONDS)
        return json.loads(self._store.get(key))
