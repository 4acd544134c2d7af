"""Explains the host memory of a restore in a sentence: what was there before, what was added, and what of it stays.

Every number is measured or counted. What stays has a name where the bytes that were read, and the rise of the phase
that read them, both account for it. The rest is called "other": for example memory of libraries, of a CUDA context, or
of training that has begun.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lightning_memload.memory import MemoryPeaks
from lightning_memload.units import format_gib

if TYPE_CHECKING:
    from lightning_memload.report.restore_report import PhaseReport, RestoreReport

__all__ = ["explain_host_memory"]

_STATES = ("optimizers", "overlap")


def explain_host_memory(report: RestoreReport) -> str | None:
    """Return for example ``"1.23 GiB before -> 3.23 GiB at peak: +2.00 GiB optimizer states, which stay; ..."``.

    Returns:
        ``None`` where the platform does not tell anonymous memory.
    """
    beside = [phase.peaks for phase in report.phases if phase.name == "overlap"]
    levels = _levels([report.total.peaks, *beside])
    if levels is None:
        return None
    start, peak, end = levels
    stays, temporary = max(end - start, 0), peak - max(start, end)
    parts = [(nbytes, name) for nbytes, name in _kept(report, stays) if _is_shown(nbytes, peak)]
    added = " and ".join(f"+{format_gib(nbytes, like=peak)} {name}" for nbytes, name in parts)
    what = f"{added}, which {'stays' if parts[0][1] == 'other' else 'stay'}" if parts else "nothing stays"
    buffers = min(report.staging_bytes, temporary)
    ring = f" ({format_gib(buffers, like=peak)} buffers for reading)" if _is_shown(buffers, peak) else ""
    before = f"{format_gib(start, like=peak)} before -> {format_gib(peak, like=peak)} at peak"
    return f"{before}: {what}; {format_gib(temporary, like=peak)} temporary{ring}"


def _levels(parts: Sequence[MemoryPeaks]) -> tuple[int, int, int] | None:
    """The anonymous memory at the start, at its peak, and at the end, of measurements one after the other."""
    start, end = parts[0].anonymous_start_bytes, parts[-1].anonymous_end_bytes
    peaks = [part.anonymous_peak_bytes for part in parts if part.anonymous_peak_bytes is not None]
    return None if start is None or end is None or not peaks else (start, max(peaks), end)


def _kept(report: RestoreReport, stays: int) -> list[tuple[int, str]]:
    """The parts of the memory that stays, each with its name."""
    states = weights = 0
    if report.device == "cpu":
        states = min(_held(report.phases, _STATES), stays)
        if not report.bytes_assigned:
            weights = min(_held(report.phases, ("weights",)), stays - states)
    kept = min(report.bytes_kept, stays - states - weights)
    return [
        (states, "optimizer states"),
        (weights, "weights"),
        (kept, "tensors of the checkpoint that other code keeps"),
        (stays - states - weights - kept, "other"),
    ]


def _held(phases: Sequence[PhaseReport], names: Sequence[str]) -> int:
    """The bytes that these phases read, as far as their memory has risen from their start to their end."""
    held = 0
    for phase in phases:
        start, end = phase.peaks.anonymous_start_bytes, phase.peaks.anonymous_end_bytes
        if phase.name in names and start is not None and end is not None:
            held += max(min(phase.bytes_read, end - start), 0)
    return held


def _is_shown(nbytes: int, peak: int) -> bool:
    """Whether a number is more than 0 when it is written with the decimals of the peak."""
    return float(format_gib(nbytes, like=peak).split()[0]) > 0
