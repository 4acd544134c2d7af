"""Reduces figures to their largest value over all ranks, with the rank that has it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torchmetrics import Metric

from lightning_memload.distributed import Companions
from lightning_memload.report import RankMaximum

__all__ = ["reduce_maxima"]

# Figures are not negative, so this cannot be one.
_ABSENT = -1


class _GatheredMaxima(Metric):
    """One row of integers per rank. torchmetrics synchronises it by messages, not by a collective operation."""

    full_state_update = False

    def __init__(self, num_values: int, companions: Companions) -> None:
        def gather(row: torch.Tensor, group: Any = None) -> list[torch.Tensor]:
            return [torch.tensor(told, dtype=torch.int64) for told in companions.exchange(row.tolist()).values()]

        super().__init__(dist_sync_fn=gather, distributed_available_fn=lambda: True)
        # int64, not the default float32: bytes must stay exact.
        self.add_state("rows", torch.full((num_values,), _ABSENT, dtype=torch.int64), dist_reduce_fx=None)

    def update(self, values: torch.Tensor) -> None:
        """Sets this rank's row."""
        self.rows = values

    def compute(self) -> torch.Tensor:
        """All rows, shape ``(ranks, values)``."""
        return self.rows


def reduce_maxima(
    figures: Mapping[str, int], names: list[str], rank: int, companions: Companions
) -> tuple[dict[str, RankMaximum], tuple[int, ...]]:
    """Reduces figures over the ranks that have them. Waits at most some seconds for late ranks.

    Args:
        figures: This rank's values. A missing name is unknown on this rank.
        names: All names, in the same order on every rank.
        rank: This rank.
        companions: The other ranks. Each of them calls this function too, or leaves.

    Returns:
        The maximum of each name that at least one rank knows, and the ranks that answered.
    """
    metric = _GatheredMaxima(len(names) + 1, companions)
    metric.update(torch.tensor([rank, *(figures.get(name, _ABSENT) for name in names)], dtype=torch.int64))
    rows = metric.compute()
    ranks = tuple(int(rank) for rank in rows[:, 0])
    values, places = rows[:, 1:].max(dim=0)
    maxima = {
        name: RankMaximum(int(value), ranks[int(place)])
        for name, value, place in zip(names, values, places, strict=True)
        if value != _ABSENT
    }
    return maxima, ranks
