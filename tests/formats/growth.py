"""The cost of an index of many tensors: linear in their number, in time and in memory."""

from __future__ import annotations

from pathlib import Path

from tests.fresh_process import run_fresh

__all__ = ["assert_indexed_in_linear_time"]

_MEASURE = """
import time
from lightning_memload.formats import open_checkpoint
from lightning_memload.memory.host import read_status
RESULT = []
for count in ARGS["counts"]:
    path = f"{ARGS['folder']}/{count}"
    write(path, count)
    open_checkpoint(path)
    anonymous, start = read_status().anonymous_bytes, time.process_time()
    index = open_checkpoint(path)
    RESULT.append([time.process_time() - start, read_status().anonymous_bytes - anonymous, len(index)])
"""


def assert_indexed_in_linear_time(write: str, many: int, folder: Path) -> None:
    """Compares the index of ``many`` tensors with that of a tenth of them, in a fresh process.

    Args:
        write: The text of a function ``write(path, count)`` that writes a checkpoint of so many tensors.
        many: The larger number of tensors.
        folder: Where the checkpoints go.
    """
    few = many // 10
    small, large = run_fresh(write + _MEASURE, folder=folder, counts=[few, many]).result
    few_seconds, _, few_found = small
    many_seconds, many_bytes, many_found = large
    assert (few_found, many_found) == (few, many)
    assert many_seconds < 40 * few_seconds  # ten times as many; a quadratic index needs a hundred times as long
    assert many_bytes < 4096 * many
