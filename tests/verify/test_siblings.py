"""The checkpoint that is named instead of a damaged one."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lightning_memload import save_directory
from lightning_memload.verify import Siblings, find_siblings, fingerprint


def write(path: Path, age_seconds: float, *, damaged: bool = False) -> str:
    torch.save({"state_dict": {"weight": torch.ones(50)}, "epoch": 1}, path)
    if damaged:
        data = path.read_bytes()
        middle = data.index(bytes(torch.ones(50).numpy())) + 30
        path.write_bytes(data[:middle] + b"\xff" + data[middle + 1 :])
    os.utime(path, (1e9 - age_seconds, 1e9 - age_seconds))
    return str(path)


def test_the_newest_that_is_intact(tmp_path: Path) -> None:
    last = write(tmp_path / "last.ckpt", 0)
    write(tmp_path / "older.ckpt", 30)
    intact = write(tmp_path / "intact.ckpt", 20)
    damaged = write(tmp_path / "damaged.ckpt", 10, damaged=True)
    (tmp_path / "notes.txt").write_text("no checkpoint")
    (tmp_path / "empty.ckpt").touch()
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    assert find_siblings(last) == Siblings(intact, (damaged,), ())


def test_at_the_same_time_the_larger_step(tmp_path: Path) -> None:
    last = write(tmp_path / "last.ckpt", 0)
    for step in (8, 9, 10):
        write(tmp_path / f"epoch=0-step={step}.ckpt", 5)
    assert find_siblings(last).intact == str(tmp_path / "epoch=0-step=10.ckpt")


def test_a_directory_is_a_checkpoint_too(tmp_path: Path) -> None:
    last = write(tmp_path / "last.ckpt", 0)
    save_directory({"state_dict": {"weight": torch.ones(3)}}, tmp_path / "saved")
    assert find_siblings(last).intact == str(tmp_path / "saved")
    # And has siblings itself.
    assert find_siblings(str(tmp_path / "saved")).intact == last


def test_what_is_no_sibling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    last = write(tmp_path / "last.ckpt", 0)
    (tmp_path / "link.ckpt").symlink_to(last)
    os.link(last, tmp_path / "same.ckpt")
    (tmp_path / "nowhere.ckpt").symlink_to(tmp_path / "absent")
    write(tmp_path / ".memload-00000000-0000000000000000.tmp", 0)
    torch.save({"weight": torch.ones(3)}, tmp_path / "weights.pt")
    assert find_siblings(last) == Siblings(None, (), ())
    # A link to a file in the same directory is not named, the file is.
    (tmp_path / "a-link.ckpt").symlink_to(write(tmp_path / "target.ckpt", 5))
    assert find_siblings(last).intact == str(tmp_path / "target.ckpt")
    monkeypatch.chdir(tmp_path)
    assert find_siblings("last.ckpt").intact == "target.ckpt"


def test_of_a_file_that_is_gone(tmp_path: Path) -> None:
    intact = write(tmp_path / "intact.ckpt", 20)
    assert find_siblings(str(tmp_path / "gone.ckpt")).intact == intact


def test_when_the_time_is_over(tmp_path: Path) -> None:
    last = write(tmp_path / "last.ckpt", 0)
    newer, older = write(tmp_path / "newer.ckpt", 1), write(tmp_path / "older.ckpt", 2)
    assert find_siblings(last, timeout_seconds=-1) == Siblings(None, (), (newer, older))


def test_copies_have_the_same_fingerprint_and_nothing_else_has(tmp_path: Path) -> None:
    one = write(tmp_path / "one.ckpt", 0)
    shutil.copyfile(one, tmp_path / "copy.ckpt")
    other = {"state_dict": {"weight": torch.ones(50)}, "epoch": 2}
    torch.save(other, tmp_path / "other.ckpt")
    save_directory(other, tmp_path / "saved")
    marks = [fingerprint(str(tmp_path / name)) for name in ("one.ckpt", "copy.ckpt", "other.ckpt", "saved")]
    assert None not in marks
    assert marks[0] == marks[1]
    assert len(set(marks)) == 3
    # What records no checksums may hold anything.
    save_file({"weight": torch.ones(3)}, tmp_path / "model.safetensors")
    assert fingerprint(str(tmp_path / "model.safetensors")) is None
    assert fingerprint(str(tmp_path / "absent")) is None
