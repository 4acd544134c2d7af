"""Without a GPU nothing of CUDA is called, so a later fork stays possible."""

from __future__ import annotations

import pytest
import torch

from lightning_memload.transfer.cuda_context import on_device, on_stream


@pytest.mark.parametrize("device", [None, torch.device("cpu"), torch.device("meta")], ids=str)
def test_other_devices_leave_cuda_alone(device: torch.device | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device", lambda *_: pytest.fail("a GPU was selected"))
    monkeypatch.setattr(torch.cuda, "stream", lambda *_: pytest.fail("a stream was selected"))
    entered = []
    with on_device(device), on_stream(None):
        entered.append(device)
    assert entered == [device]


def test_a_gpu_is_selected_for_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    class Selecting:
        def __init__(self, device: torch.device) -> None:
            self.device = device

        def __enter__(self) -> None:
            told.append(f"on {self.device}")

        def __exit__(self, *_: object) -> None:
            told.append(f"off {self.device}")

    monkeypatch.setattr(torch.cuda, "device", Selecting)
    with pytest.raises(KeyError), on_device(torch.device("cuda:1")):
        raise KeyError
    assert told == ["on cuda:1", "off cuda:1"]
