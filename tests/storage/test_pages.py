"""The file that is mapped at a range of memory, and whether it has changed."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest
import torch

from lightning_memload.storage.pages import file_under

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="mappings are listed as on Linux")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file that was not written just now."""
    path = tmp_path / "weights.bin"
    path.write_bytes(bytes(1 << 16))
    before = time.time_ns() - 10**10
    os.utime(path, ns=(before, before))
    return path


def mapped(path: Path) -> torch.Tensor:
    return torch.from_file(str(path), shared=False, size=1 << 16, dtype=torch.uint8)


def test_the_file_of_a_mapping_is_found(path: Path) -> None:
    tensor = mapped(path)
    found = file_under(tensor.data_ptr() + 100, 1000)
    assert found is not None
    assert (found.path, found.size_bytes) == (str(path), 1 << 16)
    assert not found.has_changed


def test_other_memory_has_no_file(path: Path) -> None:
    tensor = torch.zeros(1 << 20)
    assert file_under(tensor.data_ptr(), 100) is None
    assert file_under(mapped(path).data_ptr(), 1 << 30) is None


def test_a_change_in_place_is_noticed_and_a_replacement_is_harmless(path: Path, tmp_path: Path) -> None:
    tensor = mapped(path)
    found = file_under(tensor.data_ptr(), 100)
    assert found is not None
    kept = tmp_path / "kept"
    kept.hardlink_to(path)
    (tmp_path / "new").write_bytes(b"new")
    (tmp_path / "new").replace(path)
    assert not found.has_changed
    path.unlink()
    assert not found.has_changed
    kept.rename(path)
    with path.open("r+b") as file:
        file.write(b"changed")
    assert found.has_changed


def test_a_file_that_was_changed_just_now_is_unknown(path: Path) -> None:
    """Its time would be the same after another change in the same tick of the clock."""
    tensor = mapped(path)
    later = time.time_ns() + 10**9
    os.utime(path, ns=(later, later))
    assert file_under(tensor.data_ptr(), 100) is None
