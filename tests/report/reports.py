"""Reports of restores on fixed figures."""

from __future__ import annotations

import dataclasses
from typing import Any

from lightning_memload.memory import MemoryPeaks
from lightning_memload.report import PhaseReport, RestoreReport

__all__ = ["GIB", "bare_report", "gpu_report", "host", "phase"]

GIB = 2**30
UNKNOWN: dict[str, Any] = {
    field.name: None
    for field in dataclasses.fields(MemoryPeaks)
    if field.name not in ("seconds", "rss_start_bytes", "rss_peak_bytes", "rss_peak_is_exact", "num_samples",
                          "longest_gap_seconds")
}  # fmt: skip


def peaks(seconds: float, **figures: Any) -> MemoryPeaks:
    return MemoryPeaks(
        **{
            **UNKNOWN,
            "seconds": seconds,
            "rss_start_bytes": GIB,
            "rss_peak_bytes": 9 * GIB,
            "rss_peak_is_exact": True,
            "num_samples": 3,
            "longest_gap_seconds": 0.005,
            **figures,
        }
    )


def phase(name: str, seconds: float, read: int = 0, transfer_seconds: float = 0.0, **figures: Any) -> PhaseReport:
    return PhaseReport(name, seconds, read, transfer_seconds, peaks(seconds, **figures))


def host(rise: float) -> dict[str, int]:
    levels = {"anonymous_start_bytes": 1.0, "anonymous_peak_bytes": 1 + rise, "anonymous_end_bytes": 1.0}
    return {figure: int(level * GIB) for figure, level in levels.items()}


def gpu_report(**changes: Any) -> RestoreReport:
    figures = {
        "path": "last.ckpt",
        "stage": "fit",
        "mode": "copy",
        "mode_reason": "parameters live on cuda:0",
        "device": "cuda:0",
        "global_step": 1200,
        "phases": (
            phase("open", 0.031, **host(0.01)),
            phase("weights", 0.42, 6 * GIB, 0.25, **host(0.13), cuda_allocated_peak_bytes=6 * GIB),
            phase("optimizers", 0.9, 12 * GIB, 0.5, **host(0.125), cuda_allocated_peak_bytes=18 * GIB),
        ),
        "total": phase(
            "total",
            1.4,
            18 * GIB,
            0.75,
            **host(0.13),
            cuda_allocated_peak_bytes=18 * GIB,
            cuda_reserved_peak_bytes=19 * GIB,
            file_backed_peak_bytes=GIB // 2,
            file_backed_start_bytes=GIB // 2 - GIB // 16,
            pinned_peak_bytes=GIB // 8,
            major_faults=4,
        ),
        "bytes_verified": 18 * GIB,
        "num_threads": 8,
        "staging_bytes": GIB // 8,
    }
    return RestoreReport(**{**figures, **changes})


def bare_report(**changes: Any) -> RestoreReport:
    """Of a system that tells nothing, of a restore that was only measured."""
    figures: dict[str, Any] = {
        "path": "last.ckpt",
        "stage": "validate",
        "mode": "default",
        "mode_reason": "another way of loading, only measured",
        "device": "cpu",
        "global_step": None,
        "phases": (),
        "total": phase("total", 2.0),
    }
    return RestoreReport(**{**figures, **changes})
