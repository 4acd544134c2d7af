"""Load a file of weights into any ``nn.Module`` that was built without memory, and print the time and the memory."""

from pathlib import Path

import torch
from torch import nn

from lightning_memload import MemoryMonitor, load_weights, meta_init


def build() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(1024, 16, batch_first=True), num_layers=8)


path, device = Path("encoder.pt"), "cuda" if torch.cuda.is_available() else "cpu"
torch.save(build().state_dict(), path)

with MemoryMonitor(device) as monitor:
    with meta_init():
        module = build()
    load_weights(module, path, device=device)

mib = 1 << 20
print(f"{path.stat().st_size / mib:.0f} MiB onto the {device} in {monitor.peaks.seconds:.2f} s")
print(f"host memory rose by {(monitor.peaks.anonymous_above_start_bytes or 0) / mib:.0f} MiB")
path.unlink()
