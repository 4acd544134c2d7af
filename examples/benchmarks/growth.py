"""Measure how the time of loads and saves grows with the number of modules and of tensors, compared with stock.

Every tensor is tiny, so the time is the work for each tensor, not for its bytes. Stock and this project take turns, and
the shortest time of each counts. ``verify`` and ``inspect`` have no stock counterpart and are compared with
``torch.load``. This command writes the published figures:

    python examples/benchmarks/growth.py --output examples/benchmarks/results/growth-cpu.json

They include the highest load average of the run, and a remark if other programs used the cores.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from common import aligned, header, positive
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.data import DataLoader

from lightning_memload import MemoryEfficientRestore, load_weights, verify_checkpoint
from lightning_memload.cli import main as command_line
from lightning_memload.save import save_torch

Work = Callable[[], object]
WIDTH = 4
TENSORS_PER_MODULE = 200


class OwnLoad(nn.Linear):
    """A linear layer that overrides ``_load_from_state_dict``, as frozen batch norms and quantised layers do."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        state_dict.pop(f"{prefix}num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, *rest)


MODULES: dict[str, Callable[[], nn.Module]] = {
    "plain modules": lambda: nn.Linear(WIDTH, WIDTH),
    "modules with a load of their own": lambda: OwnLoad(WIDTH, WIDTH),
    "modules with load hooks (weight norm)": lambda: weight_norm(nn.Linear(WIDTH, WIDTH)),
}


class Stack(L.LightningModule):
    """A model of many small modules of one kind.

    Args:
        number: The number of modules.
        make: Creates one module.
    """

    def __init__(self, number: int, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(make() for _ in range(number))

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        """Return a loss that depends on every layer, so that the optimizer has a state for each parameter."""
        total: torch.Tensor = sum(layer(batch).square().mean() for layer in self.layers)
        return total

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        """Do nothing. The benchmark measures the load before the first step."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW, which has two state tensors and a step count for each parameter."""
        return torch.optim.AdamW(self.parameters(), foreach=True)


class Bag(nn.Module):
    """A module with many small parameters.

    Args:
        number: The number of parameters. Each has the shape (3,) and the dtype float32.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        for index in range(number):
            self.register_parameter(f"w{index}", nn.Parameter(torch.zeros(3)))


def make_trainer(callbacks: Sequence[L.Callback] = (), **options: Any) -> L.Trainer:
    """Return a Trainer for the CPU that prints nothing."""
    return L.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=list(callbacks),
        **options,
    )


def data() -> DataLoader[torch.Tensor]:
    """Return a data loader of one batch."""
    return DataLoader(torch.ones(2, WIDTH), batch_size=2)  # type: ignore[arg-type]


def module_rows(number: int, folder: Path) -> Iterator[tuple[str, int, Work, Work]]:
    """Yield the measurements for a number of modules, each as (label, number, work of stock, work of this project)."""
    for kind, make in MODULES.items():
        path = folder / "modules.ckpt"
        trainer = make_trainer(max_steps=1)
        trainer.fit(Stack(number, make), data())
        trainer.save_checkpoint(path)

        def validate(*callbacks: L.Callback, make: Any = make, path: Path = path) -> None:
            model = Stack(number, make)
            make_trainer(callbacks).validate(model, data(), ckpt_path=path, verbose=False, weights_only=False)

        def fit(*callbacks: L.Callback, make: Any = make, path: Path = path) -> None:
            model = Stack(number, make)
            make_trainer(callbacks, max_steps=1).fit(model, data(), ckpt_path=path, weights_only=False)

        yield f"`validate`, {kind}", number, validate, lambda v=validate: v(MemoryEfficientRestore(log=False))  # type: ignore[misc]
        yield f"`fit`, {kind}, AdamW", number, fit, lambda f=fit: f(MemoryEfficientRestore(log=False))  # type: ignore[misc]


def tensor_rows(number: int, folder: Path) -> Iterator[tuple[str, int, Work, Work]]:
    """Yield the measurements for a number of tensors, each as (label, number, work of stock, work of this project)."""
    model = nn.ModuleList(Bag(TENSORS_PER_MODULE) for _ in range(number // TENSORS_PER_MODULE))
    state = {name: value.detach() for name, value in model.state_dict().items()}
    path, tensors = folder / "weights.pt", folder / "weights.safetensors"
    torch.save(state, path)
    save_file(state, tensors)

    def read() -> dict[str, torch.Tensor]:
        state: dict[str, torch.Tensor] = torch.load(path)
        return state

    def inspect() -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            command_line(["inspect", str(path)])

    yield "load `.pt`", number, lambda: model.load_state_dict(read()), lambda: load_weights(model, path)
    yield (
        "load `.safetensors`",
        number,
        lambda: model.load_state_dict(load_file(tensors)),
        lambda: load_weights(model, tensors),
    )
    saved = folder / "saved.ckpt"
    # Stock does not wait for the disk, whose time varies by more than the work for thousands of tensors takes.
    yield (
        "save, without the wait for the disk",
        number,
        lambda: make_trainer().strategy.checkpoint_io.save_checkpoint({"state_dict": state}, saved),
        lambda: save_torch({"state_dict": state}, saved, durable=False),
    )
    yield "`verify`, against `torch.load`", number, read, lambda: verify_checkpoint(path)
    yield "`inspect`, against `torch.load`", number, read, inspect


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print a table, write the JSON, and return the exit status."""
    options = parse(arguments)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    report: dict[str, Any] = {**header("growth", arguments), "repeats": options.repeats, "rows": []}
    note_load(report)
    shutil.rmtree(options.data, ignore_errors=True)
    options.data.mkdir(parents=True)
    for number in options.modules:
        measure(module_rows(number, options.data), options, report)
    for number in options.tensors:
        measure(tensor_rows(number, options.data), options, report)
    shutil.rmtree(options.data)
    print("\n".join(aligned([["", "number", "stock, s", "this project, s", "times"], *table(report)], 1)))
    return 0


def note_load(report: dict[str, Any]) -> None:
    """Keep the highest load average so far. Add a remark where it exceeds the number of cores: others used them too."""
    report["load_average"] = max(os.getloadavg()[0], report.get("load_average", 0.0))
    if report["load_average"] > (os.cpu_count() or 1):
        report["remark"] = (
            "Other programs used the cores during the run. A single figure can be too high or too low by up to a half."
        )


def measure(rows: Iterator[tuple[str, int, Work, Work]], options: argparse.Namespace, report: dict[str, Any]) -> None:
    """Measure each row, with stock and this project in turn, and add the shortest times to the report."""
    for what, number, stock, ours in rows:
        seconds: dict[str, list[float]] = {"stock": [], "ours": []}
        for _ in range(options.repeats):
            for name, work in (("stock", stock), ("ours", ours)):
                started = time.perf_counter()
                work()
                seconds[name].append(time.perf_counter() - started)
        row = {"what": what, "number": number, "stock_seconds": min(seconds["stock"]), "seconds": min(seconds["ours"])}
        report["rows"].append(row)
        note_load(report)
        print(f"  {json.dumps(row)}", file=sys.stderr, flush=True)
        if options.output:
            options.output.write_text(json.dumps(report, indent=1) + "\n")


def table(result: dict[str, Any]) -> list[list[str]]:
    """Return the rows of the table, with the rows of one label together."""
    kinds = list(dict.fromkeys(row["what"] for row in result["rows"]))
    rows = sorted(result["rows"], key=lambda row: (kinds.index(row["what"]), row["number"]))
    return [
        [
            row["what"],
            f"{row['number']:,}",
            f"{row['stock_seconds']:.2f}",
            f"{row['seconds']:.2f}",
            f"{row['seconds'] / row['stock_seconds']:.2f}",
        ]
        for row in rows
    ]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modules", type=positive, nargs="*", default=[500, 1000, 2000], help="numbers of modules")
    parser.add_argument("--tensors", type=positive, nargs="*", default=[10000, 20000, 40000], help="numbers of tensors")
    parser.add_argument("--repeats", type=positive, default=3, help="turns of each row (default: %(default)s)")
    parser.add_argument(
        "--data", type=Path, default=Path("runs/growth"), help="folder for the checkpoints (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, help="write all results to this JSON file")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
