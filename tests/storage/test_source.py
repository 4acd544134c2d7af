"""Sources of bytes: whole reads out of short ones, parts of files, and errors that name the place."""

from __future__ import annotations

import errno
from collections.abc import Sequence

import pytest

from lightning_memload.bytes import Record
from lightning_memload.errors import CheckpointReadError, ChecksumError
from lightning_memload.storage import FileView, StoredFile, checksum_error, describe_mismatch, read_fully

CONTENT = bytes(range(256)) * 20


class Slow(StoredFile):
    """A file that gives at most some bytes in one read, and notes the reads."""

    def __init__(self, content: bytes = CONTENT, most: int = 7) -> None:
        self.name = "model.ckpt"
        self.size_bytes = len(content)
        self.content, self.most = content, most
        self.reads: list[tuple[int, int]] = []

    def readv(self, buffers: Sequence[memoryview], offset: int) -> int:
        data = self.content[offset : offset + min(self.most, len(buffers[0]))]
        buffers[0][: len(data)] = data
        self.reads.append((offset, len(data)))
        return len(data)


class Broken(Slow):
    """A file whose bytes from 10 on cannot be read."""

    def readv(self, buffers: Sequence[memoryview], offset: int) -> int:
        if offset >= 10:
            raise OSError(errno.EIO, "Input/output error")
        return super().readv([buffers[0][: 10 - offset]], offset)


class TestWholeReads:
    def test_out_of_short_reads(self) -> None:
        buffers = [bytearray(10), bytearray(1), bytearray(30)]
        read_fully(Slow(), [memoryview(buffer) for buffer in buffers], 100, name_at=lambda _: None)
        assert b"".join(buffers) == CONTENT[100:141]

    def test_more_buffers_than_one_call_takes(self) -> None:
        """Linux refuses more than 1024 buffers."""
        buffers = [bytearray(1) for _ in range(3000)]
        read_fully(Slow(), [memoryview(buffer) for buffer in buffers], 0, name_at=lambda _: None)
        assert b"".join(buffers) == CONTENT[:3000]

    def test_end_of_the_file(self) -> None:
        with pytest.raises(CheckpointReadError, match="ends at byte 5120, but weight needs 5 bytes more") as caught:
            read_fully(Slow(), [memoryview(bytearray(25))], 5100, name_at=lambda _: "weight")
        assert (caught.value.path, caught.value.key, caught.value.offset) == ("model.ckpt", "weight", 5120)

    def test_error_of_the_disk(self) -> None:
        """The position is that of the read that failed, and the name is that of the tensor there."""
        with pytest.raises(CheckpointReadError, match=r"name at 10 from model\.ckpt failed at byte 10") as caught:
            read_fully(Broken(), [memoryview(bytearray(25))], 4, name_at=lambda offset: f"name at {offset}")
        assert (caught.value.errno, caught.value.offset) == (errno.EIO, 10)
        assert isinstance(caught.value.__cause__, OSError)


class TestStoredFile:
    @pytest.mark.parametrize(("nbytes", "offset"), [(20, 0), (20, 5110), (1, 5120), (3, 6000), (0, 10)])
    def test_pread_is_a_slice(self, nbytes: int, offset: int) -> None:
        assert Slow().pread(nbytes, offset) == CONTENT[offset : offset + nbytes]

    def test_what_a_subclass_need_not_say(self) -> None:
        with Slow() as file:
            assert not file.is_changed()
            assert file.place(12) == ("model.ckpt", 12)


class TestFileView:
    @pytest.mark.parametrize("size", [40, 3000])
    def test_reads_like_a_file_of_its_own(self, size: int) -> None:
        view, part = FileView(Slow(most=4096), "part", 100, size), CONTENT[100 : 100 + size]
        for offset in (0, 1, 39, 1000, 1023, 1024, 1990, 2999, size, size + 7):
            for nbytes in (0, 1, 30, 1100, size):
                assert view.pread(nbytes, offset) == part[offset : offset + nbytes]

    def test_headers_are_read_once(self) -> None:
        """Formats parse the first and the last bytes with many small reads, which do not reach the file."""
        file = Slow(most=4096)
        view = FileView(file, "part", 100, 3000)
        before = len(file.reads)
        for offset in range(0, 1000, 30):
            view.pread(30, offset)
            view.pread(30, 2970 - offset)
        assert len(file.reads) == before == 2


class TestMismatch:
    class Files:
        """Files of which the second begins at byte 100."""

        is_remote = False

        def place(self, offset: int) -> tuple[str, int]:
            return ("first", offset) if offset < 100 else ("second", offset - 100)

        def readv(self, buffers: Sequence[memoryview], offset: int) -> int:
            raise AssertionError("The bytes have been read.")

    def test_the_error_names_the_file_and_the_place_in_it(self) -> None:
        error = checksum_error(self.Files(), Record("weight", 130, 8, 0xABC), 0x1)
        assert isinstance(error, ChecksumError)
        assert (error.path, error.key, error.offset) == ("second", "weight", 30)
        assert (error.expected, error.actual) == (0xABC, 1)
        assert str(error) == (
            "second is damaged: the 8 bytes of weight at byte 30 have CRC-32 0x00000001, but the file records "
            "0x00000abc. Resume from another checkpoint."
        )

    def test_a_tensor_without_a_known_name(self) -> None:
        error = checksum_error(self.Files(), Record("", 30, 8, 0xABC), 0x1)
        assert error.key is None
        assert "the 8 bytes of a tensor at byte 30" in str(error)

    def test_a_verification_and_a_restore_say_the_same(self) -> None:
        record = Record("weight", 130, 8, 0xABC)
        assert str(checksum_error(self.Files(), record, 1)).startswith(describe_mismatch("second", 30, record, 1))
