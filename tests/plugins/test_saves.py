"""Which saves people are told of: a run of thousands of small ones prints one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_memload.memory import MemoryMonitor
from lightning_memload.plugins.saves import SaveLog
from lightning_memload.report import SaveReport
from lightning_memload.save import SaveStats
from tests.plugins.harness import make_trainer


def told(seconds: list[float], folder: Path, caplog: pytest.LogCaptureFixture) -> list[float]:
    """The seconds of the saves that have a line, of saves that take so long."""
    with MemoryMonitor() as monitor:
        pass
    log = SaveLog(make_trainer(folder))
    lines = []
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        for number, value in enumerate(seconds):
            caplog.clear()
            stats = SaveStats(f"{number}.ckpt", 5 << 20, 0, 5 << 20, 1, value, 0.0, value, 0.0, 1, 0, True)
            log.add(SaveReport(stats, monitor.peaks, value, number))
            lines += [value] * len(caplog.records)
    return lines


@pytest.mark.parametrize(
    ("seconds", "lines"),
    [
        ([0.3] * 50, [0.3]),
        ([0.01, 0.09, 0.02, 0.09], [0.01]),  # twice of nothing
        ([0.3, 0.5, 0.7, 0.7, 1.5, 0.3], [0.3, 0.7, 1.5]),
        ([3.0, 2.0, 0.9, 2.0], [3.0, 2.0, 2.0]),
    ],
)
def test_the_first_and_the_slow_ones(
    seconds: list[float], lines: list[float], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert told(seconds, tmp_path, caplog) == lines
