"""The weight loading benchmark tells the truth: every row loads the right weights, and one that does not is named."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

FIGURES = (
    "seconds",
    "read_once_seconds",
    "host_anonymous_peak_bytes",
    "host_file_backed_peak_bytes",
    "host_rss_peak_bytes",
)


@pytest.fixture(scope="module")
def benchmark(import_benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return import_benchmark("weight_loading")


@pytest.fixture
def in_this_process(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the rows without a process for each: only their peaks need one."""

    def run_fresh(work: Callable[..., None], *arguments: Any, timeout_seconds: float | None = None) -> Any:
        delivered: list[Any] = []
        work(delivered.append, *arguments)
        return json.loads(json.dumps(delivered[0]))

    monkeypatch.setattr(benchmark, "run_fresh", run_fresh)


def run(benchmark: ModuleType, folder: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    output = folder / "result.json"
    status = benchmark.main(
        ["--size", "tiny", "--device", "cpu", "--data", str(folder / "data"), "--output", str(output), *arguments]
    )
    return status, json.loads(output.read_text())


@pytest.mark.usefixtures("in_this_process")
# The peers are what is installed: their deprecations are not ours to mend.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_every_row_loads_the_right_weights(benchmark: ModuleType, tmp_path: Path) -> None:
    status, result = run(benchmark, tmp_path, "--repetitions", "2")
    assert status == 0
    assert result["correct"] is True
    assert result["rows"].keys() | result["not_run"].keys() == benchmark.ROWS.keys()
    usual_and_ours = [name for name, row in benchmark.ROWS.items() if row.group != "peer" and row.only != "cuda"]
    assert result["rows"].keys() >= {*usual_and_ours, "safetensors-assign", "safetensors-copy"}
    for name, row in result["rows"].items():
        assert row["correct"] is True, name
        assert row["repetitions"] == 2
        assert all(row[figure] >= 0 for figure in FIGURES), name
        assert row["gpu_peak_bytes"] is None
        assert benchmark.ROWS[name].label in benchmark.table(result)
    for field in ("benchmark", "command", "machine", "versions", "size", "weights_bytes", "page_cache", "runs"):
        assert result[field], field
    against = result["against_peer"]
    assert benchmark.ROWS[against["ours"]].group == "ours"
    assert benchmark.ROWS[against["fastest_peer"]].group == "peer"
    # Nothing of this machine is in what is published.
    assert str(tmp_path) not in json.dumps(result)


@pytest.mark.usefixtures("in_this_process")
def test_wrong_weights_and_failures_are_told(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = {name: benchmark.ROWS[name] for name in ("baseline", "per-tensor", "safetensors-copy")}

    def random(config: Any, files: Any, device: torch.device) -> torch.nn.Module:
        return benchmark.GPT2(config)

    def fail(config: Any, files: Any, device: torch.device) -> torch.nn.Module:
        raise RuntimeError(f"no luck with {files.folder}\nat all")

    monkeypatch.setitem(benchmark.ROWS, "per-tensor", benchmark.Row("random", "pt", "usual", random))
    monkeypatch.setitem(benchmark.ROWS, "safetensors-copy", benchmark.Row("failing", "pt", "peer", fail))
    status, result = run(benchmark, tmp_path, "--repetitions", "1", "--rows", *rows)
    assert status == 1
    assert result["correct"] is False
    assert {name: row["correct"] for name, row in result["rows"].items()} == {"baseline": True, "per-tensor": False}
    assert result["not_run"] == {"safetensors-copy": "RuntimeError: no luck with DATA/tiny"}


def test_rows_run_in_fresh_processes(benchmark: ModuleType, tmp_path: Path) -> None:
    # The files are there, so that the row is the only process.
    benchmark.save_model(benchmark.SIZES["tiny"], benchmark.Files(tmp_path / "data" / "tiny"), torch.device("cpu"))
    status, result = run(benchmark, tmp_path, "--repetitions", "1", "--rows", "ours-pt")
    assert status == 0
    assert result["not_run"] == {}
    assert result["rows"]["ours-pt"]["correct"] is True


def deliver_a_number(deliver: Callable[[Any], None], given: int) -> None:
    deliver({"pid": os.getpid(), "given": given, "imported": "lightning" in sys.modules})


def end_early(deliver: Callable[[Any], None]) -> None:
    os._exit(3)


def deliver_too_late(deliver: Callable[[Any], None]) -> None:
    time.sleep(600)


def test_a_process_delivers_what_it_found_or_is_told_of(import_benchmark: Callable[[str], ModuleType]) -> None:
    common = import_benchmark("common")
    found = [common.run_fresh(deliver_a_number, given) for given in (1, 2)]
    assert [run["given"] for run in found] == [1, 2]
    assert len({os.getpid(), *(run["pid"] for run in found)}) == 3
    assert all(run["imported"] for run in found)
    with pytest.raises(common.ProcessFailed, match="exit status 3"):
        common.run_fresh(end_early)
    with pytest.raises(common.ProcessFailed, match="longer than 1 s"):
        common.run_fresh(deliver_too_late, timeout_seconds=1)
