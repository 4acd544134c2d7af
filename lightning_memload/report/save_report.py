"""The report of one save: its time and memory, as scalars for a logger and as one line of text."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_memload.memory import MemoryPeaks
from lightning_memload.report.restore_report import Detail
from lightning_memload.report.table import html_of_rows
from lightning_memload.save import SaveStats
from lightning_memload.units import format_gib

__all__ = ["SaveReport"]

_GIB = 2**30
_SUMMARY = (
    "memload/save_seconds",
    "memload/save_gib",
    "memload/save_blocked_seconds",
    "memload/save_host_anonymous_above_start_gib",
)


@dataclass(frozen=True, slots=True, repr=False)
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

    def scalars(self, detail: Detail = "all") -> dict[str, float]:
        """Return the logged figures, ``memload/save_...``: memory in GiB, times in seconds.

        Args:
            detail: ``"all"``, or ``"summary"``: the seconds, the bytes, the time that training waited, and the rise of
                host memory.
        """
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
        return scalars if detail == "all" else {name: scalars[name] for name in _SUMMARY if name in scalars}

    def __str__(self) -> str:
        return self.line()

    def __repr__(self) -> str:
        stats = self.stats
        return f"<SaveReport of {stats.path!r}: {format_gib(stats.bytes_written)} in {stats.seconds:.2f} s>"

    def _repr_html_(self) -> str:
        """The figures, in a notebook."""
        rows = [("save", ""), *((name.partition("save_")[2], f"{n:.3f}") for name, n in self.scalars().items())]
        return html_of_rows(rows, [self.line()])

    def line(self) -> str:
        """Return the figures as one line of text. ``str(report)`` is the same."""
        stats, rise = self.stats, self.peaks.anonymous_above_start_bytes
        line = f"Saved {stats.path}: {format_gib(stats.bytes_written)} in {stats.seconds:.2f} s"
        line += f", {format_gib(stats.bytes_written / max(stats.seconds, 1e-9))}/s"
        if stats.bytes_linked:
            line += f", {format_gib(stats.bytes_linked)} unchanged and linked"
        if stats.snapshot_bytes:
            line += f", snapshot of {format_gib(stats.snapshot_bytes)} in {stats.snapshot_seconds:.2f} s"
        if stats.snapshot_refusal is not None:
            line += f", no snapshot ({stats.snapshot_refusal})"
        if rise is not None:
            line += f", host anonymous +{format_gib(rise)}"
        if self.blocked_seconds is not None and self.blocked_seconds < stats.seconds:
            line += f", training waited {self.blocked_seconds:.2f} s"
        return line
