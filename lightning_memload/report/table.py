"""The table of a restore, as text and as HTML: one row per phase, and remarks below. All memory is in GiB."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from lightning_memload.errors import listed
from lightning_memload.report.explanation import explain_host_memory
from lightning_memload.units import format_gib

if TYPE_CHECKING:
    from lightning_memload.report.restore_report import RestoreReport

__all__ = ["html_of_rows", "html_table", "text_table"]


def text_table(report: RestoreReport) -> str:
    """Return the table as text."""
    columns = _columns(report)
    widths = [max(map(len, column)) for column in columns]
    lines = [
        "  ".join([name.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))])
        for name, *cells in zip(*columns, strict=True)
    ]
    rule = "-" * len(lines[0])
    body = [*lines[1:-1], rule] if report.phases else []
    return "\n".join([lines[0], rule, *body, lines[-1], *_remarks(report)])


def html_table(report: RestoreReport) -> str:
    """Return the table as HTML, for notebooks."""
    rows = list(zip(*_columns(report), strict=True))
    return html_of_rows(rows, [f"{report.path}, {report.stage}", *_remarks(report)])


def html_of_rows(rows: Sequence[Sequence[str]], remarks: Sequence[str]) -> str:
    """Return an HTML table. The first row is its head. The remarks, in small print, follow."""
    head, *body = (
        "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in row) + "</tr>"
        for tag, row in zip(["th", *["td"] * (len(rows) - 1)], rows, strict=True)
    )
    notes = "<br>".join(escape(remark) for remark in remarks)
    return f"<table><thead>{head}</thead><tbody>{''.join(body)}</tbody></table><p><small>{notes}</small></p>"


def _columns(report: RestoreReport) -> list[list[str]]:
    """The columns of the table, each with its head."""
    phases = (*report.phases, report.total)
    columns = [
        ["restore", *(phase.name for phase in phases)],
        ["seconds", *(f"{phase.seconds:.2f}" for phase in phases)],
        ["read", *_cells([phase.bytes_read or None for phase in phases])],
        ["speed", *_cells([phase.bytes_per_second for phase in phases], after="/s")],
        ["host anonymous", *_cells([phase.peaks.anonymous_above_start_bytes for phase in phases], before="+")],
        ["GPU peak", *_cells([phase.peaks.cuda_allocated_peak_bytes for phase in phases])],
    ]
    if set(columns[-1][1:]) == {"-"}:
        columns.pop()
    return columns


def _cells(values: Sequence[float | None], *, before: str = "", after: str = "") -> list[str]:
    largest = max((value for value in values if value is not None), default=0)
    return ["-" if value is None else f"{before}{format_gib(value, like=largest)}{after}" for value in values]


def _remarks(report: RestoreReport) -> list[str]:
    """The lines below the table: where host memory went, and how the values were restored."""
    explained = explain_host_memory(report)
    return [*([f"host anonymous {explained}"] if explained else []), _mode(report)]


def _mode(report: RestoreReport) -> str:
    parts = [f"mode {report.mode} ({report.mode_reason})"]
    if report.world_size > 1:
        parts.append(f"read {report.read} ({report.read_reason})")
    if report.bytes_read_by_rank:
        read = report.bytes_read_by_rank.items()
        most, least = max(read, key=lambda item: item[1]), min(read, key=lambda item: item[1])
        parts.append(
            f"received {format_gib(report.bytes_received)} from other ranks, which read {format_gib(least[1])} "
            f"(rank {least[0]}) to {format_gib(most[1])} (rank {most[0]}) for all"
        )
    peaks = report.total.peaks
    if peaks.file_backed_above_start_bytes is not None:
        parts.append(f"file-backed +{format_gib(peaks.file_backed_above_start_bytes)}")
    if peaks.pinned_peak_bytes:
        parts.append(f"page-locked {format_gib(peaks.pinned_peak_bytes)}")
    if report.bytes_verified:
        parts.append(f"verified {format_gib(report.bytes_verified)}")
    if report.bytes_assigned:
        fate = "" if report.bytes_verified else ", not read"
        parts.append(f"assigned {format_gib(report.bytes_assigned)} of the file{fate}")
    if report.bytes_copied_ordinarily:
        parts.append(f"copied by torch {format_gib(report.bytes_copied_ordinarily)}")
    if report.waited_seconds is not None:
        parts.append(f"training waited {report.waited_seconds:.2f} s for optimizer states")
    maximum = report.maxima.get("host_anonymous_above_start")
    if maximum:
        known = report.maxima_ranks
        everyone = len(known) == report.world_size
        of = f"{len(known)} ranks" if everyone else f"ranks {listed(known)} of {report.world_size}"
        parts.append(f"most host anonymous of {of} +{format_gib(maximum.value)} on rank {maximum.rank}")
    return "; ".join(parts)
