"""A GPT-2 in plain PyTorch as a LightningModule, with a text that every machine has: Python's own standard library.

The examples and benchmarks share this module. It does not use ``lightning_memload``: it is an ordinary user's model.
Tokens are bytes. The GPT-2 sizes keep the vocabulary and the context of GPT-2, so their checkpoints are as large as
those of GPT-2.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset


@dataclass(frozen=True, slots=True)
class GPTConfig:
    """The five numbers that define a GPT-2."""

    num_layers: int
    num_heads: int
    width: int
    vocabulary_size: int = 50257
    context_length: int = 1024


SIZES = {
    "demo": GPTConfig(num_layers=7, num_heads=12, width=768, vocabulary_size=256),
    "gpt2-small": GPTConfig(num_layers=12, num_heads=12, width=768),
    "gpt2-medium": GPTConfig(num_layers=24, num_heads=16, width=1024),
    "gpt2-large": GPTConfig(num_layers=36, num_heads=20, width=1280),
    "gpt2-xl": GPTConfig(num_layers=48, num_heads=25, width=1600),
}


class CausalSelfAttention(nn.Module):
    """Multi-head attention where each token attends to itself and to the tokens before it."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.query_key_value = nn.Linear(config.width, 3 * config.width)
        self.projection = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, length, width) to the same shape."""
        batch, length, width = x.shape
        heads = self.query_key_value(x).view(batch, length, 3, self.num_heads, width // self.num_heads)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.projection(y.transpose(1, 2).reshape(batch, length, width))


class Block(nn.Module):
    """Attention and a two-layer perceptron, each with a LayerNorm before it and a residual connection around it."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.width)
        self.attention = CausalSelfAttention(config)
        self.mlp_norm = nn.LayerNorm(config.width)
        self.mlp = nn.Sequential(
            nn.Linear(config.width, 4 * config.width),
            nn.GELU(approximate="tanh"),
            nn.Linear(4 * config.width, config.width),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, length, width) to the same shape."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class GPT(L.LightningModule):
    """GPT-2 with tied input and output embeddings, AdamW and a cosine schedule.

    Args:
        size: A key of ``SIZES``.
        learning_rate: The learning rate of AdamW at the start of the cosine schedule.
        max_steps: The number of steps after which the schedule reaches zero.
    """

    def __init__(self, size: str = "demo", learning_rate: float = 3e-4, max_steps: int = 1000) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.config = SIZES[size]
        self.build()

    def build(self) -> None:
        """Create the layers. ``__init__`` calls this; a subclass that builds in ``configure_model`` overrides it."""
        config = self.config
        self.token_embedding = nn.Embedding(config.vocabulary_size, config.width)
        self.position_embedding = nn.Embedding(config.context_length, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.vocabulary_size, bias=False)
        self.apply(_initialize)
        self.head.weight = self.token_embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Map int64 tokens (batch, length) to logits (batch, length, vocabulary)."""
        return self.head(self.features(tokens))

    def features(self, tokens: Tensor) -> Tensor:
        """Map int64 tokens (batch, length) to the input of the head (batch, length, width)."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.token_embedding(tokens) + self.position_embedding(positions)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Return the mean cross entropy of the next tokens."""
        loss = self._loss(batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Log the mean cross entropy of the next tokens."""
        self.log("val_loss", self._loss(batch), batch_size=len(batch))

    def configure_optimizers(self) -> Any:
        """Return AdamW and its schedule, which takes one step after each step of the optimizer."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams["learning_rate"], weight_decay=0.1)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=self.hparams["max_steps"])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _loss(self, batch: Tensor) -> Tensor:
        logits = self(batch[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


def _initialize(module: nn.Module) -> None:
    """Initialise a module's own parameters as GPT-2 does."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


class StandardLibrary(L.LightningDataModule):
    """The source files of the running Python's standard library, as bytes. The last tenth is for validation.

    Args:
        max_bytes: The number of bytes to read. Reading starts at the first file in alphabetical order.
        sequence_length: The number of tokens that each sample predicts.
        batch_size: The number of samples in a batch.
    """

    def __init__(self, max_bytes: int = 1 << 20, sequence_length: int = 128, batch_size: int = 4) -> None:
        super().__init__()
        self.max_bytes = max_bytes
        self.sequence_length = sequence_length
        self.batch_size = batch_size

    def setup(self, stage: str) -> None:
        """Read the text and split it into training and validation."""
        text = standard_library_text(self.max_bytes)
        boundary = len(text) * 9 // 10
        self.train_text = Sequences(text[:boundary], self.sequence_length)
        self.val_text = Sequences(text[boundary:], self.sequence_length)

    def train_dataloader(self) -> DataLoader[Tensor]:
        """Return the training data, shuffled with torch's global generator.

        A restore that takes random numbers from this generator therefore changes the next loss.
        """
        return DataLoader(self.train_text, self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[Tensor]:
        """Return the validation data, in the order of the text."""
        return DataLoader(self.val_text, self.batch_size)


class Sequences(Dataset[Tensor]):
    """A text cut into samples: int64 tensors of ``sequence_length + 1`` tokens, of which the last is a target only."""

    def __init__(self, text: bytes, sequence_length: int) -> None:
        self.tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        self.sequence_length = sequence_length

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.sequence_length

    def __getitem__(self, index: int) -> Tensor:
        start = index * self.sequence_length
        return self.tokens[start : start + self.sequence_length + 1].long()


def standard_library_text(max_bytes: int) -> bytes:
    """Return the first ``max_bytes`` bytes of the standard library's top-level source files, in alphabetical order.

    Raises:
        FileNotFoundError: The standard library of this Python is zipped or frozen and has no source files.
    """
    library = Path(os.__file__).parent
    sources = sorted(library.glob("*.py"))
    if not sources:
        raise FileNotFoundError(
            f"{library} contains no *.py files. Use a Python whose standard library is installed as source files."
        )
    text = bytearray()
    for source in sources:
        if len(text) >= max_bytes:
            break
        text += source.read_bytes()
    return bytes(text[:max_bytes])
