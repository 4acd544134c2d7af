"""Resume a training from a bucket, without a copy on the disk, and compare it with a resume from a file.

The program starts an S3 server of its own, trains, saves a checkpoint and puts it into a bucket. Then it resumes the
checkpoint twice, from the file and from the bucket. The exit status is 0 only if both give the same weights, bit for
bit. It needs the packages ``obstore``, ``moto[s3]``, ``flask`` and ``flask-cors``.

    python examples/resume_from_bucket.py
"""

from __future__ import annotations

import os
import socket
import sys
import tempfile
from pathlib import Path

import lightning as L
import obstore
import torch
from moto.server import ThreadedMotoServer
from regression import Regression

from lightning_memload import MemoryEfficientRestore


def train(steps: int, ckpt_path: str | None = None, save: Path | None = None) -> dict[str, torch.Tensor]:
    """Train up to a step, from a checkpoint if one is given, and return the weights."""
    torch.manual_seed(1)
    model = Regression(width=1024, depth=6, batch_size=8)
    trainer = L.Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        callbacks=[MemoryEfficientRestore()],
    )  # fmt: skip
    trainer.fit(model, ckpt_path=ckpt_path)
    if save is not None:
        trainer.save_checkpoint(save)
    return model.state_dict()


def main() -> int:
    """Run everything, and return the exit status."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
    server.start()
    # With a real bucket, the environment or a profile tells this.
    os.environ.update(
        AWS_ACCESS_KEY_ID="key", AWS_SECRET_ACCESS_KEY="secret", AWS_REGION="us-east-1",
        AWS_ENDPOINT_URL=f"http://127.0.0.1:{port}", AWS_ALLOW_HTTP="true",
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "last.ckpt"
        train(4, save=path)
        from_file = train(8, ckpt_path=str(path))
        create_bucket()
        obstore.put(obstore.store.from_url("s3://bucket"), "run/last.ckpt", path)
        print(f"put {path.stat().st_size / 2**20:.0f} MiB into the bucket")
    from_bucket = train(8, ckpt_path="s3://bucket/run/last.ckpt")
    server.stop()
    same = all(torch.equal(value, from_bucket[name]) for name, value in from_file.items())
    print(f"equal weights, bit for bit: {'yes' if same else 'NO'}")
    return 0 if same else 1


def create_bucket() -> None:
    """Create the bucket on the server of this program."""
    import boto3  # type: ignore[import-untyped]

    boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"]).create_bucket(Bucket="bucket")


if __name__ == "__main__":
    sys.exit(main())
