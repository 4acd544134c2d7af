"""The largest value over all ranks, with the rank it comes from."""

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


class _Gathered(Metric):
    """One row of integers per rank. torchmetrics synchronises it through messages, not through a collective."""

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
    """Reduces figures over the ranks that have some. Waits some seconds at most for ranks that are late.

    Args:
        figures: This rank's values; a name that is not in it is unknown here.
        names: All names, in an order that is the same on every rank.
        rank: This rank.
        companions: The ranks that call this too, or leave.

    Returns:
        The maximum of each name that any rank knows, and the ranks that answered.
    """
    metric = _Gathered(len(names) + 1, companions)
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
