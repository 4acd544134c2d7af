"""Storages that the checkpoint before has already: linked only if every byte is the same, and exact in any case."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_memload.bytes import RecordPart
from lightning_memload.errors import CheckpointWriteError
from lightning_memload.formats import load_mapped
from lightning_memload.formats.tensor_directory import linking
from lightning_memload.formats.tensor_directory.linking import LinkingFiles
from lightning_memload.save import SaveStats, save_directory, saving
from lightning_memload.verify import verify_checkpoint

MIB = 1 << 20


@pytest.fixture
def frozen() -> torch.Tensor:
    return torch.randint(0, 256, (3 * MIB + 5,), dtype=torch.uint8)


@pytest.fixture
def old(tmp_path: Path, frozen: torch.Tensor) -> Path:
    save_directory(of_step(frozen, 1), tmp_path / "old")
    return tmp_path / "old"


def of_step(frozen: torch.Tensor, step: int) -> dict[str, Any]:
    return {"trained": torch.full((1000,), float(step)), "frozen": frozen, "small": torch.ones(3)}


def save(state: dict[str, Any], path: Path, old: Path, **options: Any) -> SaveStats:
    """Saves and checks that what is loaded is exactly that."""
    stats = save_directory(state, path, link_unchanged_from=old, **options)
    loaded, mapped = load_mapped(path, weights_only=True)
    assert all(bool((loaded[name] == value).all()) for name, value in state.items())
    mapped.detach()
    assert verify_checkpoint(path).is_verified
    return stats


def inodes(path: Path) -> list[int]:
    return [(path / "tensors" / name).stat().st_ino for name in ("00000.bin", "00001.bin", "00002.bin")]


def same_files(path: Path, old: Path) -> list[bool]:
    return [ours == theirs for ours, theirs in zip(inodes(path), inodes(old), strict=True)]


@pytest.mark.parametrize("num_threads", [1, 4])
def test_what_has_not_changed_is_linked(tmp_path: Path, old: Path, frozen: torch.Tensor, num_threads: int) -> None:
    stats = save(of_step(frozen, 2), tmp_path / "new", old, num_threads=num_threads)
    assert same_files(tmp_path / "new", old) == [False, True, True]
    assert stats.bytes_linked == frozen.nbytes + 12
    written = sum(file.stat().st_size for file in (tmp_path / "new").rglob("*") if file.is_file()) - stats.bytes_linked
    manifest = (tmp_path / "new" / "manifest.json").stat().st_size
    assert stats.bytes_written == written - manifest
    shutil.rmtree(old)
    save(of_step(frozen, 3), tmp_path / "newer", tmp_path / "new")


@pytest.mark.parametrize("place", [0, 4095, 4096, MIB, 2 * MIB + 17, -1])
def test_one_bit_is_a_change(tmp_path: Path, old: Path, frozen: torch.Tensor, place: int) -> None:
    before = frozen.clone()
    frozen[place] ^= 1
    stats = save(of_step(frozen, 1), tmp_path / "new", old)
    assert same_files(tmp_path / "new", old) == [True, False, True]
    assert stats.bytes_linked == 4000 + 12
    assert torch.equal(load_mapped(old)[0]["frozen"], before)


def test_the_directory_that_is_replaced_may_be_the_one_before(old: Path, frozen: torch.Tensor) -> None:
    before = inodes(old)
    assert save(of_step(frozen, 2), old, old).bytes_linked
    assert [ours == theirs for ours, theirs in zip(inodes(old), before, strict=True)] == [False, True, True]
    assert os.listdir(old.parent) == ["old"]


def test_another_layout_links_what_still_fits(tmp_path: Path, old: Path, frozen: torch.Tensor) -> None:
    """Numbers and sizes only say where to look; what differs in either is written."""
    state = {"trained": torch.full((1000,), 1.0), "new": torch.zeros(5), "frozen": frozen}
    save(state, tmp_path / "new", old)
    assert same_files(tmp_path / "new", old) == [True, False, False]


def remove(old: Path) -> None:
    shutil.rmtree(old)


def damage_manifest(old: Path) -> None:
    (old / "manifest.json").write_text("{}")


def make_file(old: Path) -> None:
    shutil.rmtree(old)
    old.write_bytes(b"PK")


def truncate(old: Path) -> None:
    os.truncate(old / "tensors" / "00001.bin", MIB)
    (old / "tensors" / "00002.bin").unlink()


def put_links(old: Path) -> None:
    for name in ("00001.bin", "00002.bin"):
        file = old / "tensors" / name
        file.rename(old / name)
        file.symlink_to(old / name)


@pytest.mark.parametrize("harm", [remove, damage_manifest, make_file, truncate, put_links])
def test_what_cannot_be_read_is_written(tmp_path: Path, old: Path, frozen: torch.Tensor, harm: Any) -> None:
    harm(old)
    assert save(of_step(frozen, 2), tmp_path / "new", old).bytes_linked == 0


def no_links(source: Any, target: Any, **options: Any) -> None:
    raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))


def replaced_meanwhile(source: str, target: str, **options: Any) -> None:
    Path(target).write_bytes(b"of another checkpoint")


def removed_meanwhile(source: str, target: str, **options: Any) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(source)
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), source)


@pytest.mark.parametrize("link", [no_links, replaced_meanwhile, removed_meanwhile])
def test_what_cannot_be_linked_is_copied(
    tmp_path: Path, old: Path, frozen: torch.Tensor, link: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linking.os, "link", link)
    assert save(of_step(frozen, 2), tmp_path / "new", old).bytes_linked == 0


def test_a_file_that_loses_its_end_is_no_checkpoint(
    tmp_path: Path, old: Path, frozen: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut(source: str, target: str, **options: Any) -> None:
        os.truncate(source, 1)
        no_links(source, target)

    monkeypatch.setattr(linking.os, "link", cut)
    with pytest.raises(CheckpointWriteError, match="the previous checkpoint was truncated"):
        save_directory(of_step(frozen, 2), tmp_path / "new", link_unchanged_from=old)
    assert os.listdir(tmp_path) == ["old"]


def test_space_is_asked_for_what_may_have_to_be_written(
    tmp_path: Path, old: Path, frozen: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving, "_free_bytes", lambda path: MIB)
    with pytest.raises(CheckpointWriteError, match="No space left"):
        save_directory(of_step(frozen, 2), tmp_path / "new")
    save(of_step(frozen, 2), tmp_path / "new", old)


def test_a_disk_that_fills_up_is_told_with_what_may_have_to_be_written(
    tmp_path: Path, old: Path, frozen: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwritev", full)
    with pytest.raises(CheckpointWriteError, match=r"No space left on device\. It takes \d+ bytes, and") as caught:
        save_directory(of_step(frozen, 2), tmp_path / "new", link_unchanged_from=old)
    assert caught.value.needed_bytes is not None
    assert caught.value.needed_bytes > frozen.nbytes


def test_descriptors_are_let_go(tmp_path: Path, old: Path, frozen: torch.Tensor) -> None:
    def held() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = held()
    for step in range(2, 5):
        save_directory(of_step(frozen, step), tmp_path / "new", link_unchanged_from=old)
    files = LinkingFiles(
        [str(tmp_path / "no" / "file")], [8], [str(old / "tensors" / "00002.bin")], start_writeback=False
    )
    with pytest.raises(FileNotFoundError), contextlib.closing(files):
        files.write([RecordPart(0, 0, 4)], [memoryview(bytearray(4))], [None])
    assert held() == before


@given(data=st.data(), nbytes=st.integers(1, 40), block=st.integers(1, 13))
def test_any_difference_in_any_order(
    data: st.DataObject, nbytes: int, block: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("linking")
    before = bytes(range(nbytes))
    after = bytearray(before)
    for place in data.draw(st.sets(st.integers(0, nbytes - 1), max_size=3)):
        after[place] ^= 255
    (folder / "old").write_bytes(before)
    starts = data.draw(st.permutations(range(0, nbytes, block)))
    files = LinkingFiles([str(folder / "new")], [nbytes], [str(folder / "old")], start_writeback=False)
    with contextlib.closing(files):
        for start in starts:
            part = memoryview(after)[start : start + block]
            files.write([RecordPart(0, start, len(part))], [part], [None])
    assert (folder / "new").read_bytes() == after
    assert (folder / "old").read_bytes() == before
    assert files.bytes_linked == (nbytes if after == before else 0)
    assert os.path.samefile(folder / "new", folder / "old") == (after == before)
