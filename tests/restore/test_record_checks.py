"""The records under the tensors of a checkpoint, and their checksums."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_memload import ChecksumError, open_checkpoint
from lightning_memload.formats import load_mapped
from lightning_memload.restore.record_checks import RecordChecks

NAMES = ["a", "b", "c"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    torch.save({name: torch.arange(100.0) for name in NAMES}, tmp_path / "file.pt")
    return tmp_path / "file.pt"


def checks_of(path: Path, *, enabled: bool = True) -> RecordChecks:
    _, mapped = load_mapped(str(path), weights_only=True)
    return RecordChecks(mapped, enabled=enabled, num_threads=1, on_progress=None)


def offset_of(path: Path, name: str) -> int:
    return open_checkpoint(path)[name].storage.offset


def damage(path: Path, name: str) -> None:
    data = bytearray(path.read_bytes())
    data[offset_of(path, name) + 1] ^= 1
    path.write_bytes(data)


def test_a_tensor_lies_in_the_record_before_it(path: Path) -> None:
    checks = checks_of(path)
    start = offset_of(path, "b")
    assert [record.name for record in checks.at([start, start + 4, start + 399])] == ["b"]
    assert [record.name for record in checks.at([offset_of(path, "c"), offset_of(path, "a")])] == ["a", "c"]
    assert checks.at([0]) == []
    assert checks_of(path, enabled=False).at([start]) == []


def test_a_record_is_compared_once(path: Path) -> None:
    checks = checks_of(path)
    offsets = [offset_of(path, name) for name in NAMES]
    assert checks.compare(offsets[:2]).bytes_verified == 800
    assert checks.compare(offsets).bytes_verified == 400
    assert checks.compare(offsets).bytes_verified == 0


def test_damage_is_raised_or_returned(path: Path) -> None:
    damage(path, "b")
    checks = checks_of(path)
    offsets = [offset_of(path, name) for name in NAMES]
    with pytest.raises(ChecksumError, match="b"):
        checks.compare(offsets)
    records = checks.at(offsets)
    errors, stats = checks.find_damage([*records, *records])
    assert list(errors) == [offsets[1]]
    assert stats.bytes_verified == 1200
