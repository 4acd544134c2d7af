"""The report of one restore: its time and memory, as a dict, as scalars for a logger, and as a table.

Fields are in bytes, logged scalars and the table in GiB. An unknown figure is absent, never zero.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from lightning_memload.memory import MemoryPeaks, MemorySeries
from lightning_memload.report.picture_style import Theme, require_matplotlib
from lightning_memload.report.plot import restore_figure, save_figure
from lightning_memload.report.table import html_table, text_table
from lightning_memload.restore import WeightsMatch
from lightning_memload.units import format_gib

__all__ = ["MEMORY_FIGURES", "Detail", "PhaseReport", "RankMaximum", "RestoreReport"]

# How many of the figures a logger gets.
Detail = Literal["summary", "all"]
_SUMMARY = (
    "memload/seconds",
    "memload/read_gib",
    "memload/waited_seconds",
    "memload/host_anonymous_peak_gib",
    "memload/gpu_allocated_peak_gib",
)

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
        start_seconds: Time from the beginning of the restore to that of the phase. ``None``: unknown.
    """

    name: str
    seconds: float
    bytes_read: int
    transfer_seconds: float
    peaks: MemoryPeaks
    start_seconds: float | None = None

    @property
    def bytes_per_second(self) -> float | None:
        """Speed of the streaming, ``None`` if nothing was streamed."""
        return self.bytes_read / self.transfer_seconds if self.bytes_read and self.transfer_seconds else None


@dataclass(frozen=True, slots=True)
class RankMaximum:
    """The largest value of a figure over all ranks, and the rank it comes from."""

    value: int
    rank: int


@dataclass(frozen=True, slots=True, repr=False)
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
        budget_bytes: The limit of the memory for staging, ``host_budget_mib``. 0: unknown.
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
        series: Memory over time, from the beginning of the restore to its end (with ``overlap=True``: to the end of
            that phase). At most 2,000 points.
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
    series: MemorySeries = field(default_factory=MemorySeries)
    budget_bytes: int = 0

    def figures(self) -> dict[str, int]:
        """Return the known memory figures of the whole restore, in bytes, by name."""
        known = {name: getattr(self.total.peaks, source) for name, source in MEMORY_FIGURES.items()}
        return {name: value for name, value in known.items() if value is not None}

    def scalars(self, detail: Detail = "all") -> dict[str, float]:
        """Return the logged figures, ``memload/...``: memory in GiB (maximum of ``maxima_ranks``), times in seconds.

        Args:
            detail: ``"all"``, or ``"summary"``: the seconds, the bytes, the time that training waited, and the peaks of
                host and GPU memory.
        """
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
        return scalars if detail == "all" else {name: scalars[name] for name in _SUMMARY if name in scalars}

    def as_dict(self) -> dict[str, Any]:
        """Return all fields as plain dicts, lists and numbers for ``json``, in bytes and seconds."""
        return asdict(self)

    def save_plot(self, path: str | os.PathLike[str], *, theme: Theme = "light") -> None:
        """Draw memory over time, with the phases as bands, and the budget and the memory limit as lines.

        Args:
            path: The picture. The end of its name decides the format: ``.png``, ``.svg`` or ``.pdf``.
            theme: ``"light"`` or ``"dark"``.

        Raises:
            ValueError: The report has no series, or there is no such theme or format.
            ModuleNotFoundError: matplotlib is not installed. The extra ``plot`` installs it.
            OSError: The file cannot be written.
        """
        require_matplotlib("RestoreReport.save_plot()")
        save_figure(restore_figure(self, theme), path, theme)

    def table(self) -> str:
        """Return a table for people: one line per phase, with seconds, and memory in GiB. ``str(report)`` is the same.

        The first line below it tells where the host memory went: the level before, the peak, what of the rise stays
        and why, and what was temporary.
        """
        return text_table(self)

    def __str__(self) -> str:
        return self.table()

    def __repr__(self) -> str:
        read = format_gib(self.total.bytes_read)
        return f"<RestoreReport of {self.path!r}: {self.stage}, read {read} in {self.total.seconds:.2f} s>"

    def _repr_html_(self) -> str:
        """The table, in a notebook."""
        return html_table(self)
