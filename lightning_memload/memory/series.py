"""The course of memory over time, in a bounded number of points.

A long measurement has more samples than a picture can show. When the points are full, two neighbours become one, and
each figure keeps the larger of its two values. So no peak is lost, only the moment at which it occurred.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["MAX_POINTS", "MemorySeries", "SeriesRecorder"]

MAX_POINTS = 2_000
_FIGURES = ("host_bytes", "file_backed_bytes", "pinned_bytes", "cuda_allocated_bytes", "cuda_reserved_bytes")
# No figure is negative, so this one stands for a figure that is not known.
_UNKNOWN = -1

Levels = Sequence[int | None]


@dataclass(frozen=True, slots=True, repr=False)
class MemorySeries:
    """Memory over time: at most 2,000 points, each with the highest levels around it.

    All sequences have the same length. Memory is in bytes. A figure that is unknown at a point is ``None`` there.

    Attributes:
        seconds: Time since the start.
        host_bytes: Anonymous memory and shmem: the memory that the machine must have.
        file_backed_bytes: Resident pages of mapped files.
        pinned_bytes: Page-locked host memory. It may be a part of ``host_bytes``.
        cuda_allocated_bytes: Memory of live tensors on the measured GPU, read every 20 ms.
        cuda_reserved_bytes: The memory that torch's allocator holds there, live tensors included.
    """

    seconds: tuple[float, ...] = ()
    host_bytes: tuple[int | None, ...] = ()
    file_backed_bytes: tuple[int | None, ...] = ()
    pinned_bytes: tuple[int | None, ...] = ()
    cuda_allocated_bytes: tuple[int | None, ...] = ()
    cuda_reserved_bytes: tuple[int | None, ...] = ()

    def __len__(self) -> int:
        return len(self.seconds)

    def __repr__(self) -> str:
        return f"MemorySeries({len(self)} points in {self.seconds[-1] if self.seconds else 0:.2f} s)"

    def __iter__(self) -> Iterator[tuple[float, Levels]]:
        """Yield each point: its time, and its figures in the order of the attributes."""
        for seconds, *levels in zip(
            self.seconds,
            self.host_bytes,
            self.file_backed_bytes,
            self.pinned_bytes,
            self.cuda_allocated_bytes,
            self.cuda_reserved_bytes,
            strict=True,
        ):
            yield seconds, levels

    def as_dict(self) -> dict[str, Any]:
        """Return every field by its name, ready for JSON. ``MemorySeries(**series.as_dict())`` restores the object."""
        return asdict(self)


class SeriesRecorder:
    """Collects the points of one :class:`MemorySeries`, in arrays of plain numbers: 96 KB when it is full.

    Args:
        width_seconds: Samples within this time become one point. Each time the points are full it doubles.
        max_points: The most points. An even number.
    """

    def __init__(self, width_seconds: float, max_points: int = MAX_POINTS) -> None:
        self.width_seconds = width_seconds
        self._max_points = max_points
        self._buckets = array("q")
        self._seconds = array("d")
        self._figures = tuple(array("q") for _ in _FIGURES)

    def add(self, seconds: float, levels: Levels) -> None:
        """Add one sample.

        Args:
            seconds: Time since the start. Never less than that of the sample before.
            levels: The figures in bytes, in the order of :class:`MemorySeries`. ``None``: unknown.
        """
        bucket = int(seconds / self.width_seconds)
        if self._buckets and self._buckets[-1] == bucket:
            for figure, level in zip(self._figures, levels, strict=True):
                if level is not None and level > figure[-1]:
                    figure[-1] = level
            return
        if len(self._buckets) == self._max_points:
            self._merge()
            self.add(seconds, levels)
            return
        self._buckets.append(bucket)
        self._seconds.append(seconds)
        for figure, level in zip(self._figures, levels, strict=True):
            figure.append(_UNKNOWN if level is None else level)

    def series(self) -> MemorySeries:
        """Return the points so far."""
        known = (tuple(None if level == _UNKNOWN else level for level in figure) for figure in self._figures)
        return MemorySeries(tuple(self._seconds), *known)

    def _merge(self) -> None:
        """Double the width of a point, so that neighbours become one."""
        points = list(self.series())
        self.width_seconds *= 2
        del self._buckets[:], self._seconds[:]
        for figure in self._figures:
            del figure[:]
        for seconds, levels in points:
            self.add(seconds, levels)
