"""One buffer of a transfer, and the copies out of it: of the staging ring, or bytes that other ranks have read."""

from __future__ import annotations

import torch

from lightning_memload.transfer.copies import TensorCopy
from lightning_memload.transfer.plan import TensorBlock

__all__ = ["Buffer"]


class Buffer:
    """One buffer, with the event that marks the end of its last copy.

    Args:
        view: Its memory on the host. Empty if the buffer is on a device.
        tensor: Its memory as bytes.
        stream: The stream of the copies, ``None`` if they are not asynchronous.
    """

    def __init__(self, view: memoryview, tensor: torch.Tensor, stream: torch.cuda.Stream | None) -> None:
        self.view = view
        self.tensor = tensor
        self.address = tensor.data_ptr()
        self._stream = stream
        self._event: torch.cuda.Event | None = None
        self._scratch: torch.Tensor | None = None

    def is_free(self) -> bool:
        """Whether the buffer may be overwritten."""
        return self._event is None or self._event.query()

    def wait(self) -> None:
        """Blocks until the buffer may be overwritten."""
        if self._event is not None:
            self._event.synchronize()

    def mark(self) -> None:
        """Marks the buffer as in use until all copies that are queued so far have ended."""
        if self._stream is not None:
            self._event = self._event or torch.cuda.Event()
            self._event.record(self._stream)

    def rearrange(self, copy: TensorCopy, block: TensorBlock, nbytes: int) -> None:
        """Copies one block and converts it on the destination's device."""
        device = copy.destination.device
        values = self.tensor[:nbytes]
        if device != values.device:
            if self._scratch is None:
                self._scratch = torch.empty_like(self.tensor, device=device)
            values = self._scratch[:nbytes].copy_(values, non_blocking=self._stream is not None)
        block_values = values.view(copy.dtype).as_strided(block.shape, copy.stride)
        index = tuple(slice(start, start + size) for start, size in zip(block.starts, block.shape, strict=True))
        copy.destination[index].copy_(block_values)
