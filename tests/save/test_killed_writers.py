"""Writers that are killed at any moment: the newest complete checkpoint loads, and nothing piles up."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.fresh_process import run_fresh
from tests.save.save_in_process import WRITERS

PROGRAM = "tests.save.save_in_process"


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
@pytest.mark.first("format")
@pytest.mark.parametrize("format", WRITERS)
def test_a_killed_writer_leaves_the_newest_complete_checkpoint(format: str, tmp_path: Path) -> None:
    """10 kills; ``python -m tests.save.save_in_process FOLDER 200 [FORMAT]`` does more."""
    result = run_fresh(f"{PROGRAM}:kill_writers", folder=tmp_path, times=10, format=format).result
    assert result["kills"] == 10
    # A claim about kills in the middle of a save needs some there.
    assert result["in_the_middle"] >= 2
    assert result["most_left"] == 1
    WRITERS[format]({"new": torch.ones(1)}, tmp_path / "last.ckpt")
    assert os.listdir(tmp_path) == ["last.ckpt"]


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
@pytest.mark.axes("asynchronous", "format")
@pytest.mark.parametrize(
    ("asynchronous", "format"),
    [
        (True, "torch"),
        ("until_step", "torch"),
        ("until_step", "directory"),
        ("snapshot", "torch"),
        ("snapshot", "directory"),
    ],
)
def test_a_killed_training_resumes_where_stock_would_or_one_save_before(
    asynchronous: Any, format: str, tmp_path: Path
) -> None:
    """4 kills; ``python -m tests.save.save_in_process FOLDER 200 trainings until_step [FORMAT]`` does more."""
    options = {"times": 4, "asynchronous": asynchronous, "format": format}
    result = run_fresh(f"{PROGRAM}:kill_trainings", folder=tmp_path, **options).result
    assert result["kills"] == 4
    assert result["steps"] >= 8
    assert result["most_left"] <= 3
