"""The benchmark of saves tells the truth: every way saves the state, and one that does not is named."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tests.lightning.pytorch.plugins import TorchCheckpointIO

# Of Lightning, about a training this small.
pytestmark = pytest.mark.filterwarnings("ignore")
KIB = 1 << 10


@pytest.fixture
def benchmark(import_benchmark: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The benchmark with a size for tests, and ceilings that take no time."""
    module = import_benchmark("save")
    smallest = dataclasses.replace(module.SIZES["demo"], num_layers=2, num_heads=2, width=64, context_length=128)
    # A name of its own: what else is imported meanwhile keeps a copy of the sizes.
    monkeypatch.setitem(module.SIZES, "smallest", smallest)
    monkeypatch.setattr(module, "GIB", module.MIB)
    return module


def run(benchmark: ModuleType, folder: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    output = folder / "result.json"
    status = benchmark.main(
        ["--size", "smallest", "--device", "cpu", "--data", str(folder / "data"), "--output", str(output), *arguments]
    )
    assert list((folder / "data").iterdir()) == []
    return status, json.loads(output.read_text())


@pytest.mark.long
def test_every_way_saves_the_state(
    benchmark: ModuleType, import_benchmark: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    status, result = run(benchmark, tmp_path, "--repetitions", "2")
    assert status == 0
    assert result["right"] is True
    assert result["ways"].keys() == benchmark.WAYS.keys()
    rendered = import_benchmark("render").render(result)
    for name, way in result["ways"].items():
        assert way["right"] is True, name
        assert way["repetitions"] == 2
        assert way["bytes"] > 1000 * KIB, name
        assert way["seconds"] > 0, name
        assert way["call_seconds"] <= way["blocked_seconds"], name
        assert way["call_seconds"] < way["next_step_seconds"], name
        assert way["host_above_start_bytes"] >= 0, name
        assert ("commit_seconds" in way) == name.startswith("ours"), name
        for text in (benchmark.table(result), rendered):
            assert benchmark.WAYS[name].label in text
    assert result["ways"]["ours-async-snapshot"]["snapshot_seconds"] > 0
    assert result["ways"]["ours-async-until-step"]["snapshot_seconds"] == 0
    # In turns, so that changes of the machine's load affect all of them.
    assert [run["way"] for run in result["runs"]] == 2 * [benchmark.NO_SAVE, *benchmark.WAYS]
    for field in ("benchmark", "command", "machine", "versions", "size", "device", "ceilings"):
        assert result[field], field
    # Nothing of this machine is in what is published.
    assert str(tmp_path) not in json.dumps(result)


def test_a_wrong_file_is_told(benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class OneBit(TorchCheckpointIO):
        def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
            states = checkpoint.get("optimizer_states")
            if states:  # not the one that warms up
                last = states[0]["state"][max(states[0]["state"])]
                last["exp_avg"] = last["exp_avg"].clone()
                last["exp_avg"].view(torch.int32)[-1] ^= 1
            torch.save(checkpoint, path)

    monkeypatch.setitem(benchmark.WAYS, "torch", benchmark.Way("one bit", OneBit))
    status, result = run(benchmark, tmp_path, "--repetitions", "1", "--ways", "torch", "ours-async")
    assert status == 1
    assert {name: way["right"] for name, way in result["ways"].items()} == {"torch": False, "ours-async": True}
    assert "**no**" in benchmark.table(result)


def test_what_was_measured_is_kept_when_a_way_fails(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(TorchCheckpointIO):
        def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
            if "optimizer_states" in checkpoint:
                raise OSError("No space left on device")

    monkeypatch.setitem(benchmark.WAYS, "ours", benchmark.Way("full", Full))
    output = tmp_path / "result.json"
    arguments = ["--size", "smallest", "--device", "cpu", "--data", str(tmp_path / "data"), "--output", str(output)]
    with pytest.raises(OSError, match="No space left"):
        benchmark.main([*arguments, "--ways", "torch", "ours"])
    assert json.loads(output.read_text())["ways"].keys() == {"torch"}
