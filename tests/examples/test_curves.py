"""The benchmark of curves runs, and its picture and its table show every point."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.long
def test_points_become_lines(import_benchmark: Callable[[str], ModuleType], tmp_path: Path) -> None:
    curves = import_benchmark("curves")
    output = tmp_path / "curves-cpu.json"
    arguments = ["--gigabytes", "0.001", "--tensors", "--threads", "--repetitions", "1", "--output", str(output)]
    assert curves.main([*arguments, "--data", str(tmp_path / "data")]) == 0
    assert not list((tmp_path / "data").iterdir())
    result = json.loads(output.read_text())
    assert [(point["axis"], point["work"]) for point in result["points"]] == [("bytes", work) for work in curves.WORKS]
    assert result["points"][0]["bytes"] == pytest.approx(1e6, rel=0.1)
    assert all(point["seconds"] > 0 for point in result["points"])
    rendered = import_benchmark("render").render(result)
    assert "(assets/curves-cpu-light.svg#only-light)" in rendered
    assert all(f"| {work} | bytes |" in rendered for work in curves.WORKS)
    draw = import_benchmark("draw")
    light, again, dark = (draw.picture(theme, draw.draw_curves, result) for theme in ("light", "light", "dark"))
    assert light == again != dark
    assert all(f">{work}</text>" in light for work in curves.WORKS)
