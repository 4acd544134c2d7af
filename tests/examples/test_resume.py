"""The resume benchmark measures models whose memory is there, drawn or not, and tells what the machine can do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch


def test_what_is_not_drawn_has_memory_all_the_same(import_benchmark: Callable[[str], ModuleType]) -> None:
    benchmark = import_benchmark("resume")
    with benchmark.drawn_as_zeros(True):
        model = benchmark.GPT("demo")
    assert all(parameter.device.type == "cpu" for parameter in model.parameters())
    assert not model.token_embedding.weight.any()
    with benchmark.drawn_as_zeros(False):
        assert torch.nn.Linear(3, 3).weight.all()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.long
def test_every_variant_gets_the_same_bits(
    import_benchmark: Callable[[str], ModuleType], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    benchmark = import_benchmark("resume")
    output = tmp_path / "result.json"
    options = ["--repetitions", "1", "--skip-init", "--cold", "1", "--data", str(tmp_path), "--output", str(output)]
    variants = ["stock", "callback", "callback-meta-init-cold"]
    assert benchmark.main([*options, "--variants", *variants]) == 0
    result = json.loads(output.read_text())
    assert result["equal"] is True
    assert list(result["variants"]) == variants
    assert all(row["build_seconds"] is None for row in result["variants"].values())
    assert (
        result["variants"]["callback"]["host_above_start_bytes"] < result["variants"]["stock"]["host_above_start_bytes"]
    )
    assert all(0 < len(course["seconds"]) <= 400 for course in result["series"].values())
    assert max(map(len, output.read_text().splitlines())) > 200  # a list of numbers is one line
    draw = import_benchmark("draw")
    assert f">{draw.OURS}<" in draw.picture("dark", draw.draw_memory, result)
    rendered = import_benchmark("render").render(result)
    assert "(assets/memory-cpu-dark.svg#only-dark)" in rendered
    labels = [benchmark.VARIANTS[variant] for variant in variants]
    for row in (*labels, "one run with a cold page cache", "reading a cold file"):
        assert row in rendered
    assert benchmark.VARIANTS["callback"] in capsys.readouterr().out
