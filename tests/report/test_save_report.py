"""The report of a save on fixed figures: its line to the letter, its scalars, and what is not known."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from lightning_memload.memory import MemoryPeaks
from lightning_memload.report.save_report import SaveReport
from lightning_memload.save import SaveStats

GIB = 2**30


def make_report(
    *,
    linked: int = 0,
    rise: int | None = GIB // 8,
    blocked_seconds: float | None = 4.0,
    seconds: float = 4.0,
    **snapshot: Any,
) -> SaveReport:
    figures: dict[str, Any] = {field.name: 0 for field in dataclasses.fields(MemoryPeaks)}
    figures |= {"anonymous_start_bytes": 5 if rise is not None else None, "anonymous_peak_bytes": 5 + (rise or 0)}
    stats: dict[str, Any] = {field.name: 0 for field in dataclasses.fields(SaveStats)}
    stats |= {"path": "last.ckpt", "bytes_written": 6 * GIB, "bytes_linked": linked, "seconds": seconds}
    stats |= {"snapshot_refusal": None, **snapshot}
    return SaveReport(SaveStats(**stats), MemoryPeaks(**figures), blocked_seconds, 12)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({}, "Saved last.ckpt: 6.00 GiB in 4.00 s, 1.50 GiB/s, host anonymous +0.125 GiB"),
        ({"rise": None}, "Saved last.ckpt: 6.00 GiB in 4.00 s, 1.50 GiB/s"),
        (
            {"linked": GIB, "rise": None},
            "Saved last.ckpt: 6.00 GiB in 4.00 s, 1.50 GiB/s, 1.00 GiB unchanged and linked",
        ),
        (
            {"blocked_seconds": 0.25, "rise": None},
            "Saved last.ckpt: 6.00 GiB in 4.00 s, 1.50 GiB/s, training waited 0.25 s",
        ),
        ({"blocked_seconds": None, "rise": None}, "Saved last.ckpt: 6.00 GiB in 4.00 s, 1.50 GiB/s"),
        (
            {"rise": None, "blocked_seconds": 0.5, "snapshot_bytes": 6 * GIB, "snapshot_seconds": 0.25},
            "Saved last.ckpt: 6.00 GiB in 4.00 s, 1.50 GiB/s, snapshot of 6.00 GiB in 0.25 s, training waited 0.50 s",
        ),
        (
            {"rise": None, "snapshot_refusal": "3.10 GiB needed, 2.00 GiB free"},
            "Saved last.ckpt: 6.00 GiB in 4.00 s, 1.50 GiB/s, no snapshot (3.10 GiB needed, 2.00 GiB free)",
        ),
    ],
)
def test_line(options: dict[str, Any], line: str) -> None:
    assert make_report(**options).line() == line


def test_scalars() -> None:
    assert make_report(linked=GIB // 2, blocked_seconds=0.5).scalars() == {
        "memload/save_seconds": 4.0,
        "memload/save_gib": 6.0,
        "memload/save_gib_per_second": 1.5,
        "memload/save_blocked_seconds": 0.5,
        "memload/save_linked_gib": 0.5,
        "memload/save_host_anonymous_above_start_gib": 0.125,
    }


def test_a_summary_has_few_scalars() -> None:
    assert make_report(linked=GIB // 2, blocked_seconds=0.5).scalars("summary") == {
        "memload/save_seconds": 4.0,
        "memload/save_gib": 6.0,
        "memload/save_blocked_seconds": 0.5,
        "memload/save_host_anonymous_above_start_gib": 0.125,
    }
    assert set(make_report(rise=None, blocked_seconds=None).scalars("summary")) == {
        "memload/save_seconds",
        "memload/save_gib",
    }


def test_it_is_printed_as_its_line() -> None:
    report = make_report(snapshot_refusal="3 < 4")
    assert str(report) == report.line()
    assert repr(report) == "<SaveReport of 'last.ckpt': 6.00 GiB in 4.00 s>"
    html = report._repr_html_()
    assert "<td>gib_per_second</td><td>1.500</td>" in html
    assert "no snapshot (3 &lt; 4)" in html


def test_a_snapshot_that_was_refused_is_a_scalar() -> None:
    """So a logger shows that it was wanted."""
    refused = make_report(snapshot_refusal="3.10 GiB needed, 2.00 GiB free").scalars()
    assert refused["memload/save_snapshot_gib"] == 0
    taken = make_report(snapshot_bytes=GIB, snapshot_seconds=0.5).scalars()
    assert (taken["memload/save_snapshot_gib"], taken["memload/save_snapshot_seconds"]) == (1.0, 0.5)


def test_a_figure_that_is_unknown_is_no_scalar() -> None:
    """Zero would be a figure."""
    assert set(make_report(rise=None, blocked_seconds=None).scalars()) == {
        "memload/save_seconds",
        "memload/save_gib",
        "memload/save_gib_per_second",
    }


def test_a_save_that_took_no_time_has_a_speed() -> None:
    assert make_report(seconds=0.0).scalars()["memload/save_gib_per_second"] > 0
    assert "6.00 GiB in 0.00 s" in make_report(seconds=0.0).line()
