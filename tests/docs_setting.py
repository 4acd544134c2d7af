"""The names that programs in the documentation use: a model, data and checkpoints.

``tests/test_docs.py`` runs this in an empty directory before the blocks of a page.
"""

import lightning as L
import torch
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader

import lightning_memload
from lightning_memload import (
    MemoryEfficientRestore,
    StreamingCheckpointIO,
    WeightsSource,
    load_from_checkpoint,
    load_weights,
    meta_init,
    save_directory,
)

__all__ = [
    "GPT",
    "AsyncCheckpointIO",
    "LitClassifier",
    "LitGPT",
    "MemoryEfficientRestore",
    "StreamingCheckpointIO",
    "WeightsSource",
    "config",
    "data",
    "lightning_memload",
    "load_from_checkpoint",
    "load_weights",
    "meta_init",
    "model",
    "trainer",
]

WIDTH = 8
config = {"width": WIDTH}


class GPT(nn.Module):
    def __init__(self, config: dict[str, int]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(config["width"], config["width"]) for _ in range(2))
        self.head = nn.Linear(config["width"], 2)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            inputs = block(inputs)
        return self.head(inputs)


class LitGPT(L.LightningModule):
    def __init__(self, width: int = WIDTH, dropout: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.gpt = GPT({"width": width})

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.gpt(batch).square().mean()

    def train_dataloader(self) -> DataLoader[torch.Tensor]:
        return data

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters())


class LitClassifier(LitGPT):
    def __init__(self, mode: str = "embed") -> None:
        super().__init__()
        self.save_hyperparameters()
        self.mode = mode


def fitted(module: L.LightningModule, path: str) -> L.Trainer:
    """Trains for an epoch and saves."""
    trainer = L.Trainer(max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.fit(module, data)
    trainer.save_checkpoint(path)
    trainer.fit_loop.max_epochs = 3
    return trainer


data: DataLoader[torch.Tensor] = DataLoader(torch.randn(8, WIDTH), batch_size=4)  # type: ignore[arg-type]
model = LitGPT()
fitted(LitClassifier(), "classifier.ckpt")
trainer = fitted(model, "last.ckpt")
save_directory({"state_dict": model.state_dict()}, "checkpoint-directory")
save_file(model.state_dict(), "pretrained.safetensors")
save_file(model.gpt.state_dict(), "gpt.safetensors")
# As a hub has them: other names, and no head.
blocks = {f"transformer.h.{name}": value for name, value in model.gpt.blocks.state_dict().items()}
save_directory(blocks, "gpt2", safetensors=True)
