"""Train, resume and finetune from YAML files, with ``LightningCLI`` and the callback in the configuration.

``LightningCLI`` itself loads the checkpoint once, for its hyperparameters. ``config.load.mmap`` (torch 2.7 or newer)
makes this load map the file. Without it, the whole file is read into memory.

    cd examples/lightning_cli
    python train.py fit --config config.yaml
    python train.py fit --config config.yaml --ckpt_path runs/last.ckpt --trainer.max_epochs 4
    python train.py fit --config finetune.yaml
"""

from __future__ import annotations

import contextlib
from typing import Any

import lightning as L
import torch
from lightning.pytorch.cli import LightningCLI
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset


class Classifier(L.LightningModule):
    """A body of linear layers and a linear head.

    Args:
        width: Number of features of the body's layers.
        num_classes: Number of outputs of the head.
        learning_rate: Learning rate of AdamW.
    """

    def __init__(self, width: int = 1024, num_classes: int = 10, learning_rate: float = 1e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.body = nn.Sequential(nn.Linear(32, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.head = nn.Linear(width, num_classes)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the cross entropy of the classes. ``batch`` is [float32 points (batch, 32), int64 labels (batch,)]."""
        inputs, labels = batch
        loss = F.cross_entropy(self.head(self.body(inputs)), labels % self.head.out_features)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=self.hparams["learning_rate"])


class Quadrants(L.LightningDataModule):
    """Random points. The signs of the first three coordinates of a point give its class, 0 to 7.

    Args:
        num_samples: Number of points in an epoch.
    """

    def __init__(self, num_samples: int = 1024) -> None:
        super().__init__()
        self.num_samples = num_samples

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the training data. The points are the same in every run."""
        points = torch.randn(self.num_samples, 32, generator=torch.Generator().manual_seed(0))
        labels = (points[:, :3] > 0).long() @ torch.tensor([4, 2, 1])
        return DataLoader(TensorDataset(points, labels), batch_size=64, shuffle=True)


if __name__ == "__main__":
    with contextlib.suppress(ModuleNotFoundError):  # torch 2.6 has no such option.
        from torch.utils.serialization import config

        config.load.mmap = True
    LightningCLI(Classifier, Quadrants, seed_everything_default=1)
