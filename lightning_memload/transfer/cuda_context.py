"""Selects the GPU and the stream of a thread.

A new thread starts on the first GPU, even if the thread that starts it uses another one. Its first CUDA call then
creates a context on the first GPU: about 500 MiB for each process of the host that trains on another GPU. So a thread
selects its GPU before any other CUDA call. Without a GPU, nothing is called and CUDA is not initialised.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

__all__ = ["on_device", "on_stream"]


@contextlib.contextmanager
def on_device(device: torch.device | None) -> Iterator[None]:
    """Makes ``device`` the current GPU of this thread. Does nothing for ``None`` and for devices that are not CUDA."""
    if device is None or device.type != "cuda":
        yield
        return
    with torch.cuda.device(device):
        yield


@contextlib.contextmanager
def on_stream(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """Makes ``stream`` and its GPU current in this thread. Does nothing for ``None``."""
    if stream is None:
        # torch.cuda.stream(None) initialises CUDA (torch 2.13). This rules out a later fork, and fails in a fork.
        yield
        return
    # First the GPU: on exit, torch.cuda.stream selects the previous GPU again, which creates a context on it.
    with on_device(stream.device), torch.cuda.stream(stream):
        yield
