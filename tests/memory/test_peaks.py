"""Figures that the platform does not tell stay unknown, in sums and differences too."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from lightning_memload.memory import MemoryPeaks
from lightning_memload.memory.peaks import rise, total
from lightning_memload.memory.window import larger


def make_peaks(**figures: Any) -> MemoryPeaks:
    unknown: dict[str, Any] = dict.fromkeys(field.name for field in dataclasses.fields(MemoryPeaks))
    return MemoryPeaks(**{**unknown, **figures})


@pytest.mark.parametrize(
    ("start", "later", "expected"), [(2, 5, 3), (5, 2, -3), (0, 0, 0), (None, 5, None), (5, None, None)]
)
def test_rise(start: int | None, later: int | None, expected: int | None) -> None:
    assert rise(start, later) == expected


@pytest.mark.parametrize(("parts", "expected"), [((), 0), ((1, 2, 3), 6), ((0,), 0), ((1, None), None)])
def test_total(parts: tuple[int | None, ...], expected: int | None) -> None:
    assert total(*parts) == expected


@pytest.mark.parametrize(
    ("one", "other", "expected"), [(1, 2, 2), (2, 1, 2), (None, 0, 0), (0, None, 0), (None, None, None)]
)
def test_larger(one: int | None, other: int | None, expected: int | None) -> None:
    assert larger(one, other) == expected


def test_rises_of_a_measurement() -> None:
    peaks = make_peaks(
        anonymous_start_bytes=10, anonymous_peak_bytes=25, shmem_start_bytes=1, shmem_peak_bytes=4, seconds=1.0
    )
    assert peaks.anonymous_above_start_bytes == 15
    assert peaks.host_above_start_bytes == 18
    assert make_peaks(anonymous_start_bytes=10, anonymous_peak_bytes=25).host_above_start_bytes is None
    assert make_peaks(anonymous_peak_bytes=25).anonymous_above_start_bytes is None


def test_json_brings_a_measurement_back() -> None:
    peaks = make_peaks(seconds=0.5, rss_start_bytes=3, rss_peak_is_exact=True)
    assert MemoryPeaks(**json.loads(json.dumps(peaks.as_dict()))) == peaks
