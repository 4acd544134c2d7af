"""An action before torch.save opens a path, and nothing left of it afterwards."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch

from lightning_memload.storage.torch_save import before_torch_save

SERIALIZATION: Any = torch.serialization


def test_the_action_comes_before_the_file_changes(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    path.write_bytes(b"old")
    seen: list[tuple[Any, bytes]] = []
    opens = SERIALIZATION._open_zipfile_writer
    undo = before_torch_save(lambda name: seen.append((name, path.read_bytes())))
    try:
        torch.save(torch.ones(2), path)
        torch.save(torch.ones(2), io.BytesIO())  # An open file is no path.
    finally:
        undo()
    assert [(str(name), content) for name, content in seen] == [(str(path), b"old")]
    assert torch.load(path, weights_only=True).tolist() == [1, 1]
    assert SERIALIZATION._open_zipfile_writer is opens
    torch.save(torch.ones(2), path)
    assert len(seen) == 1


def test_another_program_that_replaced_the_function_keeps_it() -> None:
    opens = SERIALIZATION._open_zipfile_writer
    undo = before_torch_save(lambda name: None)
    try:
        SERIALIZATION._open_zipfile_writer = another = lambda name: None
        undo()
        assert SERIALIZATION._open_zipfile_writer is another
    finally:
        SERIALIZATION._open_zipfile_writer = opens
