"""Chooses how several ranks read one checkpoint: each rank reads all of it, or they share what they read."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Literal

from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

from lightning_memload.checkpoint import MappedCheckpoint
from lightning_memload.distributed import Companions, LostCompanion
from lightning_memload.distributed.exchange import Exchange
from lightning_memload.errors import MemloadError, listed
from lightning_memload.restore import RestoreSession, Striping
from lightning_memload.verify import fingerprint

__all__ = ["ChosenReading", "Read", "ReadingChoice"]

Read = Literal["auto", "each", "stripes"]

_AUTOMATIC = "sharing is not chosen automatically"


@dataclass(frozen=True, slots=True)
class ChosenReading:
    """How the ranks read, and why.

    Attributes:
        name: ``"each"`` or ``"stripes"``.
        reason: The reason in words.
    """

    name: str
    reason: str


class ReadingChoice:
    """The choice of one restore. With ``"stripes"``, the ranks make it together.

    Args:
        read: The argument of the callback.
        companions: The other ranks, ``None`` for a single process or without a process group.
        obstacle: Why this rank cannot share in any case, ``None`` if it can.

    Attributes:
        striping: The sharing, ``None`` if each rank reads all.
    """

    def __init__(self, read: Read, companions: Companions | None, obstacle: str | None) -> None:
        self._companions = companions
        self._wants = read == "stripes"
        self._is_open = self._wants and obstacle is None
        self._chosen = ChosenReading("each", obstacle or (_AUTOMATIC if read == "auto" else f"as {read=} demands"))
        self.striping: Striping | None = None

    @property
    def chosen(self) -> ChosenReading:
        """How the ranks read so far."""
        if self.striping is not None and self.striping.ended is not None:
            return ChosenReading("stripes" if self.striping.bytes_read else "each", self.striping.ended)
        return self._chosen

    def choose(self, session: RestoreSession, budget_bytes: int, obstacle: str | None, *, overlaps: bool) -> None:
        """Agrees with the other ranks whether to share. Each rank has opened its checkpoint.

        Args:
            session: The restore. It gets the sharing.
            budget_bytes: Memory for the stripes of the ranks.
            obstacle: Why this rank reads its values in another way, ``None`` if it streams them.
            overlaps: Whether training was to begin before all states have arrived.

        Raises:
            MemloadError: The ranks have different checkpoints, or another rank has failed.
        """
        if not self._is_open:
            return
        path = session.checkpoint.index.path
        obstacle = obstacle or Exchange.find_obstacle(session.device)
        identity = _identity_of(session.checkpoint) if obstacle is None else None
        told = self._agree({"obstacle": obstacle, "path": path, "identity": identity})
        if told is not None and self._companions is not None and self._are_ready(told):
            self._chosen = ChosenReading("stripes", f"{len(told)} ranks have the same checkpoint")
            self.striping = session.striping = Striping(self._companions, session.device, budget_bytes, path)
        chosen = self.chosen
        rank_zero_info(f"Reading {path}: {chosen.name} ({chosen.reason})")
        if session.is_shared and overlaps:
            rank_zero_warn(
                "MemoryEfficientRestore(overlap=True) is ignored: only the thread that restores can share what it "
                "reads. Use read='each' to begin training before the states have arrived."
            )

    def decline(self) -> None:
        """Tells the other ranks that this rank restores no checkpoint, if they have not been told anything else.

        Raises:
            MemloadError: Another rank has failed.
        """
        if self._is_open:
            self._chosen = ChosenReading("each", "only the checkpoint of ckpt_path is shared")
            self._agree({"obstacle": "no checkpoint is restored", "path": "", "identity": None})

    def _agree(self, message: dict[str, Any]) -> dict[int, dict[str, Any]] | None:
        self._is_open = False
        companions = self._companions
        if companions is None or not companions.can_share:
            self._chosen = ChosenReading("each", "not every rank has read='stripes'")
            return None
        try:
            return companions.agree_or_notice(message)
        except LostCompanion as lost:
            failure = companions.failure()
            if failure is not None:
                raise MemloadError(
                    f"Rank {failure.rank} failed before the ranks restored {message['path'] or 'a checkpoint'} "
                    f"together: {failure.message}"
                ) from lost
            self._chosen = ChosenReading("each", str(lost))
            companions.leave()  # No rank may wait for this one.
            return None

    def _are_ready(self, told: dict[int, dict[str, Any]]) -> bool:
        for rank, theirs in told.items():
            if theirs["obstacle"] is not None:
                self._chosen = ChosenReading("each", f"{theirs['obstacle']} on rank {rank}")
                return False
        first = told[0]["identity"]
        others = {rank: theirs for rank, theirs in told.items() if theirs["identity"] != first}
        if not others:
            return True
        rank, theirs = next(iter(others.items()))
        second = theirs["identity"]
        if all(other["identity"]["certain"] == first["certain"] for other in others.values()):
            # Copies without checksums, written at different times.
            self._chosen = ChosenReading(
                "each", f"rank {rank} may have another file than rank 0: its time is different"
            )
            return False
        raise MemloadError(
            f"The ranks have different checkpoints. Rank 0 has {_described(told[0]['path'], first)}; rank "
            f"{listed(others)} has {_described(theirs['path'], second)}. Pass the same checkpoint on every rank, or "
            "use read='each'."
        )


def _identity_of(mapped: MappedCheckpoint) -> dict[str, Any]:
    """What tells two checkpoints apart: ``certain`` is equal for equal contents, ``time`` is needed without checksums.

    No tensor data is read.
    """
    mark = fingerprint(mapped.index.path)
    files = mapped.index.files
    newest: int | None = None
    if mark is None and all(os.path.exists(file.path) for file in files):
        newest = max((os.stat(file.path).st_mtime_ns for file in files), default=None)
    return {"certain": [mapped.index.file_size, mark], "time": newest}


def _described(path: str, identity: dict[str, Any]) -> str:
    nbytes, mark = identity["certain"]
    return f"{path} with {nbytes} bytes and " + (f"fingerprint {mark[:12]}" if mark else "no checksums")
