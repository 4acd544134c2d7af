"""The benchmark of saves with a frozen body: what is linked is right, and takes no place again."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

# Of Lightning, about a training this small.
pytestmark = pytest.mark.filterwarnings("ignore")


def test_a_frozen_body_takes_its_place_once(
    import_benchmark: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    benchmark = import_benchmark("frozen")
    small = dataclasses.replace(benchmark.SIZES["demo"], num_layers=2, num_heads=2, width=64, context_length=128)
    monkeypatch.setitem(benchmark.SIZES, "small", small)
    output = tmp_path / "result.json"
    arguments = ["--size", "small", "--device", "cpu", "--data", str(tmp_path / "data"), "--output", str(output)]
    assert benchmark.main(arguments) == 0
    result = json.loads(output.read_text())
    assert list(result["ways"]) == list(benchmark.WAYS)
    assert all(way["right"] for way in result["ways"].values())
    stock, linked = result["ways"]["stock"], result["ways"]["ours-directory"]
    assert stock["bytes_on_disk"] >= 5 * stock["bytes_written"] > 0
    assert linked["bytes_written"] < stock["bytes_written"] / 2
    # Numbers of steps in the loops' states have more digits later.
    assert abs(linked["bytes_on_disk"] - linked["bytes"] - 4 * linked["bytes_written"]) < 1024
    rendered = import_benchmark("render").render(result)
    assert all(benchmark.WAYS[name][0] in rendered for name in result["ways"])
