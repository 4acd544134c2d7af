"""Measure the saves of a finetuning with a frozen body: the time and the bytes of each save, and the space on the disk.

Every attention of a GPT gets a low-rank adapter (LoRA, Hu et al. 2021). Only the adapters are trained. A checkpoint is
saved after every step under a new name, and all checkpoints are kept. The time is that of ``trainer.save_checkpoint``.
At the end the last checkpoint is read back and compared with the model.

    python examples/benchmarks/frozen.py --size gpt2-small --device cpu --output frozen.json
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from common import MIB, aligned, digest, digest_of, header, median, number, positive
from lightning.pytorch.plugins import CheckpointIO, TorchCheckpointIO
from resume import SIZES, make_trainer
from save import GPT, NUM_TOKENS
from torch import nn
from torch.utils.data import DataLoader

from lightning_memload import StreamingCheckpointIO

RANK = 8
WAYS: dict[str, tuple[str, Callable[[], CheckpointIO]]] = {
    "stock": ("stock Lightning", TorchCheckpointIO),
    "ours": ("`StreamingCheckpointIO()`", StreamingCheckpointIO),
    "ours-directory": (
        '`StreamingCheckpointIO(format="directory")`',
        partial(StreamingCheckpointIO, format="directory"),
    ),
}
COLUMNS = {
    "first save, s": ("first_seconds", 1),
    "later saves, s": ("seconds", 1),
    "written by a later save, MiB": ("bytes_written", MIB),
    "all checkpoints on disk, MiB": ("bytes_on_disk", MIB),
}


class LowRank(nn.Module):
    """A frozen linear layer with a trained adapter of low rank beside it. The result is the sum of both."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer
        self.down = nn.Linear(layer.in_features, RANK, bias=False)
        self.up = nn.Linear(RANK, layer.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (..., in_features) to (..., out_features)."""
        return self.layer(x) + self.up(self.down(x))


class AdaptedGPT(GPT):
    """The GPT with adapters. Only the adapters are trained."""

    def configure_model(self) -> None:
        """Build the layers, freeze them and add the adapters, at the first call only."""
        if hasattr(self, "blocks"):
            return
        super().configure_model()
        self.requires_grad_(False)
        for block in self.blocks:
            block.attention.query_key_value = LowRank(block.attention.query_key_value)  # type: ignore[arg-type, union-attr]

    def configure_optimizers(self) -> Any:
        """Return AdamW for the parameters that are trained."""
        return torch.optim.AdamW([weight for weight in self.parameters() if weight.requires_grad], lr=1e-4)


class SaveAll(L.Callback):
    """Saves after every step under a new name, and records the seconds of each save."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seconds: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Save a checkpoint. ``os.sync`` first, so that the disk has no other work."""
        os.sync()
        started = time.perf_counter()
        trainer.save_checkpoint(self.folder / f"{len(self.seconds):03}.ckpt")
        self.seconds.append(time.perf_counter() - started)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train and save with each way, print a table, write the JSON, and return the exit status: 1 if a file is wrong."""
    options = parse(arguments)
    report: dict[str, Any] = {**header("frozen", arguments), "size": options.size, "device": options.device}
    report |= {"saves": options.saves, "load_average": os.getloadavg()[0], "ways": {}}
    for name in options.ways:
        report["ways"][name] = measure(name, options)
        print(f"  {name}: {json.dumps(report['ways'][name])}", file=sys.stderr, flush=True)
        if options.output:
            options.output.write_text(json.dumps(report, indent=1) + "\n")
    rows = [["", *COLUMNS, "right"], *(cells(report, name) for name in report["ways"])]
    print("\n".join(aligned(rows, 1)))
    return 0 if all(way["right"] for way in report["ways"].values()) else 1


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Train once, save with one way, and return its figures."""
    folder = options.data / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    saves, model = SaveAll(folder), AdaptedGPT(options.size)
    trainer = make_trainer(options, [saves], max_steps=options.saves, plugins=[WAYS[name][1]()])
    trainer.fit(model, DataLoader(torch.randint(256, (64, NUM_TOKENS + 1)), batch_size=1))  # type: ignore[arg-type]
    checkpoints = sorted(folder.iterdir())
    loaded = StreamingCheckpointIO().load_checkpoint(checkpoints[-1], weights_only=False)
    right = digest_of(loaded["state_dict"], loaded["optimizer_states"], None) == digest(model, trainer.optimizers)
    result = {
        "first_seconds": saves.seconds[0],
        "seconds": median(saves.seconds[1:]),
        "bytes": sum(blocks_of(checkpoints[0]).values()),
        "bytes_written": sum(blocks_of(*checkpoints).values()) - sum(blocks_of(*checkpoints[:-1]).values()),
        "bytes_on_disk": sum(blocks_of(*checkpoints).values()),
        "right": right,
    }
    shutil.rmtree(folder)
    return result


def blocks_of(*checkpoints: Path) -> dict[int, int]:
    """Return inode number -> bytes of every file in the checkpoints. So a file with several names counts once."""
    files = [file for path in checkpoints for file in (path, *path.rglob("*")) if file.is_file()]
    return {file.stat().st_ino: file.stat().st_size for file in files}


def cells(result: dict[str, Any], name: str) -> list[str]:
    """Return one row of the table: label, figures, and whether the checkpoint is right."""
    way = result["ways"][name]
    figures = [number(way[figure], unit) for figure, unit in COLUMNS.values()]
    return [WAYS[name][0], *figures, "yes" if way["right"] else "NO"]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="gpt2-small", help="size of the model (default: %(default)s)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default: %(default)s")
    parser.add_argument("--saves", type=positive, default=5, help="number of saves (default: %(default)s)")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="default: all")
    parser.add_argument(
        "--data", type=Path, default=Path("runs/benchmark"), help="folder for the checkpoints (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, help="write all results to this JSON file")
    options = parser.parse_args(arguments)
    options.accelerator = "gpu" if options.device == "cuda" else "cpu"
    return options


if __name__ == "__main__":
    raise SystemExit(main())
