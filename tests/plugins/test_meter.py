"""The meter of a restore: the bytes of each phase, and one measurement of the whole."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from lightning_memload.plugins.meter import PhaseMeter
from lightning_memload.transfer import TransferStats


@pytest.fixture
def meter() -> Iterator[PhaseMeter]:
    meter = PhaseMeter(torch.device("cpu"))
    yield meter
    meter.stop(TransferStats())
    assert not meter.total.is_running


def test_each_phase_has_its_own_part_of_the_figures(meter: PhaseMeter) -> None:
    meter.start()
    meter.begin("open", TransferStats())
    meter.begin("weights", TransferStats(bytes_read=10, seconds=1.0))
    meter.begin("optimizers", TransferStats(bytes_read=17, seconds=1.5))
    meter.stop(TransferStats(bytes_read=20, seconds=3.5))
    figures = [(phase.name, phase.bytes_read, phase.transfer_seconds) for phase in meter.reports]
    assert figures == [("open", 10, 1.0), ("weights", 7, 0.5), ("optimizers", 3, 2.0)]
    assert sum(phase.seconds for phase in meter.reports) <= meter.total.peaks.seconds


def test_a_second_stop_adds_nothing(meter: PhaseMeter) -> None:
    meter.start()
    meter.begin("open", TransferStats())
    meter.stop(TransferStats())
    meter.stop(TransferStats())
    assert [phase.name for phase in meter.reports] == ["open"]


def test_the_whole_can_start_again(meter: PhaseMeter) -> None:
    """Lightning may ask for a checkpoint twice. Only the last request counts."""
    meter.start()
    first = meter.total.peaks.seconds
    meter.start()
    assert meter.total.is_running
    assert meter.total.peaks.seconds < first + 1


def test_a_stop_without_a_start_is_no_error(meter: PhaseMeter) -> None:
    meter.stop(TransferStats())
    assert meter.reports == []


def test_the_series_goes_on_beside_the_training(meter: PhaseMeter) -> None:
    meter.start()
    meter.begin("open", TransferStats())
    meter.begin_beside("overlap", TransferStats())
    whole = meter.total.series
    meter.stop(TransferStats())
    starts = [phase.start_seconds for phase in meter.reports]
    assert 0 <= starts[0] <= starts[1]
    series = meter.series()
    # The samples of the two parts that lie within one interval are one point.
    assert whole.seconds[0] == series.seconds[0]
    assert starts[1] - meter.total.interval_seconds <= series.seconds[-1]
    assert len(series) <= 2000
