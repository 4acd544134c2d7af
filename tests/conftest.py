"""Fixtures and options for all tests: markers that skip with a reason, and fresh processes."""

from __future__ import annotations

import contextlib
import gc
from collections import Counter
from collections.abc import Callable, Generator
from functools import cache
from pathlib import Path

import pytest

from tests.axes import Axes
from tests.fresh_process import FreshResult, memory_cgroup_obstacle, run_fresh
from tests.unit import is_unit_test, no_process


@cache
def _cuda_obstacle() -> str | None:
    import torch

    return None if torch.cuda.is_available() else "no CUDA device"


_cgroup_obstacle = cache(memory_cgroup_obstacle)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="run whole products of options, not one row per axis")
    parser.addoption("--every", type=int, default=1, help="run every n-th case of each test that has cases")
    parser.addoption("--unit", action="store_true", help="run the tests that start neither a process nor a Trainer")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out tests as the options say: a part of the tests need not take as long as all of them."""
    every, whole_products, only_units = (config.getoption(name) for name in ("--every", "--all", "--unit"))
    axes = Axes()
    numbers: Counter[str] = Counter()
    kept: list[pytest.Item] = []
    left_out: list[pytest.Item] = []
    for item in items:
        if (only_units and not is_unit_test(item)) or not (whole_products or axes.has(item)):
            left_out.append(item)
            continue
        test = item.nodeid.partition("[")[0]
        (left_out if numbers[test] % every else kept).append(item)
        numbers[test] += 1
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = kept


def pytest_collection_finish() -> None:
    """Spare the collector what was imported: many tests collect, and each would look at all of torch again."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    with no_process() if item.config.getoption("--unit") else contextlib.nullcontext():
        return (yield)


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
