"""What all tests share: markers that skip with a reason, and fresh processes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from tests.fresh_process import FreshResult, memory_cgroup_obstacle, run_fresh


@cache
def _cuda_obstacle() -> str | None:
    import torch

    return None if torch.cuda.is_available() else "no CUDA device"


_cgroup_obstacle = cache(memory_cgroup_obstacle)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--every", type=int, default=1, help="run every n-th case of each test that has cases")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out cases as ``--every`` says: a second run with another Lightning need not take as long as the first."""
    every = config.getoption("--every")
    numbers: Counter[str] = Counter()
    kept: list[pytest.Item] = []
    left_out: list[pytest.Item] = []
    for item in items:
        test = item.nodeid.partition("[")[0]
        (left_out if numbers[test] % every else kept).append(item)
        numbers[test] += 1
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = kept


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what this machine cannot run, and say why. Asked only when a test with the marker comes up."""
    for marker, obstacle in (("gpu", _cuda_obstacle), ("cgroup", _cgroup_obstacle)):
        if item.get_closest_marker(marker) is not None:
            reason = obstacle()
            if reason is not None:
                pytest.skip(reason)


@pytest.fixture
def fresh_process() -> Callable[..., FreshResult]:
    """``run_fresh``: runs a program text or a ``module:function`` in a fresh interpreter, with JSON in and out."""
    return run_fresh


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """The name of a checkpoint that a test writes. A module that wants another one has a fixture of its own."""
    return tmp_path / "checkpoint.pt"
