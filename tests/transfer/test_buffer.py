"""One buffer of the ring, on the CPU: a block of the file goes to its place in a tensor of any strides and dtype."""

from __future__ import annotations

from typing import Any

import torch

from lightning_memload.transfer.buffer import Buffer
from lightning_memload.transfer.copies import TensorCopy
from lightning_memload.transfer.plan import TensorBlock


def buffer_with(values: torch.Tensor) -> Buffer:
    data = values.contiguous().view(torch.uint8).clone()
    view: Any = data.numpy()
    return Buffer(memoryview(view), data, None)


def test_a_block_goes_to_its_place() -> None:
    values = torch.arange(6, dtype=torch.int32).view(2, 3)
    destination = torch.zeros(4, 3)
    copy = TensorCopy("weight", 0, torch.int32, (3, 1), destination)
    buffer_with(values).rearrange(copy, TensorBlock((1, 0), (2, 3), 3, 6), 24)
    assert destination.tolist() == [[0, 0, 0], [0, 1, 2], [3, 4, 5], [0, 0, 0]]


def test_a_block_is_transposed() -> None:
    destination = torch.zeros(2, 3)
    copy = TensorCopy("weight", 0, torch.float32, (1, 2), destination)
    buffer_with(torch.arange(6.0)).rearrange(copy, TensorBlock((0, 0), (2, 3), 0, 6), 24)
    assert destination.tolist() == [[0, 2, 4], [1, 3, 5]]


def test_a_buffer_of_the_cpu_is_always_free() -> None:
    buffer = buffer_with(torch.zeros(1))
    buffer.mark()
    assert buffer.is_free()
    buffer.wait()
