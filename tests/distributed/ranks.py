"""Ranks of a process group, played by threads."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any


def in_ranks(work: Callable[[int], Any], ranks: list[int]) -> list[Any]:
    """Calls a function in a thread for each rank at once; what one raises is its result."""

    def attempt(rank: int) -> Any:
        try:
            return work(rank)
        except Exception as error:
            return error

    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(attempt, ranks))
