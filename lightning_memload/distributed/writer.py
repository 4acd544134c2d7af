"""Lets all ranks wait for the rank that writes a checkpoint, without a collective.

A barrier would hang if some ranks lack the callback. Like ``Companions``, this uses the key-value store of the default
process group. The store holds the number of ranks that take part, and whether the writing has ended.
"""

from __future__ import annotations

import contextlib
import time

import torch.distributed

from lightning_memload.distributed.companions import KeyValueStore
from lightning_memload.torch_private import default_store

__all__ = ["WriterRank"]

_PRESENT = "lightning_memload/saves/present"
_BEGUN = "lightning_memload/saves/begun"
_ENDED = "lightning_memload/saves/ended"
_LIMIT_SECONDS = 1800.0
_FIRST_PAUSE_SECONDS = 0.001
_LAST_PAUSE_SECONDS = 0.1


class WriterRank:
    """The state of the writing rank in one run. Every rank that takes part has one object.

    No method raises: errors of a store that ended with its process group, or with another rank, are ignored.

    Args:
        world_size: Number of ranks.
        is_here: Whether this rank is the writing rank.
    """

    def __init__(self, world_size: int, *, is_here: bool) -> None:
        self._world_size = world_size
        self._is_here = is_here
        self._store = _store() if world_size > 1 else None
        self._is_present = False
        self._number = 0

    def arrive(self) -> None:
        """Registers this rank. A barrier must follow before :meth:`knows_all_ranks` is called."""
        with contextlib.suppress(Exception):
            if self._store is not None:
                self._store.add(_PRESENT, 1)
                self._is_present = True

    def leave(self) -> None:
        """Unregisters this rank. On the writing rank it also releases waiting ranks. A second call does nothing."""
        self._release_ranks()
        with contextlib.suppress(Exception):
            if self._store is not None and self._is_present:
                self._is_present = False
                self._store.add(_PRESENT, -1)

    def knows_all_ranks(self) -> bool:
        """Returns whether every rank takes part. ``False`` if this cannot be determined."""
        if self._world_size == 1:
            return True
        with contextlib.suppress(Exception):
            return self._store is not None and self._store.add(_PRESENT, 0) == self._world_size
        return False

    def begin(self) -> None:
        """Announces that a save goes on in the background. Call it on the writing rank, before a barrier."""
        with contextlib.suppress(Exception):
            if self._store is not None and not self._number:
                self._number = self._store.add(_BEGUN, 1)

    def wait(self) -> None:
        """Returns when everything is written or the writing rank has left. Gives up after 30 minutes.

        On the writing rank it releases the other ranks and returns at once. Call it there when everything is written.
        """
        if self._is_here:
            self._release_ranks()
            return
        with contextlib.suppress(Exception):
            number = self._store.add(_BEGUN, 0) if self._store is not None and self._is_present else 0
            if self._store is None or not number:
                return
            limit, pause = time.monotonic() + _LIMIT_SECONDS, _FIRST_PAUSE_SECONDS
            # Polling instead of store.wait(), which holds a lock that other torch threads need.
            while not self._store.check([f"{_ENDED}/{number}"]) and time.monotonic() < limit:
                time.sleep(pause)
                pause = min(2 * pause, _LAST_PAUSE_SECONDS)

    def _release_ranks(self) -> None:
        with contextlib.suppress(Exception):
            if self._store is not None and self._number:
                number, self._number = self._number, 0
                self._store.set(f"{_ENDED}/{number}", "")


def _store() -> KeyValueStore | None:
    """Returns the store that all ranks share, ``None`` if there is none."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return None
    with contextlib.suppress(Exception):  # MPI has no store
        store: KeyValueStore = default_store()
        return store
    return None
