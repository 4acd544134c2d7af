"""The largest value over all ranks, with the rank it comes from."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torchmetrics import Metric

from lightning_memload.report import RankMaximum

__all__ = ["reduce_maxima"]

# Figures are not negative, so this cannot be one.
_ABSENT = -1


class _Gathered(Metric):
    """One row of integers per rank, gathered by torchmetrics' own synchronisation."""

    full_state_update = False

    def __init__(self, num_values: int) -> None:
        super().__init__()
        # int64, not the default float32: bytes must stay exact.
        self.add_state("rows", torch.full((num_values,), _ABSENT, dtype=torch.int64), dist_reduce_fx=None)

    def update(self, values: torch.Tensor) -> None:
        """Sets this rank's row."""
        self.rows = values

    def compute(self) -> torch.Tensor:
        """All rows, shape ``(world size, values)``."""
        rows = self.rows
        return rows if rows.dim() == 2 else rows.unsqueeze(0)


def reduce_maxima(figures: Mapping[str, int], names: list[str], device: torch.device) -> dict[str, RankMaximum]:
    """Reduces figures over all ranks. Every rank must call it, with the same names.

    Args:
        figures: This rank's values; a name that is not in it is unknown here.
        names: All names, in an order that is the same on every rank.
        device: Where the backend communicates.

    Returns:
        The maximum of each name that any rank knows.
    """
    metric = _Gathered(len(names)).to(device)
    metric.update(torch.tensor([figures.get(name, _ABSENT) for name in names], dtype=torch.int64, device=device))
    rows = metric.compute().cpu()
    values, ranks = rows.max(dim=0)
    return {
        name: RankMaximum(int(value), int(rank))
        for name, value, rank in zip(names, values, ranks, strict=True)
        if value != _ABSENT
    }
