"""A save writes an ordinary checkpoint for every reader. A save that fails changes nothing."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import resource
import subprocess
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_memload import CheckpointWriteError, open_checkpoint
from lightning_memload.bytes import Record
from lightning_memload.formats import load_mapped
from lightning_memload.pickles.pickling import SavedStorage
from lightning_memload.save import save_torch, write_torch
from lightning_memload.storage import LocalFile
from lightning_memload.transfer import StagingRing, TensorCopy, choose_layout, transfer
from tests.formats.files import ALL_DTYPES, as_bytes, layouts, nested, of_dtype, tensors_of

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")

MIB = 1 << 20


def plain() -> Any:
    """A nested state of what ``weights_only`` knows."""
    obj = nested()
    del obj["default"]
    return obj


def everything() -> dict[str, Any]:
    big = torch.randn(700_000)  # more than two blocks
    return {
        "dtypes": {str(dtype): of_dtype(dtype) for dtype in ALL_DTYPES},
        "layouts": layouts(),
        "nested": plain(),
        "big": big,
        "tied": big,
        "rows": torch.randn(1000, 1000)[17:900],
        "many": [torch.tensor(float(number)) for number in range(1000)],
        "tiny or not": [torch.arange(length, dtype=torch.int16) for length in (511, 512, 513, 1, 2000)],
    }


READERS: dict[str, Any] = {
    "plain": lambda path: torch.load(path, weights_only=False),
    "weights_only": lambda path: torch.load(path, weights_only=True),
    "mmap": lambda path: torch.load(path, mmap=True, weights_only=False),
    "mmap and weights_only": lambda path: torch.load(path, mmap=True, weights_only=True),
    "file object": lambda path: torch.load(io.BytesIO(path.read_bytes()), weights_only=True),
    "ours": lambda path: load_mapped(path, weights_only=True)[0],
}


@pytest.fixture
def staged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Host memory goes through the staging ring, as a device's would."""
    monkeypatch.setattr(SavedStorage, "is_in_host_memory", property(lambda self: False))


def assert_same(loaded: Any, obj: Any) -> None:
    expected, found = list(tensors_of(obj)), list(tensors_of(loaded))
    assert [path for path, _ in found] == [path for path, _ in expected]
    for (path, ours), (_, theirs) in zip(found, expected, strict=True):
        assert (ours.dtype, ours.shape, ours.stride()) == (theirs.dtype, theirs.shape, theirs.stride()), path
        assert type(ours) is type(theirs), path
        assert ours.requires_grad == theirs.requires_grad, path
        assert as_bytes(ours) == as_bytes(theirs), path


@pytest.mark.parametrize("reader", READERS)
def test_every_reader_gets_every_bit(tmp_path: Path, reader: str) -> None:
    obj = everything()
    save_torch(obj, tmp_path / "file.pt")
    loaded = READERS[reader](tmp_path / "file.pt")
    assert_same(loaded, obj)
    assert loaded["big"].data_ptr() == loaded["tied"].data_ptr()


def test_a_reader_may_calculate_the_offsets(tmp_path: Path) -> None:
    config = pytest.importorskip("torch.utils.serialization.config", reason="torch 2.6 always reads them")
    obj = everything()
    save_torch(obj, tmp_path / "file.pt")
    with config.patch({"load.calculate_storage_offsets": True}):
        assert_same(torch.load(tmp_path / "file.pt", mmap=True), obj)


def test_the_file_is_torchs_but_for_its_identity(tmp_path: Path) -> None:
    """Byte for byte what stock Lightning writes, where no view leaves out a part of its storage."""
    obj = [plain(), {str(dtype): of_dtype(dtype) for dtype in ALL_DTYPES}, torch.randn(700_000)]
    save_torch(obj, tmp_path / "file.pt")
    stream = io.BytesIO()
    torch.save(obj, stream)
    with zipfile.ZipFile(tmp_path / "file.pt") as ours, zipfile.ZipFile(stream) as stock:
        theirs = {info.filename: info for info in stock.infolist()}
        assert theirs.keys() <= {info.filename for info in ours.infolist()}
        for name in theirs.keys() - {"archive/.data/serialization_id"}:
            assert ours.read(name) == stock.read(name), name
        if "archive/.format_version" in theirs:  # torch >= 2.7: the same records in the same order
            ours_infos = [(i.filename, i.header_offset, i.file_size, i.flag_bits) for i in ours.infolist()]
            assert ours_infos == [(i.filename, i.header_offset, i.file_size, i.flag_bits) for i in theirs.values()]
            assert (tmp_path / "file.pt").stat().st_size == len(stream.getvalue())


def verify(path: Path) -> int:
    """Bytes whose checksum our own engine finds to be right."""
    index = open_checkpoint(path)
    copies = [
        TensorCopy(storage.key, storage.offset, torch.uint8, (1,), torch.empty(storage.nbytes, dtype=torch.uint8))
        for storage in index.storages
    ]
    records = [Record(s.key, s.offset, s.nbytes, s.crc32) for s in index.storages if s.crc32 is not None]
    layout = choose_layout(8 * MIB, 2)
    with LocalFile(path) as file, StagingRing(layout, pinned=False) as ring:
        return transfer(file, copies, lambda: ring, num_threads=2, block_bytes=MIB, records=records).bytes_verified


@pytest.mark.parametrize("num_threads", [1, 2, 7])
def test_checksums_are_right(tmp_path: Path, num_threads: int) -> None:
    stats = save_torch(everything(), tmp_path / "file.pt", num_threads=num_threads)
    assert stats.num_threads == num_threads
    with zipfile.ZipFile(tmp_path / "file.pt") as archive:
        assert archive.testzip() is None
        assert all(info.CRC for info in archive.infolist() if info.file_size)
    assert verify(tmp_path / "file.pt") == stats.tensor_bytes


def test_a_second_thread_has_8_mib_to_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    small, large = torch.zeros(7 * MIB, dtype=torch.uint8), torch.zeros(9 * MIB, dtype=torch.uint8)
    assert save_torch(small, tmp_path / "small.pt", num_threads=4).num_threads == 1
    assert save_torch(large, tmp_path / "large.pt", num_threads=4).num_threads == 2
    assert save_torch(large, tmp_path / "one.pt", num_threads=1).num_threads == 1


@pytest.mark.usefixtures("staged")
@pytest.mark.parametrize("num_threads", [1, 3])
def test_what_is_staged_is_the_same(tmp_path: Path, num_threads: int) -> None:
    obj = everything()
    stats = save_torch(obj, tmp_path / "file.pt", num_threads=num_threads, host_budget_bytes=2 * MIB)
    assert_same(torch.load(tmp_path / "file.pt"), obj)
    assert verify(tmp_path / "file.pt") == stats.tensor_bytes
    assert 0 < stats.staging_bytes <= 2 * MIB


@pytest.mark.usefixtures("staged")
def test_the_ring_is_no_larger_than_what_goes_through_it(tmp_path: Path) -> None:
    assert save_torch([torch.ones(3)], tmp_path / "file.pt", num_threads=2).staging_bytes <= MIB


def test_a_stream_gets_the_same_file(tmp_path: Path) -> None:
    obj = everything()
    stream = io.BytesIO()
    stats = write_torch(obj, stream, name="stream")
    save_torch(obj, tmp_path / "file.pt")
    assert stream.getvalue() == (tmp_path / "file.pt").read_bytes()
    assert (stats.path, stats.bytes_written, stats.num_threads) == ("stream", len(stream.getvalue()), 1)


def test_stats_say_what_was_done(tmp_path: Path) -> None:
    tied = torch.ones(1000)
    stats = save_torch({"a": tied, "b": tied[10:20], "c": torch.ones(3)}, tmp_path / "file.pt", num_threads=1)
    assert stats.path == str(tmp_path / "file.pt")
    assert stats.bytes_written == (tmp_path / "file.pt").stat().st_size
    assert (stats.tensor_bytes, stats.num_storages) == (4012, 2)
    assert (stats.staging_bytes, stats.streamed) == (0, True)
    assert stats.seconds == pytest.approx(stats.pickle_seconds + stats.write_seconds + stats.commit_seconds)


def test_what_has_no_memory_is_left_to_torch(tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    save_torch({"old": 1}, path)
    unsaveable = torch.empty(3, device="meta").untyped_storage()
    with pytest.warns(UserWarning, match="written by torch.save"), pytest.raises(NotImplementedError):
        save_torch(unsaveable, path)
    assert torch.load(path) == {"old": 1}
    assert os.listdir(tmp_path) == ["file.pt"]


def test_a_save_by_torch_is_atomic_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_memload.save import torch_file as torch_zip

    def refuse(obj: object) -> None:
        raise torch_zip.UnstreamableError("no memory")

    monkeypatch.setattr(torch_zip, "pickle_object", refuse)
    obj = plain()
    with pytest.warns(UserWarning, match=r"file\.pt is written by torch\.save.*no memory"):
        stats = save_torch(obj, tmp_path / "file.pt")
    assert_same(torch.load(tmp_path / "file.pt"), obj)
    assert (stats.streamed, stats.bytes_written) == (False, (tmp_path / "file.pt").stat().st_size)
    stream = io.BytesIO()
    with pytest.warns(UserWarning, match="no memory"):
        assert not write_torch([1], stream, name="stream").streamed
    stream.seek(0)
    assert torch.load(stream) == [1]


# What fails ---------------------------------------------------------------------------------------------------------


class Unpicklable:
    def __reduce__(self) -> Any:
        raise AttributeError("cannot be pickled")


@pytest.mark.parametrize("obj", [{"a": Unpicklable()}, {"a": lambda: None}])
def test_what_cannot_be_pickled_writes_nothing(tmp_path: Path, obj: Any) -> None:
    path = tmp_path / "file.pt"
    save_torch({"old": 1}, path)
    stock = raised_by(lambda: torch.save(obj, io.BytesIO()))
    ours = raised_by(lambda: save_torch(obj, path))
    assert (type(ours), str(ours)) == (type(stock), str(stock))
    assert torch.load(path) == {"old": 1}
    assert os.listdir(tmp_path) == ["file.pt"]


def raised_by(call: Any) -> Exception:
    with pytest.raises(Exception, match="pickle") as caught:
        call()
    return caught.value


@pytest.mark.parametrize("options", [{"host_budget_bytes": 1000}, {"num_threads": 0}])
def test_impossible_options_are_refused(tmp_path: Path, options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"host budget|num_threads"):
        save_torch({}, tmp_path / "file.pt", **options)  # type: ignore[arg-type]
    assert os.listdir(tmp_path) == []


def test_without_space_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.pt"
    save_torch({"old": 1}, path)
    monkeypatch.setattr("lightning_memload.save.saving._free_bytes", lambda path: 12345)
    with pytest.raises(
        CheckpointWriteError, match=r"file\.pt could not be saved.* takes \d+ bytes, and 12345"
    ) as caught:
        save_torch(torch.ones(10_000), path)
    error = caught.value
    assert isinstance(error, OSError)
    assert (error.path, error.errno, error.free_bytes) == (str(path), errno.ENOSPC, 12345)
    assert error.needed_bytes is not None
    assert 40_000 < error.needed_bytes < 42_000
    assert torch.load(path) == {"old": 1}
    assert os.listdir(tmp_path) == ["file.pt"]


@pytest.mark.parametrize("stage", ["host", "staged"])
def test_an_error_in_the_middle_leaves_the_old_file(tmp_path: Path, stage: str, request: pytest.FixtureRequest) -> None:
    if stage == "staged":
        request.getfixturevalue("staged")
    path = tmp_path / "file.pt"
    save_torch({"old": 1}, path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9 * MIB, hard))  # Python ignores the signal that comes with it
    try:
        with pytest.raises(CheckpointWriteError, match=r"File too large.*What was there is untouched") as caught:
            save_torch(torch.ones(4 * MIB), path, num_threads=3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG
    assert torch.load(path) == {"old": 1}
    assert os.listdir(tmp_path) == ["file.pt"]


def test_a_disk_that_fails_last_is_told_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(directory: str) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("lightning_memload.storage.replacement._sync_directory", fail)
    with pytest.raises(CheckpointWriteError, match=r"Input/output error.*may not survive a power failure\."):
        save_torch({"new": 1}, tmp_path / "file.pt")
    assert torch.load(tmp_path / "file.pt") == {"new": 1}


@contextlib.contextmanager
def small_disk(path: Path, nbytes: int) -> Iterator[Path]:
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={nbytes}", "tmpfs", str(path)]
    made = subprocess.run(mount, capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"no file system can be mounted here: {made.stderr.strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small file system")
@pytest.mark.parametrize("asks", [True, False])
def test_a_full_disk_leaves_the_old_file(tmp_path: Path, asks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not asks:  # the disk fills up while it is written to
        monkeypatch.setattr("lightning_memload.save.saving._free_bytes", lambda path: None)
    with small_disk(tmp_path / "disk", 8 * MIB) as disk:
        path = disk / "file.pt"
        save_torch({"old": torch.ones(MIB)}, path)
        for _ in range(3):
            with pytest.raises(CheckpointWriteError, match=r"file\.pt could not be saved: No space left") as caught:
                save_torch({"new": torch.ones(2 * MIB)}, path)
            assert caught.value.errno == errno.ENOSPC
            assert caught.value.needed_bytes is not None
            assert (caught.value.free_bytes is None) is not asks
            assert os.listdir(disk) == ["file.pt"]
        assert torch.equal(torch.load(path)["old"], torch.ones(MIB))
        save_torch({"new": torch.ones(MIB // 2)}, path)


@pytest.mark.slow
def test_threads_and_descriptors_are_flat(tmp_path: Path) -> None:
    def levels() -> tuple[int, int]:
        return threading.active_count(), len(os.listdir("/proc/self/fd"))

    obj = everything()
    save_torch(obj, tmp_path / "file.pt")
    before = levels()
    for _ in range(5):
        save_torch(obj, tmp_path / "file.pt")
        with pytest.raises(CheckpointWriteError):
            save_torch(obj, tmp_path / "missing" / "file.pt")
    assert levels() == before
