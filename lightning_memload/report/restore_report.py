"""The report of one restore: its time and memory, as a dict, as scalars for a logger, and as a table.

Fields are in bytes, logged scalars in GiB, and the table uses the unit that fits. An unknown figure is absent, never
zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from lightning_memload.errors import listed
from lightning_memload.memory import MemoryPeaks
from lightning_memload.restore import WeightsMatch
from lightning_memload.units import format_bytes

__all__ = ["MEMORY_FIGURES", "PhaseReport", "RankMaximum", "RestoreReport"]

_GIB = 2**30

# The memory figures that are logged and reduced over ranks, and the fields of MemoryPeaks that hold them.
MEMORY_FIGURES = {
    "host_anonymous_peak": "anonymous_peak_bytes",
    "host_anonymous_above_start": "anonymous_above_start_bytes",
    "host_file_backed_peak": "file_backed_peak_bytes",
    "host_rss_peak": "rss_peak_bytes",
    "host_pinned_peak": "pinned_peak_bytes",
    "gpu_allocated_peak": "cuda_allocated_peak_bytes",
    "gpu_reserved_peak": "cuda_reserved_peak_bytes",
}


@dataclass(frozen=True, slots=True)
class PhaseReport:
    """One phase of a restore.

    Attributes:
        name: ``"open"``, ``"weights"``, ``"optimizers"``, ``"overlap"`` or ``"total"``.
        seconds: Wall time of the phase, including Lightning's own work in it.
        bytes_read: Bytes streamed from the file.
        transfer_seconds: Wall time of the streaming itself.
        peaks: Memory of the process during the phase.
    """

    name: str
    seconds: float
    bytes_read: int
    transfer_seconds: float
    peaks: MemoryPeaks

    @property
    def bytes_per_second(self) -> float | None:
        """Speed of the streaming, ``None`` if nothing was streamed."""
        return self.bytes_read / self.transfer_seconds if self.bytes_read and self.transfer_seconds else None


@dataclass(frozen=True, slots=True)
class RankMaximum:
    """The largest value of a figure over all ranks, and the rank it comes from."""

    value: int
    rank: int


@dataclass(frozen=True, slots=True)
class RestoreReport:
    """The figures of one restore.

    Attributes:
        path: The checkpoint.
        stage: The stage that the restore prepares: ``"fit"``, ``"validate"``, ``"test"`` or ``"predict"``.
        mode: ``"copy"``, ``"assign"``, or ``"default"`` if Lightning loaded the checkpoint and it is only measured.
        mode_reason: The reason for this mode, in words.
        device: The device of the module.
        global_step: The restored step, ``None`` if the checkpoint has none.
        phases: The phases, in their order in time. ``"overlap"`` begins with the training and is not part of ``total``,
            but the bytes and the transfer of ``total`` include its own.
        total: The whole restore: from the request to load the checkpoint to the start of training or evaluation. It
            begins at the callback's ``setup`` if Lightning's or another plugin's code loads the checkpoint and the
            restore is only measured. It ends with the last weight if the weights come from ``weights_from``.
        bytes_verified: Bytes whose CRC-32 was compared with the one recorded in the file.
        bytes_assigned: Bytes of parameters whose memory now is pages of the file.
        bytes_copied_ordinarily: Bytes that torch copied: only tensors of the file that were changed in memory.
        match: How the names of the checkpoint's weights match those of the module. ``None`` if all match.
        bytes_kept: Bytes of the checkpoint that other objects still refer to after the restore; they became ordinary
            memory.
        staging_bytes: Host memory of the staging ring.
        num_threads: Number of reading threads.
        rank: The rank of this process.
        world_size: Number of processes.
        read: ``"each"``: this rank has read everything itself. ``"stripes"``: the ranks have shared what they read.
        read_reason: The reason for this, in words.
        bytes_received: Bytes that other ranks have read and sent to this one.
        bytes_read_by_rank: The bytes that each rank has read and sent to the others. Empty if none has.
        waited_seconds: With ``overlap=True``: how long training waited for optimizer states. ``None`` without overlap.
        maxima: The maximum over ``maxima_ranks``, by the name of the figure. Empty for a single process.
        maxima_ranks: The ranks whose figures are known here: those that have the callback and answered in time.
    """

    path: str
    stage: str
    mode: str
    mode_reason: str
    device: str
    global_step: int | None
    phases: tuple[PhaseReport, ...]
    total: PhaseReport
    bytes_verified: int = 0
    bytes_assigned: int = 0
    bytes_copied_ordinarily: int = 0
    match: WeightsMatch | None = None
    bytes_kept: int = 0
    staging_bytes: int = 0
    num_threads: int = 0
    rank: int = 0
    world_size: int = 1
    waited_seconds: float | None = None
    read: str = "each"
    read_reason: str = "one process"
    bytes_received: int = 0
    bytes_read_by_rank: Mapping[int, int] = field(default_factory=dict)
    maxima: Mapping[str, RankMaximum] = field(default_factory=dict)
    maxima_ranks: tuple[int, ...] = ()

    def figures(self) -> dict[str, int]:
        """Return the known memory figures of the whole restore, in bytes, by name."""
        known = {name: getattr(self.total.peaks, source) for name, source in MEMORY_FIGURES.items()}
        return {name: value for name, value in known.items() if value is not None}

    def scalars(self) -> dict[str, float]:
        """Return the logged figures, ``memload/...``: memory in GiB (maximum of ``maxima_ranks``), times in seconds."""
        scalars: dict[str, float] = {"memload/seconds": self.total.seconds}
        for phase in self.phases:
            scalars[f"memload/{phase.name}_seconds"] = phase.seconds
        scalars["memload/read_gib"] = self.total.bytes_read / _GIB
        if self.bytes_received:
            scalars["memload/received_gib"] = self.bytes_received / _GIB
        if self.total.bytes_per_second is not None:
            scalars["memload/read_gib_per_second"] = self.total.bytes_per_second / _GIB
        if self.waited_seconds is not None:
            scalars["memload/waited_seconds"] = self.waited_seconds
        if self.bytes_assigned:
            scalars["memload/assigned_gib"] = self.bytes_assigned / _GIB
        for name, value in self.figures().items():
            maximum = self.maxima.get(name)
            scalars[f"memload/{name}_gib"] = (maximum.value if maximum else value) / _GIB
            if maximum:
                scalars[f"memload/{name}_rank"] = float(maximum.rank)
        if self.total.peaks.major_faults is not None:
            scalars["memload/major_faults"] = float(self.total.peaks.major_faults)
        return scalars

    def as_dict(self) -> dict[str, Any]:
        """Return all fields as plain dicts, lists and numbers for ``json``, in bytes and seconds."""
        return asdict(self)

    def table(self) -> str:
        """Return a table for people: one line per phase, with seconds, and bytes in the unit that fits each column."""
        phases = (*self.phases, self.total)
        columns = [
            ["restore", *(phase.name for phase in phases)],
            ["seconds", *(f"{phase.seconds:.2f}" for phase in phases)],
            ["read", *_column([phase.bytes_read or None for phase in phases])],
            ["speed", *_column([phase.bytes_per_second for phase in phases], after="/s")],
            ["host anonymous", *_column([phase.peaks.anonymous_above_start_bytes for phase in phases], before="+")],
            ["GPU peak", *_column([phase.peaks.cuda_allocated_peak_bytes for phase in phases])],
        ]
        if set(columns[-1][1:]) == {"-"}:
            columns.pop()
        widths = [max(map(len, column)) for column in columns]
        lines = [
            "  ".join(
                [name.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))]
            )
            for name, *cells in zip(*columns, strict=True)
        ]
        rule = "-" * len(lines[0])
        body = [*lines[1:-1], rule] if self.phases else []
        return "\n".join([lines[0], rule, *body, lines[-1], self._footer()])

    def _footer(self) -> str:
        parts = [f"mode {self.mode} ({self.mode_reason})"]
        if self.world_size > 1:
            parts.append(f"read {self.read} ({self.read_reason})")
        if self.bytes_read_by_rank:
            read = self.bytes_read_by_rank.items()
            most, least = max(read, key=lambda item: item[1]), min(read, key=lambda item: item[1])
            parts.append(
                f"received {format_bytes(self.bytes_received)} from other ranks, which read {format_bytes(least[1])} "
                f"(rank {least[0]}) to {format_bytes(most[1])} (rank {most[0]}) for all"
            )
        peaks = self.total.peaks
        if peaks.file_backed_peak_bytes is not None:
            parts.append(f"file-backed peak {format_bytes(peaks.file_backed_peak_bytes)}")
        if peaks.pinned_peak_bytes:
            parts.append(f"pinned {format_bytes(peaks.pinned_peak_bytes)}")
        if self.bytes_verified:
            parts.append(f"verified {format_bytes(self.bytes_verified)}")
        if self.bytes_assigned:
            fate = "" if self.bytes_verified else ", not read"
            parts.append(f"assigned {format_bytes(self.bytes_assigned)} of the file{fate}")
        if self.bytes_copied_ordinarily:
            parts.append(f"copied by torch {format_bytes(self.bytes_copied_ordinarily)}")
        if self.waited_seconds is not None:
            parts.append(f"training waited {self.waited_seconds:.2f} s for optimizer states")
        maximum = self.maxima.get("host_anonymous_above_start")
        if maximum:
            known = self.maxima_ranks
            of = (
                f"{len(known)} ranks"
                if len(known) == self.world_size
                else f"ranks {listed(known)} of {self.world_size}"
            )
            parts.append(f"most host anonymous of {of} +{format_bytes(maximum.value)} on rank {maximum.rank}")
        return "; ".join(parts)


def _column(values: Sequence[float | None], *, before: str = "", after: str = "") -> list[str]:
    largest = max((value for value in values if value is not None), default=0)
    return ["-" if value is None else f"{before}{format_bytes(value, like=largest)}{after}" for value in values]
