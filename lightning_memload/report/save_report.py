"""The report of one save: its time and memory, as scalars for a logger and as one line of text."""

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
        stats: Bytes and times of the save.
        peaks: Memory of the process from the beginning of the save to its end. For a save in the background this
            includes memory that training allocates in the meantime.
        blocked_seconds: The time that training waited: for the whole save or, in the background, until everything was
            written. ``None`` if it is unknown, because a thread of Lightning saved.
        global_step: The step of the saved state, ``None`` if it has none.
    """

    stats: SaveStats
    peaks: MemoryPeaks
    blocked_seconds: float | None
    global_step: int | None

    def scalars(self) -> dict[str, float]:
        """Return the logged figures, ``memload/save_...``: memory in GiB, times in seconds."""
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
        if stats.snapshot_bytes or stats.snapshot_refusal is not None:
            scalars["memload/save_snapshot_gib"] = stats.snapshot_bytes / _GIB
            scalars["memload/save_snapshot_seconds"] = stats.snapshot_seconds
        if rise is not None:
            scalars["memload/save_host_anonymous_above_start_gib"] = rise / _GIB
        return scalars

    def line(self) -> str:
        """Return the figures as one line of text."""
        stats, rise = self.stats, self.peaks.anonymous_above_start_bytes
        line = f"Saved {stats.path}: {format_bytes(stats.bytes_written)} in {stats.seconds:.2f} s"
        line += f", {format_speed(stats.bytes_written, stats.seconds)}"
        if stats.bytes_linked:
            line += f", {format_bytes(stats.bytes_linked)} unchanged and linked"
        if stats.snapshot_bytes:
            line += f", snapshot of {format_bytes(stats.snapshot_bytes)} in {stats.snapshot_seconds:.2f} s"
        if stats.snapshot_refusal is not None:
            line += f", no snapshot ({stats.snapshot_refusal})"
        if rise is not None:
            line += f", host anonymous +{format_bytes(rise)}"
        if self.blocked_seconds is not None and self.blocked_seconds < stats.seconds:
            line += f", training waited {self.blocked_seconds:.2f} s"
        return line
