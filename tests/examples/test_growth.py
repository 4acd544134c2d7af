"""The benchmark of growth runs, and its result can be rendered."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

# Of Lightning, about a training this small.
pytestmark = pytest.mark.filterwarnings("ignore")


def test_every_kind_is_measured(import_benchmark: Callable[[str], ModuleType], tmp_path: Path) -> None:
    benchmark = import_benchmark("growth")
    output = tmp_path / "result.json"
    arguments = ["--modules", "2", "3", "--tensors", "200", "--repeats", "1", "--output", str(output)]
    assert benchmark.main([*arguments, "--data", str(tmp_path / "data")]) == 0
    result = json.loads(output.read_text())
    numbers: dict[str, list[int]] = {}
    for row in result["rows"]:
        numbers.setdefault(row["what"], []).append(row["number"])
    assert sorted(numbers.values()) == [[2, 3]] * 6 + [[200]] * 5
    assert result["command"].startswith("python examples/benchmarks/growth.py --modules 2 3 --tensors 200")
    assert ("remark" in result) == (result["load_average"] > (os.cpu_count() or 1))
    rendered = import_benchmark("render").render(result)
    assert all(f"| {what} |" in rendered for what in numbers)
