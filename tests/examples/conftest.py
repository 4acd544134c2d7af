"""The benchmarks as modules, under the names by which they import one another."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent.parent / "examples" / "benchmarks"


@pytest.fixture(autouse=True)
def messages_of_lightning() -> Iterator[None]:
    """A benchmark may silence Lightning for the rest of its process."""
    levels = {name: logging.getLogger(name).level for name in ("lightning.pytorch", "pytorch_lightning")}
    yield
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


@pytest.fixture(scope="module")
def import_benchmark() -> Iterator[Callable[[str], ModuleType]]:
    before = list(sys.path)
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield importlib.import_module
    finally:
        sys.path[:] = before
