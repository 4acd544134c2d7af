"""Which GPU, and which of its streams, a thread works on.

Every new thread starts on the first GPU, whatever the thread that made it uses, and whatever it then asks of the CUDA
runtime gives that GPU a context: some 500 MiB for each process of a host that trains on another one. So threads say
where they work before anything else. Without a GPU to work on nothing is asked, and CUDA stays as it is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

__all__ = ["on_device", "on_stream"]


@contextlib.contextmanager
def on_device(device: torch.device | None) -> Iterator[None]:
    """Within, the current GPU of this thread is ``device``. Nothing changes for ``None`` and for other devices."""
    if device is None or device.type != "cuda":
        yield
        return
    with torch.cuda.device(device):
        yield


@contextlib.contextmanager
def on_stream(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """Within, this thread queues its work on ``stream`` and its GPU. Nothing changes for ``None``."""
    if stream is None:
        # torch.cuda.stream(None) would initialise CUDA (torch 2.13), which forbids a later fork, or fails in one.
        yield
        return
    # The GPU first: leaving a stream makes the GPU that was current before it current again, and gives it a context.
    with on_device(stream.device), torch.cuda.stream(stream):
        yield
