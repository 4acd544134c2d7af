"""Pictures: what they say, the same one for the same figures, and a matplotlib of the user that stays as it is."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from lightning_memload import compare_plots
from lightning_memload.memory import MemorySeries
from lightning_memload.report import RestoreReport, restore_figure
from lightning_memload.report.picture_style import PALETTES, spread
from tests.fresh_process import run_fresh
from tests.report.reports import GIB, bare_report, gpu_report

needs_matplotlib = pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib")


def series(*host: float, gpu: float | None = None, file: float | None = 0.25) -> MemorySeries:
    """Levels in GiB, 0.5 s apart."""
    number = len(host)
    return MemorySeries(
        seconds=tuple(0.5 * i for i in range(number)),
        host_bytes=tuple(int(level * GIB) for level in host),
        file_backed_bytes=(None if file is None else int(file * GIB),) * number,
        pinned_bytes=(None,) * number,
        cuda_allocated_bytes=(None if gpu is None else int(gpu * GIB),) * number,
        cuda_reserved_bytes=(None if gpu is None else int((gpu + 1) * GIB),) * number,
    )


def timed(report: RestoreReport, course: MemorySeries, **changes: Any) -> RestoreReport:
    start, phases = 0.0, []
    for phase in report.phases:
        phases.append(dataclasses.replace(phase, start_seconds=start))
        start += phase.seconds
    return dataclasses.replace(report, phases=tuple(phases), series=course, **changes)


def texts(path: Path) -> list[str]:
    """The texts of an SVG."""
    return re.findall(r"<(?:text|tspan)[^>]*>([^<]+)<", path.read_text().replace("&gt;", ">"))


@needs_matplotlib
class TestRestore:
    def test_it_names_lines_phases_and_limits(self, tmp_path: Path) -> None:
        report = timed(gpu_report(), series(0.5, 0.625, 0.5, gpu=18), budget_bytes=GIB // 8)
        report.save_plot(tmp_path / "a.svg")
        found = texts(tmp_path / "a.svg")
        assert {"open 0.03 s", "weights 0.42 s", "optimizers 0.90 s", "budget +0.125 GiB"} <= set(found)
        lines = ("anonymous + shmem", "file-backed", "allocated", "reserved")
        assert all(any(text.startswith(line) for text in found) for line in lines)
        assert "page-locked" not in " ".join(found)  # not known at any point
        assert any("last.ckpt, fit: 18.00 GiB read in 1.40 s" in text for text in found)
        assert any("1.00 GiB before -> 1.13 GiB at peak" in text for text in found)

    @pytest.mark.parametrize(("limit", "is_drawn"), [(1.0, True), (64.0, False)])
    def test_a_limit_far_above_is_not_drawn(self, tmp_path: Path, limit: float, is_drawn: bool) -> None:
        """It would press the lines to the ground."""
        report = timed(bare_report(), series(0.5, 0.75))
        peaks = dataclasses.replace(report.total.peaks, cgroup_limit_bytes=int(limit * GIB))
        report = dataclasses.replace(report, total=dataclasses.replace(report.total, peaks=peaks))
        report.save_plot(tmp_path / "a.svg")
        assert (f"limit {limit:.2f} GiB" in texts(tmp_path / "a.svg")) is is_drawn

    @pytest.mark.parametrize("theme", PALETTES)
    @pytest.mark.parametrize("name", ["a.png", "a.svg", "a.pdf"])
    def test_the_same_figures_give_the_same_picture(self, tmp_path: Path, name: str, theme: Any) -> None:
        report = timed(gpu_report(), series(0.5, 0.625, 0.5, gpu=18))
        found = []
        for folder in ("one", "two"):
            (tmp_path / folder).mkdir()
            report.save_plot(tmp_path / folder / name, theme=theme)
            found.append((tmp_path / folder / name).read_bytes())
        if name != "a.pdf":  # It has the time of its making.
            assert found[0] == found[1]
        assert found[0].startswith({"a.png": b"\x89PNG", "a.svg": b"<?xml", "a.pdf": b"%PDF"}[name])

    def test_a_name_is_no_formula(self, tmp_path: Path) -> None:
        report = timed(bare_report(path="a $x^$ b.ckpt"), series(0.5, 0.75))
        report.save_plot(tmp_path / "a.svg")
        assert any("a $x^$ b.ckpt" in text for text in texts(tmp_path / "a.svg"))

    def test_themes_differ(self, tmp_path: Path) -> None:
        report = timed(bare_report(), series(0.5, 0.75))
        for theme, palette in PALETTES.items():
            report.save_plot(tmp_path / "a.svg", theme=theme)
            assert palette.background in (tmp_path / "a.svg").read_text()

    def test_a_restore_without_points_cannot_be_drawn(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="a measurement has no points"):
            bare_report().save_plot(tmp_path / "a.png")
        unknown = MemorySeries((0.0, 1.0), *((None, None) for _ in range(5)))
        with pytest.raises(ValueError, match="this platform does not tell anonymous memory"):
            timed(bare_report(), unknown).save_plot(tmp_path / "a.png")

    def test_wrong_names_are_refused(self, tmp_path: Path) -> None:
        report = timed(bare_report(), series(0.5, 0.75))
        with pytest.raises(ValueError, match="theme must be one of 'light', 'dark', got 'blue'"):
            report.save_plot(tmp_path / "a.png", theme="blue")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="abc"):
            report.save_plot(tmp_path / "a.abc")

    def test_a_figure_can_be_drawn_in_the_users_way(self) -> None:
        figure = restore_figure(timed(gpu_report(), series(0.5, 0.625, gpu=18)))
        assert type(figure).__name__ == "Figure"
        assert len(figure.axes) == 2


@needs_matplotlib
class TestComparison:
    def test_each_line_has_its_name_and_peak(self, tmp_path: Path) -> None:
        ours = timed(bare_report(), series(0.5, 0.75))
        compare_plots({"stock": series(0.5, 18, 1), "ours": ours}, tmp_path / "a.svg", theme="dark")
        found = " ".join(texts(tmp_path / "a.svg"))
        assert "stock 1.00 s, peak 18.00 GiB" in found
        assert "ours 0.50 s, peak 0.750 GiB" in found
        assert "GPU" not in found

    def test_a_gpu_has_an_axis_of_its_own(self, tmp_path: Path) -> None:
        compare_plots({"stock": series(0.5, 18, gpu=17), "ours": series(0.5, 0.75)}, tmp_path / "a.svg")
        found = " ".join(texts(tmp_path / "a.svg"))
        assert "GPU memory, GiB" in found
        assert "stock 0.50 s, peak 17.00 GiB" in found

    @pytest.mark.parametrize("measurements", [{}, {"a": MemorySeries()}, {"a": bare_report()}], ids=["0", "1", "2"])
    def test_nothing_cannot_be_drawn(self, tmp_path: Path, measurements: Any) -> None:
        with pytest.raises(ValueError, match="no memory over time to draw"):
            compare_plots(measurements, tmp_path / "a.png")


@needs_matplotlib
def test_the_users_matplotlib_stays_as_it_is(tmp_path: Path) -> None:
    """No pyplot, no backend, no setting; and none of the user's settings in the picture."""
    result = run_fresh(
        """
import matplotlib
matplotlib.rcParams["font.size"] = 31.0
matplotlib.rcParams["text.usetex"] = True
before = dict(dict.items(matplotlib.rcParams))
from lightning_memload import compare_plots
from lightning_memload.memory import MemorySeries
series = MemorySeries((0.0, 1.0), (2**30, 2**31), (None, None), (None, None), (None, None), (None, None))
compare_plots({"a": series}, ARGS["path"])
import sys
after = dict(dict.items(matplotlib.rcParams))
RESULT = [before == after, "matplotlib.pyplot" in sys.modules, "31px" in open(ARGS["path"]).read()]
""",
        path=str(tmp_path / "a.svg"),
    ).result
    assert result == [True, False, False]


def test_without_matplotlib_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r"RestoreReport.save_plot\(\) needs matplotlib. .*memload\[plot\]"):
        timed(bare_report(), series(0.5, 0.75)).save_plot(tmp_path / "a.png")
    with pytest.raises(ModuleNotFoundError, match=r"compare_plots\(\) needs matplotlib. .*memload\[plot\]"):
        compare_plots({"a": series(0.5, 0.75)}, tmp_path / "a.png")


def test_a_report_does_not_import_matplotlib() -> None:
    program = "import lightning_memload.report, sys; RESULT = 'matplotlib' in sys.modules"
    assert run_fresh(program).result is False


@pytest.mark.parametrize(
    ("places", "moved"),
    [
        ([], []),
        ([0.2, 0.8], [0.2, 0.8]),
        ([0.5, 0.5], [0.5, 0.75]),
        ([0.9, 1.0], [0.75, 1.0]),
        ([-0.5, -0.4, 2.0], [0.0, 0.25, 1.0]),
    ],
)
def test_labels_do_not_overlap(places: list[float], moved: list[float]) -> None:
    assert spread(places, [0.25] * len(places)) == pytest.approx(moved)


@pytest.mark.parametrize("theme", PALETTES)
def test_every_colour_can_be_read(theme: Any) -> None:
    """A contrast of at least 3 to 1 for lines, of 4.5 to 1 for text, as WCAG counts it."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(one: str, other: str) -> float:
        least, most = sorted((luminance(one), luminance(other)))
        return (most + 0.05) / (least + 0.05)

    palette = PALETTES[theme]
    assert all(contrast(colour, palette.background) >= 3 for colour in palette.colours)
    assert contrast(palette.ink, palette.background) >= 4.5
    assert contrast(palette.muted, palette.background) >= 4.5
