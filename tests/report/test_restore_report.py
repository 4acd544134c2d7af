"""The report on fixed figures: its table to the letter, its scalars, and what is not known."""

from __future__ import annotations

import dataclasses
import json
import pickle
from typing import Any

import pytest

from lightning_memload.memory import MemoryPeaks
from lightning_memload.report import MEMORY_FIGURES, PhaseReport, RankMaximum, RestoreReport
from tests.report.reports import GIB, bare_report, gpu_report, phase


def test_table_of_a_gpu() -> None:
    assert gpu_report().table() == "\n".join(
        [
            "restore     seconds       read        speed  host anonymous   GPU peak",
            "----------------------------------------------------------------------",
            "open           0.03          -            -      +0.010 GiB          -",
            "weights        0.42   6.00 GiB  24.00 GiB/s      +0.130 GiB   6.00 GiB",
            "optimizers     0.90  12.00 GiB  24.00 GiB/s      +0.125 GiB  18.00 GiB",
            "----------------------------------------------------------------------",
            "total          1.40  18.00 GiB  24.00 GiB/s      +0.130 GiB  18.00 GiB",
            "host anonymous 1.00 GiB before -> 1.13 GiB at peak: nothing stays; 0.13 GiB temporary "
            "(0.12 GiB buffers for reading)",
            "mode copy (parameters live on cuda:0); file-backed +0.062 GiB; page-locked 0.125 GiB; verified 18.00 GiB",
        ]
    )


def cpu_phase(name: str, read: float, start: float, peak: float, end: float) -> PhaseReport:
    levels = {"anonymous_start_bytes": start, "anonymous_peak_bytes": peak, "anonymous_end_bytes": end}
    return phase(name, 1.0, int(read * GIB), 0.5, **{figure: int(level * GIB) for figure, level in levels.items()})


def explained(*phases: PhaseReport, **changes: Any) -> str:
    """The line on host memory, of a restore onto the CPU whose last phase is its total."""
    return bare_report(phases=phases[:-1], total=phases[-1], **changes).table().splitlines()[-2]


@pytest.mark.parametrize(
    ("phases", "changes", "line"),
    [
        (  # the weights had memory before
            [("weights", 1, 1.25, 1.25, 1.25), ("optimizers", 2, 1.25, 3.25, 3.25), ("total", 3, 1.25, 3.25, 3.25)],
            {},
            "1.25 GiB before -> 3.25 GiB at peak: +2.00 GiB optimizer states, which stay; 0.00 GiB temporary",
        ),
        (  # the weights had none
            [("weights", 1, 0.5, 1.5, 1.5), ("optimizers", 2, 1.5, 3.75, 3.5), ("total", 3, 0.5, 3.75, 3.5)],
            {},
            "0.50 GiB before -> 3.75 GiB at peak: +2.00 GiB optimizer states and +1.00 GiB weights, which stay; "
            "0.25 GiB temporary",
        ),
        (  # something else stays: not more is called a state than was read, and not more than there is more memory
            [("weights", 1, 0.5, 0.75, 0.75), ("optimizers", 2, 0.75, 3.5, 3.5), ("total", 3, 0.5, 3.5, 3.5)],
            {},
            "0.50 GiB before -> 3.50 GiB at peak: +2.00 GiB optimizer states and +0.25 GiB weights and "
            "+0.75 GiB other, which stay; 0.00 GiB temporary",
        ),
        (  # pages of the file are no anonymous memory
            [("weights", 1, 0.5, 0.75, 0.75), ("total", 1, 0.5, 0.75, 0.75)],
            {"bytes_assigned": GIB},
            "0.500 GiB before -> 0.750 GiB at peak: +0.250 GiB other, which stays; 0.000 GiB temporary",
        ),
        (  # on a GPU the states are elsewhere
            [("optimizers", 2, 0.5, 1.25, 0.75), ("total", 2, 0.5, 1.25, 0.75)],
            {"device": "cuda:0", "staging_bytes": GIB // 4},
            "0.50 GiB before -> 1.25 GiB at peak: +0.25 GiB other, which stays; 0.50 GiB temporary "
            "(0.25 GiB buffers for reading)",
        ),
        (  # a callback that keeps a tensor
            [("optimizers", 2, 0.5, 1.25, 1.25), ("total", 2, 0.5, 1.25, 1.25)],
            {"device": "cuda:0", "bytes_kept": GIB // 2},
            "0.50 GiB before -> 1.25 GiB at peak: +0.50 GiB tensors of the checkpoint that other code keeps and "
            "+0.25 GiB other, which stay; 0.00 GiB temporary",
        ),
        (  # states that arrive beside the training
            [("optimizers", 0, 1, 1, 1), ("overlap", 2, 1, 3.5, 3), ("total", 2, 1, 1, 1)],
            {},
            "1.00 GiB before -> 3.50 GiB at peak: +2.00 GiB optimizer states, which stay; 0.50 GiB temporary",
        ),
        (  # less than before
            [("weights", 1, 2, 2.5, 1), ("total", 1, 2, 2.5, 1)],
            {},
            "2.00 GiB before -> 2.50 GiB at peak: nothing stays; 0.50 GiB temporary",
        ),
    ],
    ids=["states", "weights", "other", "assigned", "gpu", "kept", "overlap", "less"],
)
def test_the_table_tells_where_host_memory_went(phases: Any, changes: dict[str, Any], line: str) -> None:
    assert explained(*(cpu_phase(*row) for row in phases), **changes) == f"host anonymous {line}"


def test_it_is_printed_as_its_table() -> None:
    report = gpu_report(mode_reason="a < b")
    assert str(report) == report.table()
    assert repr(report) == "<RestoreReport of 'last.ckpt': fit, read 18.00 GiB in 1.40 s>"
    html = report._repr_html_()
    assert html.count("<tr>") == 5
    assert "<td>optimizers</td><td>0.90</td>" in html
    assert "mode copy (a &lt; b)" in html


def test_a_summary_has_few_scalars() -> None:
    assert gpu_report(waited_seconds=0.5).scalars("summary") == pytest.approx(
        {
            "memload/seconds": 1.4,
            "memload/read_gib": 18.0,
            "memload/waited_seconds": 0.5,
            "memload/host_anonymous_peak_gib": 1.13,
            "memload/gpu_allocated_peak_gib": 18.0,
        }
    )
    assert set(bare_report().scalars("summary")) == {"memload/seconds", "memload/read_gib"}


def test_table_without_figures() -> None:
    assert bare_report().table() == "\n".join(
        [
            "restore  seconds  read  speed  host anonymous",
            "---------------------------------------------",
            "total       2.00     -      -               -",
            "mode default (another way of loading, only measured)",
        ]
    )


def test_table_names_the_worst_rank_and_ordinary_copies() -> None:
    report = gpu_report(
        world_size=4,
        maxima={"host_anonymous_above_start": RankMaximum(3 * GIB, 2)},
        maxima_ranks=(0, 1, 2, 3),
        bytes_copied_ordinarily=GIB,
    )
    footer = report.table().splitlines()[-1]
    assert footer.endswith("copied by torch 1.00 GiB; most host anonymous of 4 ranks +3.00 GiB on rank 2")


def test_assigned_bytes_are_in_the_table_and_logged() -> None:
    report = bare_report(mode="assign", mode_reason="as configured", bytes_assigned=3 * GIB)
    assert report.table().splitlines()[-1] == "mode assign (as configured); assigned 3.00 GiB of the file, not read"
    assert report.scalars()["memload/assigned_gib"] == 3.0
    assert "memload/assigned_gib" not in bare_report().scalars()


def test_scalars_have_their_units() -> None:
    assert gpu_report().scalars() == pytest.approx(
        {
            "memload/seconds": 1.4,
            "memload/open_seconds": 0.031,
            "memload/weights_seconds": 0.42,
            "memload/optimizers_seconds": 0.9,
            "memload/read_gib": 18.0,
            "memload/read_gib_per_second": 24.0,
            "memload/host_anonymous_peak_gib": 1.13,
            "memload/host_anonymous_above_start_gib": 0.13,
            "memload/host_file_backed_peak_gib": 0.5,
            "memload/host_rss_peak_gib": 9.0,
            "memload/host_pinned_peak_gib": 0.125,
            "memload/gpu_allocated_peak_gib": 18.0,
            "memload/gpu_reserved_peak_gib": 19.0,
            "memload/major_faults": 4.0,
        }
    )


def test_scalars_are_maxima_over_ranks() -> None:
    report = gpu_report(world_size=2, maxima={"host_anonymous_peak": RankMaximum(5 * GIB, 1)})
    scalars = report.scalars()
    assert scalars["memload/host_anonymous_peak_gib"] == 5.0
    assert scalars["memload/host_anonymous_peak_rank"] == 1.0
    # Not reduced: this rank's own.
    assert scalars["memload/host_rss_peak_gib"] == 9.0
    assert "memload/host_rss_peak_rank" not in scalars
    assert all(type(value) is float for value in scalars.values())


def test_what_is_not_known_is_absent() -> None:
    assert bare_report().scalars() == {
        "memload/seconds": 2.0,
        "memload/read_gib": 0.0,
        "memload/host_rss_peak_gib": 9.0,
    }
    assert bare_report().figures() == {"host_rss_peak": 9 * GIB}


def test_zero_is_known() -> None:
    report = bare_report(total=phase("total", 2.0, major_faults=0, cuda_allocated_peak_bytes=0))
    assert report.scalars()["memload/major_faults"] == 0.0
    assert report.scalars()["memload/gpu_allocated_peak_gib"] == 0.0


def test_every_figure_comes_from_the_peaks() -> None:
    for source in MEMORY_FIGURES.values():
        assert hasattr(MemoryPeaks, source)


@pytest.mark.parametrize("report", [gpu_report(maxima={"host_rss_peak": RankMaximum(7, 1)}), bare_report()])
def test_as_dict_is_json(report: RestoreReport) -> None:
    figures = json.loads(json.dumps(report.as_dict()))
    assert figures["total"]["peaks"]["rss_peak_bytes"] == 9 * GIB
    assert figures["global_step"] == report.global_step
    assert [phase["name"] for phase in figures["phases"]] == [phase.name for phase in report.phases]
    assert figures.keys() == {field.name for field in dataclasses.fields(RestoreReport)}


def test_report_can_be_pickled() -> None:
    assert pickle.loads(pickle.dumps(gpu_report())) == gpu_report()


def test_speed_of_nothing_is_not_known() -> None:
    assert phase("open", 1.0).bytes_per_second is None
    assert phase("open", 1.0, read=5, transfer_seconds=0.0).bytes_per_second is None
    assert phase("open", 1.0, read=6, transfer_seconds=2.0).bytes_per_second == 3.0
