"""Modules that several tests restore."""

from __future__ import annotations

from typing import Any

import torch

from tests.plugins.harness import (
    TinyModule,
    adamw,
)


class Evaluated(TinyModule):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("loss", self.loss(*batch))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("loss", self.loss(*batch))

    def val_dataloader(self) -> Any:
        return self.train_dataloader()

    def test_dataloader(self) -> Any:
        return self.train_dataloader()


def values(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return dict(module.state_dict())


class Sharded(TinyModule):
    """Two groups in another order than the module's, a schedule, and a buffer that every process has whole."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(3))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen += 1
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.losses.append(self.loss(*batch))

    def val_dataloader(self) -> Any:
        return self.train_dataloader()

    def groups(self) -> list[dict[str, Any]]:
        return [{"params": self.second.parameters()}, {"params": self.first.parameters(), "lr": 0.02}]

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.groups(), lr=0.01)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["average"] = torch.arange(5.0)


class WithBuffer(TinyModule):
    """Has a buffer that no checkpoint holds."""

    def __init__(self) -> None:
        super().__init__(adamw)
        self.register_buffer("secret", torch.ones(3), persistent=False)
