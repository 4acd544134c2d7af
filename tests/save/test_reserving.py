"""A second name for a complete checkpoint: the same files, no bytes of its own, in one step."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from lightning_memload.save import identity, reserve, save_directory


def test_a_file(tmp_path: Path) -> None:
    (tmp_path / "old").write_bytes(b"data")
    reserve(str(tmp_path / "new"), str(tmp_path / "old"))
    assert os.path.samefile(tmp_path / "old", tmp_path / "new")
    (tmp_path / "old").unlink()
    assert (tmp_path / "new").read_bytes() == b"data"


def test_a_link_is_linked_and_not_what_it_leads_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"data")
    (tmp_path / "link").symlink_to("file")
    reserve(str(tmp_path / "new"), str(tmp_path / "link"))
    assert (tmp_path / "new").is_symlink()


def test_a_directory_without_the_files_of_others(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    save_directory({"a": torch.ones(3), "b": 4}, old)
    (old / "notes.txt").write_text("mine")
    ours = {path.relative_to(old) for path in old.rglob("*")} - {Path("notes.txt")}
    reserve(str(new), str(old))
    assert {path.relative_to(new) for path in new.rglob("*")} == ours
    assert all(os.path.samefile(old / name, new / name) for name in ours if (old / name).is_file())
    assert sorted(os.listdir(tmp_path)) == ["new", "old"]


def test_a_name_that_is_taken_stays(tmp_path: Path) -> None:
    for name in ("old", "new"):
        (tmp_path / name).write_text(name)
    with pytest.raises(FileExistsError):
        reserve(str(tmp_path / "new"), str(tmp_path / "old"))
    assert (tmp_path / "new").read_text() == "new"


def test_identity_tells_a_replacement(tmp_path: Path) -> None:
    path = tmp_path / "a"
    assert identity(str(path)) is None
    path.write_text("1")
    first = identity(str(path))
    assert first is not None
    assert identity(str(path)) == first
    (tmp_path / "b").write_text("1")
    os.replace(tmp_path / "b", path)
    assert identity(str(path)) != first
    path.unlink()
    path.symlink_to("nowhere")
    assert identity(str(path)) is not None
