"""What a save really cost: the figures of one save as scalars for a logger, as one line."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_memload.memory import MemoryPeaks
from lightning_memload.save import SaveStats
from lightning_memload.units import format_bytes, format_speed

__all__ = ["SaveReport"]

_GIB = 2**30


@dataclass(frozen=True, slots=True)
class SaveReport:
    """The figures of one save.

    Attributes:
        stats: What was done.
        peaks: Memory of the process from the beginning of the save to its end. Of a save in the background that is
            what training allocated meanwhile too.
        blocked_seconds: How long training waited: all of it, or in the background until everything was written.
            ``None`` where that is not known, since a thread of Lightning's saved.
        global_step: Of the saved state, ``None`` if it has none.
    """

    stats: SaveStats
    peaks: MemoryPeaks
    blocked_seconds: float | None
    global_step: int | None

    def scalars(self) -> dict[str, float]:
        """What is logged: ``memload/save_...``, memory in GiB, times in seconds."""
        stats, rise = self.stats, self.peaks.anonymous_above_start_bytes
        scalars = {
            "memload/save_seconds": stats.seconds,
            "memload/save_gib": stats.bytes_written / _GIB,
            "memload/save_gib_per_second": stats.bytes_written / _GIB / max(stats.seconds, 1e-9),
        }
        if self.blocked_seconds is not None:
            scalars["memload/save_blocked_seconds"] = self.blocked_seconds
        if stats.bytes_linked:
            scalars["memload/save_linked_gib"] = stats.bytes_linked / _GIB
        if rise is not None:
            scalars["memload/save_host_anonymous_above_start_gib"] = rise / _GIB
        return scalars

    def line(self) -> str:
        """The same for people."""
        stats, rise = self.stats, self.peaks.anonymous_above_start_bytes
        line = f"Saved {stats.path}: {format_bytes(stats.bytes_written)} in {stats.seconds:.2f} s"
        line += f", {format_speed(stats.bytes_written, stats.seconds)}"
        if stats.bytes_linked:
            line += f", {format_bytes(stats.bytes_linked)} unchanged and linked"
        if rise is not None:
            line += f", host anonymous +{format_bytes(rise)}"
        if self.blocked_seconds is not None and self.blocked_seconds < stats.seconds:
            line += f", training waited {self.blocked_seconds:.2f} s"
        return line
