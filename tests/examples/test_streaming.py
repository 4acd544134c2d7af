"""The streaming benchmark measures every layout and knows what the threads are at."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest


def test_every_layout_is_measured(import_benchmark: Callable[[str], ModuleType], tmp_path: Path) -> None:
    benchmark = import_benchmark("streaming")
    output = tmp_path / "result.json"
    layouts = ["1x1x4", "2x4x0.5"]
    options = ["--device", "cpu", "--size-mib", "130", "--repetitions", "1", "--layouts", *layouts]
    assert benchmark.main([*options, "--data", str(tmp_path / "data"), "--output", str(output)]) == 0
    result = json.loads(output.read_text())
    assert list(result["layouts"]) == layouts
    assert result["bytes"] >= 130 << 20
    for row in result["layouts"].values():
        assert row["gb_per_second"] > 0
        assert row["unverified_gb_per_second"] > 0
        assert row["percent"]["read"] > 0
        assert row["percent"]["checksum"] > 0
        assert sum(row["percent"].values()) <= 100
    assert str(tmp_path) not in json.dumps(result)


@pytest.mark.parametrize("name", ["12", "12x12", "axbxc", "4x2x1x1"])
def test_a_layout_that_is_none_is_refused(import_benchmark: Callable[[str], ModuleType], name: str) -> None:
    with pytest.raises(SystemExit):
        import_benchmark("streaming").parse(["--layouts", name])
