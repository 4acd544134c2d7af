"""Optimizer states that are still on their way while training has begun.

The mirror image of a save in the background: there a step waits until its tensors are written, here until they are
filled. torch's ``load_state_dict`` gets the memory of the states at once, and a thread fills it. Until all have
arrived, ``optimizer.state`` is a :class:`WaitingStates`: a step, ``state_dict()``, a save, and every other look at a
state wait. So no code sees a value that is not the one of the file. A state that torch takes as it is stays in the file
until then, where it can be read.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch.optim import Optimizer

from lightning_memload.restore.placement import PlannedState
from lightning_memload.restore.session import Move, RestoreSession
from lightning_memload.restore.settling import Settlement
from lightning_memload.restore.side_stream import SideStream
from lightning_memload.restore.state_stream import StateStream
from lightning_memload.restore.waiting_states import WaitingStates

__all__ = ["Overlap"]


class Overlap:
    """The states of several optimizers on their way.

    A fork waits for all of them, and then the file is released: a child would inherit it.

    Args:
        session: The restore.
        stream: States that are on their way already, ``None`` if there are none.
        optimizers: All optimizers of the training. Only torch's own are known to read no state when they load it, so
            nothing overlaps if there is another one, which may wrap one of torch's.

    Attributes:
        waited_seconds: How long other code has waited for states so far.
        bytes_kept: See :meth:`RestoreSession.close`.
    """

    _pending: ClassVar[weakref.WeakSet[Overlap]] = weakref.WeakSet()

    def __init__(self, session: RestoreSession, stream: StateStream | None, optimizers: Sequence[Any]) -> None:
        self.waited_seconds = 0.0
        self.bytes_kept = 0
        self._session = session
        self._stream = stream
        self._optimizers = optimizers if all(map(_is_torchs_own, optimizers)) else ()
        self._deferred: list[Optimizer] = []
        self._sides: list[tuple[SideStream, list[Move]]] = []
        self._settlements: list[tuple[Settlement, Any]] = []
        self._releases = False
        self._waiting: list[tuple[Optimizer, WaitingStates]] = []
        self._error: Exception | None = None
        self._is_over = False
        # A signal handler that interrupts a wait may look at states too.
        self._lock = threading.RLock()

    @property
    def is_needed(self) -> bool:
        """Whether there are states that may not have arrived."""
        return bool(self._deferred) and not self._is_over

    def accepts(self, optimizer: Optimizer, planned: Sequence[PlannedState | Settlement]) -> bool:
        """Whether the states of an optimizer may arrive late, while it loads them.

        Args:
            optimizer: The optimizer.
            planned: Its states.
        """
        if self._is_over or not planned or not any(optimizer is own for own in self._optimizers):
            return False
        # torch (2.6 to 2.14) has no public name for these hooks. They would see states without values.
        if optimizer._optimizer_load_state_dict_post_hooks:
            return False
        if not all(state.is_simple for state in planned if isinstance(state, Settlement)):
            return False  # Other code may use the same memory.
        # Lightning moves states on other devices when they are loaded.
        return all(state.device in (self._session.device, torch.device("cpu")) for state in planned)

    def defer(
        self,
        optimizer: Optimizer,
        planned: Sequence[PlannedState | Settlement],
        moves: Sequence[Move],
    ) -> None:
        """Lets the states of an optimizer arrive later.

        Args:
            optimizer: The optimizer.
            planned: Its states. All have memory.
            moves: The moves of those that are not on their way yet. What is not in the file is copied now.
        """
        found = self._session.checkpoint.locate_all([move.value for move in moves])
        late = {id(move) for move, chunks in zip(moves, found, strict=True) if chunks}
        self._session.move([move for move in moves if id(move) not in late])
        left = [move for move in moves if id(move) in late]
        moved = {id(move.destination) for move in moves}
        taken = [
            Move(state.name, state.value, state.destination)
            for state in planned
            if state.destination is not None and id(state.destination) not in moved
        ]
        if taken:
            assert self._stream is not None
            self._sides.append((self._stream.side, taken))
        if left:
            self._sides.append((SideStream(self._session, lambda: left), left))
        for state in planned:
            if isinstance(state, Settlement):
                self._settlements.append((state, self._session.checkpoint.locate(state.value)))
        self._deferred.append(optimizer)

    def guard(self) -> None:
        """Makes every look at the states wait. Call it when the optimizers have been loaded."""
        guarded = {id(optimizer) for optimizer, _ in self._waiting}
        for optimizer in self._deferred:
            if id(optimizer) not in guarded and not self._is_over:
                waiting = WaitingStates(optimizer.state, self.wait)
                optimizer.state = waiting
                self._waiting.append((optimizer, waiting))
        if self.is_needed:
            self._pending.add(self)

    def begin(self) -> None:
        """Releases the file when all states have arrived. The loaded checkpoint is no longer used."""
        if self._stream is not None:
            self._stream.forget()
        self._session.free_replaced()
        with self._lock:
            self._releases = True
            if self._is_over:
                self.bytes_kept += self._session.release()

    def wait(self) -> None:
        """Waits until all states have arrived.

        Raises:
            CheckpointReadError: Reading failed. Every later call raises it again.
            ChecksumError: The file is damaged. Every later call raises it again.
        """
        if self._is_over:
            return
        since = time.perf_counter()
        with self._lock:
            if self._is_over:
                return
            if self._error is not None:
                raise self._error
            try:
                self._fill()
            except Exception as error:
                self._error = error
                raise
            finally:
                self.waited_seconds += time.perf_counter() - since
            self._end()

    def abandon(self) -> None:
        """Waits, and never raises. After an error, every look at the states still raises it."""
        if not self._deferred:
            return
        try:
            self.wait()
        except Exception:
            for side, _ in self._sides:
                side.join()

    @property
    def has_failed(self) -> bool:
        """Whether states are missing."""
        return self._error is not None

    @classmethod
    def before_fork(cls) -> None:
        """Waits for all states and releases the file: a child would inherit it, and has no threads."""
        for overlap in list(cls._pending):
            overlap.abandon()

    def _fill(self) -> None:
        for side, _ in self._sides:
            side.join()
        for side, moves in self._sides:
            if not side.is_complete:
                self._session.move(moves)
        while self._settlements:
            settlement, chunks = self._settlements[-1]
            assert settlement.destination is not None
            if self._session.checkpoint.locate(settlement.value) != chunks:
                # Code that has the tensor by another way has written to it.
                with torch.no_grad():
                    settlement.destination.copy_(settlement.value)
            settlement.end()
            self._settlements.pop()

    def _end(self) -> None:
        for optimizer, waiting in self._waiting:
            if optimizer.state is waiting:
                optimizer.state = waiting.unfilled
        self._sides.clear()
        self._waiting.clear()
        self._is_over = True
        self._pending.discard(self)
        if self._releases:
            self.bytes_kept += self._session.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=Overlap.before_fork)


def _is_torchs_own(optimizer: Any) -> bool:
    return (
        isinstance(optimizer, Optimizer)
        and f"{type(optimizer).__module__}.".startswith("torch.optim.")  # Adafactor says that it is of torch.optim
        and "load_state_dict" not in vars(optimizer)
    )
