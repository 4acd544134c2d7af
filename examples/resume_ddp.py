"""Resume a training with several processes that share what they read, and compare it with stock Lightning.

The first run trains on one device and saves an ordinary checkpoint. The next two resume it with ``ddp``: with stock
Lightning, and with ``MemoryEfficientRestore(read="stripes")``. Each process then reads only its part of the file and
gets the rest from the others. The exit status is 0 only if both give the same weights, bit for bit.

    python examples/resume_ddp.py
    python examples/resume_ddp.py --devices 2 --accelerator gpu
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import lightning as L
import torch
from regression import Regression

from lightning_memload import MemoryEfficientRestore


def main() -> int:
    """Train, resume in both ways, compare, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=2, help="number of processes (default: %(default)s)")
    parser.add_argument("--accelerator", choices=("cpu", "gpu"), default="cpu", help="default: %(default)s")
    parser.add_argument("--folder", type=Path, default=Path("runs/resume-ddp"), help="default: %(default)s")
    parser.add_argument("--run", choices=("train", "stock", "stripes"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run is not None:
        run(options)
        return 0
    options.folder.mkdir(parents=True, exist_ok=True)
    for name in ("train", "stock", "stripes"):
        command = [sys.executable, __file__, "--run", name, "--devices", str(options.devices)]
        command += ["--accelerator", options.accelerator, "--folder", str(options.folder)]
        subprocess.run(command, check=True)
    stock, stripes = (json.loads((options.folder / f"{name}.json").read_text()) for name in ("stock", "stripes"))
    print(f"read by each rank: {stripes['bytes_read_by_rank']} bytes, of {stripes['file_bytes']}")
    print(f"equal weights, bit for bit: {'yes' if stock['digest'] == stripes['digest'] else 'NO'}")
    return 0 if stock["digest"] == stripes["digest"] else 1


def run(options: argparse.Namespace) -> None:
    """Train or resume, as one of the processes. Lightning starts the others."""
    torch.manual_seed(1)
    path = options.folder / "last.ckpt"
    trains = options.run == "train"
    restore = MemoryEfficientRestore(read="stripes") if options.run == "stripes" else None
    trainer = L.Trainer(
        accelerator=options.accelerator,
        devices=1 if trains else options.devices,
        strategy="auto" if trains else "ddp",
        max_epochs=1 if trains else 2,
        callbacks=[restore] if restore is not None else [],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=options.folder,
    )
    module = Regression(width=512, depth=8, batch_size=4)
    trainer.fit(module, ckpt_path=None if trains else path)
    if trains:
        trainer.save_checkpoint(path)
    elif trainer.is_global_zero:
        digest = hashlib.sha256()
        for weight in module.state_dict().values():
            digest.update(weight.cpu().numpy().tobytes())
        report = restore.report if restore is not None else None
        result = {
            "digest": digest.hexdigest(),
            "file_bytes": path.stat().st_size,
            "bytes_read_by_rank": dict(report.bytes_read_by_rank) if report is not None else None,
        }
        (options.folder / f"{options.run}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    sys.exit(main())
