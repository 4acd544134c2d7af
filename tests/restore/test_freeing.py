"""Memory is freed in a thread, for tensors of every kind, and a fork waits for it."""

from __future__ import annotations

import torch

from lightning_memload.restore.freeing import _Freeing, free_in_background


def wait() -> None:
    _Freeing.join_all()


def test_the_memory_is_gone_and_the_list_is_empty() -> None:
    with torch.inference_mode():
        made_in_inference_mode = torch.ones(1000)
    kept = torch.ones(1000)
    tensors = [kept, made_in_inference_mode]
    free_in_background(tensors)
    wait()
    assert tensors == []
    assert kept.untyped_storage().nbytes() == 0
    assert made_in_inference_mode.untyped_storage().nbytes() == 0
    assert not _Freeing._running


def test_nothing_starts_no_thread() -> None:
    free_in_background([])
    assert not _Freeing._running
