"""A small training for the examples: some linear layers with AdamW, on the same data each time."""

from __future__ import annotations

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

__all__ = ["Regression"]


class Regression(L.LightningModule):
    """Some layers, with AdamW.

    Args:
        width: Width of the layers.
        depth: Number of layers of this width.
        batch_size: Rows of a batch. There are 64 rows.
    """

    def __init__(self, width: int, depth: int, batch_size: int) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.layers = nn.Sequential(
            nn.Linear(8, width), *(nn.Linear(width, width) for _ in range(depth)), nn.Linear(width, 1)
        )

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        """Return the loss of one batch."""
        inputs, targets = batch
        return nn.functional.mse_loss(self.layers(inputs), targets)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=1e-4)

    def train_dataloader(self) -> DataLoader[tuple[torch.Tensor, ...]]:
        """Return data that is the same in every process."""
        generator = torch.Generator().manual_seed(0)
        inputs = torch.randn(64, 8, generator=generator)
        return DataLoader(TensorDataset(inputs, inputs.sum(1, keepdim=True)), batch_size=self.batch_size)
