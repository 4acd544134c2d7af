"""A resume through Lightning from every format that is no file of torch, against the ordinary way."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lightning_memload import MemoryEfficientRestore, StreamingCheckpointIO, open_checkpoint, save_directory
from lightning_memload.checkpoint import UnmappableCheckpoint
from tests.plugins.harness import Case, TinyModule, adamw, assert_same, resume, write_checkpoint


def test_what_a_directory_cannot_do_is_said(tmp_path: Path) -> None:
    save_directory({"state_dict": {}}, tmp_path / "directory")
    with pytest.raises(UnmappableCheckpoint, match="map_location='meta' moves the tensors"):
        StreamingCheckpointIO().load_checkpoint(tmp_path / "directory", map_location="meta")


def test_directory_of_tensors(tmp_path: Path) -> None:
    case = Case(lambda: TinyModule(adamw))
    path = write_checkpoint(case, tmp_path)
    save_directory(torch.load(path, weights_only=False), tmp_path / "directory")
    stock_module, stock = resume(case, path, tmp_path, None)
    restore = MemoryEfficientRestore(mode="copy")
    module, ours = resume(case, tmp_path / "directory", tmp_path, restore)
    assert_same(stock.restored, ours.restored, "restored")
    assert_same(stock_module.losses, module.losses, "losses")
    assert_same(stock.ended, ours.ended, "ended")
    report = restore.report
    assert report is not None
    # The weights and the optimizer's states, all of them streamed and verified.
    assert report.total.bytes_read >= report.bytes_verified == open_checkpoint(tmp_path / "directory").nbytes
    assert report.bytes_copied_ordinarily == 0


@pytest.mark.parametrize("asynchronous_save", [False, True])
def test_a_run_that_saves_directories_resumes_from_them(tmp_path: Path, asynchronous_save: bool) -> None:
    case = Case(lambda: TinyModule(adamw))
    file = write_checkpoint(case, tmp_path)
    options = {"save_format": "directory", "asynchronous_save": asynchronous_save}
    directory = write_checkpoint(replace(case, callbacks=lambda: [MemoryEfficientRestore(**options)]), tmp_path / "run")
    assert directory.is_dir()
    stock_module, stock = resume(case, file, tmp_path, None)
    module, ours = resume(case, directory, tmp_path, MemoryEfficientRestore(mode="copy"))
    assert_same(stock.restored, ours.restored, "restored")
    assert_same(stock_module.losses, module.losses, "losses")
    io = StreamingCheckpointIO(format="directory")
    io.save_checkpoint({"a": 1}, directory)
    assert io.load_checkpoint(directory) == {"a": 1}
    io.remove_checkpoint(directory)
    assert not directory.exists()


def test_directories_are_local(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"format='directory'\) saves to local disks .* memory://folder/x"):
        StreamingCheckpointIO(format="directory").save_checkpoint({}, "memory://folder/x")
    for make in (lambda: StreamingCheckpointIO(format="zip"), lambda: MemoryEfficientRestore(save_format="zip")):
        with pytest.raises(ValueError, match=r"format must be one of .*'torch', 'directory'.*, got 'zip'"):
            make()


def test_a_format_that_is_left_out_warns(tmp_path: Path) -> None:
    case = Case(
        lambda: TinyModule(adamw),
        plugins=lambda: [StreamingCheckpointIO()],
        callbacks=lambda: [MemoryEfficientRestore(save_format="directory")],
    )
    with pytest.warns(UserWarning, match=r"save_format='directory'\) is left out"):
        assert write_checkpoint(case, tmp_path).is_file()
