"""Memory whose contents are deferred: which memory that is, and how it gets its contents when they are needed."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

import torch

from lightning_memload.restore.storages import PendingBlock, RealisedParameter, storage_of
from lightning_memload.restore.tape import Made, in_order

__all__ = ["PendingMemory"]

# Contents that were made this often are kept until the construction ends. Otherwise a model that reads many of its
# values would initialise itself again for each of them.
_MOST_MADE = 4


class PendingMemory:
    """All memory with deferred contents of the modules that are being built.

    Attributes:
        realised: The parameters that got their contents during the construction.
        is_paused: Whether operations run without being recorded.
    """

    def __init__(self) -> None:
        self.realised: list[RealisedParameter] = []
        self._pending: dict[int, PendingBlock] = {}
        self.is_paused = False

    def give_up(self, reason: str) -> None:
        """Makes all memory ordinary, and stops recording."""
        self.is_paused = True
        for pending in self.alive():
            self.realise(pending, reason)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Pauses recording within the block."""
        before, self.is_paused = self.is_paused, True
        try:
            yield
        finally:
            self.is_paused = before

    def find(self, tensor: torch.Tensor) -> PendingBlock | None:
        """The deferred contents of a tensor's memory; ``None`` if its memory is ordinary."""
        storage = storage_of(tensor)
        return None if storage is None else self._pending.get(storage._cdata)

    def alive(self) -> list[PendingBlock]:
        """All memory with deferred contents that still has references."""
        return [pending for pending in self._pending.values() if not pending.storage.expired()]

    def realise(self, pending: PendingBlock, reason: str | None = None) -> None:
        """Writes the deferred contents of memory, which is ordinary from now on.

        Args:
            pending: The memory.
            reason: Why the contents are needed, for the warning; ``None`` for no warning.
        """
        self.forget(pending)
        storage = pending.get()
        if storage is None:
            return
        if pending.owner is not None and reason is not None:
            self.realised.append(RealisedParameter(pending.owner, reason, storage.nbytes(), pending.storage))
        known, others = self._on_the_way(pending)
        pending.contents.write_to(storage, others, known)

    def _on_the_way(self, root: PendingBlock) -> tuple[Made, Made]:
        """Finds other memory that takes part when the contents of ``root`` are made.

        This avoids repeated work for a model that computes values while it is built: otherwise every value would run
        all earlier layers again. A parameter that was made several times keeps its values in memory until the end of
        the construction, and still moves to meta then.

        Returns:
            Memory that already has contents that are needed, and memory that gets its own contents on the way.
        """
        known: Made = {}
        own = root.get()
        if root.made is not None and own is not None:
            known[root.made.key] = own
        others: Made = {}
        if not root.contents.needs():
            return known, others
        needed = {item.key for item in in_order(root.contents)}
        for pending in list(self._pending.values()):
            key, made = pending.contents.key, pending.made
            storage = pending.get() if key in needed or (made is not None and made.key in needed) else None
            if storage is None:
                continue
            if made is not None and made.key in needed:
                known[made.key] = storage
            if key not in needed or key in known:
                continue
            pending.num_made += 1
            if pending.owner is None and pending.is_derived:
                self.forget(pending)
                others[key] = storage
            elif pending.owner is not None and made is None and pending.num_made >= _MOST_MADE:
                pending.made = pending.contents
                others[key] = storage
        return known, others

    def kept(self) -> list[RealisedParameter]:
        """The realised parameters that still exist."""
        if any(not item.storage.expired() for item in self.realised):
            gc.collect()  # torch.save (2.6) leaves the tensors that it saved in a reference cycle.
        self.realised = [item for item in self.realised if not item.storage.expired()]
        return self.realised

    def forget(self, pending: PendingBlock) -> None:
        """Stops recording memory that is overwritten, or whose contents a recipe holds now."""
        self._pending.pop(pending.storage.cdata, None)

    def _adopt(self, tensor: torch.Tensor, *, is_derived: bool = False) -> PendingBlock | None:
        storage = storage_of(tensor)
        if storage is None or not storage.nbytes():
            return None
        pending = self._pending[storage._cdata] = PendingBlock(storage, is_derived=is_derived)
        return pending
