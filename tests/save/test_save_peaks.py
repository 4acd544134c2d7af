"""The host memory of a save in a fresh process, and that of stock Lightning for the same state."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from tests.fresh_process import run_fresh

pytestmark = [
    pytest.mark.memory,
    pytest.mark.skipif(sys.platform != "linux", reason="anonymous memory is known on Linux only"),
]

MIB = 1 << 20
SLACK = 32 * MIB
STATE = 672 * MIB
KNOWN = 192 * MIB
BUDGET_MIB = 24


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("save_peaks") / "file.ckpt"
    arguments = {"num_bytes": STATE, "known_bytes": KNOWN, "host_budget_mib": BUDGET_MIB}
    result: dict[str, Any] = run_fresh("tests.save.save_in_process:measure", path=path, **arguments).result
    return result


@pytest.mark.long
def test_the_meter_sees_a_known_allocation(figures: dict[str, Any]) -> None:
    assert abs(figures["known"]["rise"] - KNOWN) < 4 * MIB


def test_stock_takes_the_whole_file_and_ours_nothing(figures: dict[str, Any]) -> None:
    """Tensors in host memory are written from where they lie: only slack, no ring."""
    stock, ours = figures["stock"], figures["ours"]
    assert stock["file_bytes"] >= STATE
    assert stock["rise"] >= STATE
    assert abs(ours["file_bytes"] - stock["file_bytes"]) < MIB
    assert ours["rise_bound"] <= SLACK


def test_what_is_staged_takes_the_budget(figures: dict[str, Any]) -> None:
    staged = figures["staged"]
    assert staged["file_bytes"] >= STATE
    assert 16 * MIB <= staged["staging_bytes"] <= BUDGET_MIB * MIB
    assert 16 * MIB <= staged["rise_bound"] <= BUDGET_MIB * MIB + SLACK


def test_a_stream_takes_nothing(figures: dict[str, Any]) -> None:
    assert figures["stream"]["rise_bound"] <= SLACK
