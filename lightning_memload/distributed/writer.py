"""Ranks that wait for the one that writes, without a collective.

Some ranks may lack the callback, and a barrier would hang then. As ``Companions`` do, this uses the key-value store of
the default process group, which tells how many ranks take part, and whether the writer has ended.
"""

from __future__ import annotations

import contextlib
import time

import torch.distributed

from lightning_memload.distributed.companions import KeyValueStore, default_store

__all__ = ["Writer"]

_PRESENT = "lightning_memload/saves/present"
_BEGUN = "lightning_memload/saves/begun"
_ENDED = "lightning_memload/saves/ended"
_LIMIT_SECONDS = 1800.0
_FIRST_PAUSE_SECONDS = 0.001
_LAST_PAUSE_SECONDS = 0.1


class Writer:
    """The rank that writes checkpoints in one run, as every rank that takes part sees it.

    Raises nothing: a store that ended with its process group, or with another rank, has nothing to be told.

    Args:
        world_size: Number of ranks.
        is_here: Whether this rank writes.
    """

    def __init__(self, world_size: int, *, is_here: bool) -> None:
        self._world_size = world_size
        self._is_here = is_here
        self._store = _store() if world_size > 1 else None
        self._is_present = False
        self._number = 0

    def arrive(self) -> None:
        """Tells that this rank takes part. A barrier must follow before :meth:`knows_all_ranks` is asked."""
        with contextlib.suppress(Exception):
            if self._store is not None:
                self._store.add(_PRESENT, 1)
                self._is_present = True

    def leave(self) -> None:
        """Ends what :meth:`arrive` began, and on the rank that writes lets the others go on. Twice is fine."""
        self._tell_written()
        with contextlib.suppress(Exception):
            if self._store is not None and self._is_present:
                self._is_present = False
                self._store.add(_PRESENT, -1)

    def knows_all_ranks(self) -> bool:
        """Whether every rank takes part, as far as can be known."""
        if self._world_size == 1:
            return True
        with contextlib.suppress(Exception):
            return self._store is not None and self._store.add(_PRESENT, 0) == self._world_size
        return False

    def begin(self) -> None:
        """On the rank that writes: a save returns before it is written. A barrier must follow."""
        with contextlib.suppress(Exception):
            if self._store is not None and not self._number:
                self._number = self._store.add(_BEGUN, 1)

    def wait(self) -> None:
        """Returns on every rank when everything is written, or the rank that writes has gone.

        On the rank that writes it tells the others that this is so, and returns at once.
        """
        if self._is_here:
            self._tell_written()
            return
        with contextlib.suppress(Exception):
            number = self._store.add(_BEGUN, 0) if self._store is not None and self._is_present else 0
            if self._store is None or not number:
                return
            limit, pause = time.monotonic() + _LIMIT_SECONDS, _FIRST_PAUSE_SECONDS
            # Not the store's wait(), which holds its lock: other threads of torch need it.
            while not self._store.check([f"{_ENDED}/{number}"]) and time.monotonic() < limit:
                time.sleep(pause)
                pause = min(2 * pause, _LAST_PAUSE_SECONDS)

    def _tell_written(self) -> None:
        with contextlib.suppress(Exception):
            if self._store is not None and self._number:
                number, self._number = self._number, 0
                self._store.set(f"{_ENDED}/{number}", "")


def _store() -> KeyValueStore | None:
    """The store that all ranks share, ``None`` where there is none."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return None
    with contextlib.suppress(Exception):  # MPI has none
        return default_store()
    return None
