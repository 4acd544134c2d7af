"""The plan of a resume: its formulas on small files, and its figures beside measured peaks of fresh processes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_memload import CheckpointFormatError, PlannedWay, plan_resume
from tests.formats.dcp_shards import sharded, write_shards
from tests.fresh_process import run_fresh

MIB = 1 << 20
PROGRAM = "tests.memory.restore_in_process"
# W is 96 MiB, the checkpoint 288 MiB.
WIDTHS = [2048, 5120, 2600, 450]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    tied = torch.ones(1000)
    state = {
        "state_dict": {"a": tied, "b": tied, "c": torch.ones(50)},
        "optimizer_states": [{"state": {0: {"x": torch.ones(2000)}}}, {"state": {0: {"x": torch.ones(100)}}}],
        "callbacks": {"mine": torch.ones(10)},
    }
    torch.save(state, tmp_path / "last.ckpt")
    return tmp_path / "last.ckpt"


def rows(path: Path, **options: Any) -> list[tuple[Any, ...]]:
    ways = plan_resume(path, **options).ways
    return [(w.name, w.meta_init, w.host_bytes, w.kept_bytes, w.file_bytes, w.device_bytes) for w in ways]


def test_formulas(checkpoint: Path) -> None:
    weights, states, others = 4200, 8400, 40
    plan = plan_resume(checkpoint)
    assert (plan.weight_bytes, plan.optimizer_bytes, plan.tensor_bytes) == (weights, states, weights + states + others)
    everything = weights + states + others
    assert rows(checkpoint) == [
        ("stock", False, weights + everything, everything, 0, 0),
        ("copy", False, everything, everything, 0, 0),
        ("copy", True, everything, everything, 0, 0),
    ]
    assert rows(checkpoint, stage="validate") == [
        ("stock", False, weights + everything, weights, 0, 0),
        ("copy", False, weights, weights, 0, 0),
        ("copy", True, weights, weights, 0, 0),
        ("assign", True, 0, 0, weights, 0),
    ]
    staging = weights + states  # less than the budget
    assert rows(checkpoint, device="cuda") == [
        ("stock", False, weights + everything, others, 0, weights + states),
        ("copy", False, weights + others + staging, others, 0, weights + states),
        ("copy", True, others + staging, others, 0, weights + states),
    ]


def test_what_fits(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for free, expected in ((20_000, True), (13_000, None), (5_000, False), (None, None)):
        monkeypatch.setattr("lightning_memload.forecast.resume_plan.available_host_bytes", lambda free=free: free)
        stock, copy, meta = (way.fits for way in plan_resume(checkpoint).ways)
        assert copy == meta
        assert (stock, copy) == {20_000: (True, True), 13_000: (False, True)}.get(free or 0, (expected, expected))


def test_formats_that_lightning_cannot_read(tmp_path: Path) -> None:
    write_shards(tmp_path / "shards", {"weight": sharded(torch.ones(100), 2)})
    assert [name for name, *_ in rows(tmp_path / "shards", stage="validate")] == ["copy", "copy"]


def test_what_cannot_be_planned(tmp_path: Path, checkpoint: Path) -> None:
    (tmp_path / "text").write_text("hello")
    with pytest.raises(CheckpointFormatError):
        plan_resume(tmp_path / "text")
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"device": "tpu"}, "device must be 'cpu' or 'cuda', got 'tpu'"),
        ({"stage": "save"}, "stage must be 'fit' or 'validate', got 'save'"),
    ]
    for options, message in wrong:
        with pytest.raises(ValueError, match=message):
            plan_resume(checkpoint, **options)


@pytest.mark.memory
@pytest.mark.skipif(sys.platform != "linux", reason="anonymous memory is known on Linux only")
def test_the_plan_is_what_is_measured(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """The predicted peak and what stays are within 5 % or 8 MiB of the measured ones. --all takes all ways."""
    path = write(tmp_path, WIDTHS)
    for stage in ("fit", "validate"):
        for way in plan_resume(path, stage=stage).ways:
            is_chosen = way.meta_init and (way.name, stage) in (("copy", "fit"), ("assign", "validate"))
            if is_chosen or request.config.getoption("--all"):
                assert_measured(path, WIDTHS, stage, way)


@pytest.mark.memory
@pytest.mark.skipif(sys.platform != "linux", reason="anonymous memory is known on Linux only")
@pytest.mark.long
def test_many_small_tensors_are_read_as_a_whole(tmp_path: Path) -> None:
    widths = [100] * 201  # 1,600 tensors of 24 MiB
    path = write(tmp_path, widths)
    _, copy, meta = plan_resume(path).ways
    assert copy.host_bytes == meta.host_bytes + path.stat().st_size
    assert_measured(path, widths, "fit", copy)


def write(folder: Path, widths: list[int]) -> Path:
    run_fresh(f"{PROGRAM}:write", folder=folder, widths=widths, dtypes={"last.ckpt": "float32"})
    return folder / "last.ckpt"


def assert_measured(path: Path, widths: list[int], stage: str, way: PlannedWay) -> None:
    mode = None if way.name == "stock" else way.name
    arguments: dict[str, Any] = {"path": path, "widths": widths, "stage": stage, "mode": mode}
    result = run_fresh(f"{PROGRAM}:measure", meta=way.meta_init, **arguments).result
    before = result["without_model_bytes"]
    peak, kept = result["peaks"]["anonymous_peak_bytes"] - before, result["settled_bytes"] - before
    assert way.host_bytes == pytest.approx(peak, rel=0.05, abs=8 * MIB), way
    assert way.kept_bytes == pytest.approx(kept, rel=0.05, abs=8 * MIB), way
