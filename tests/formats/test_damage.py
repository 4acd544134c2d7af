"""Damaged and hostile files: one kind of error, an index that is right or none, and bounded time and memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_memload.checkpoint import Checkpoint
from lightning_memload.errors import CheckpointFormatError, UnmappableCheckpointError
from lightning_memload.formats import load_mapped, open_checkpoint
from tests.formats.files import save_bytes, storage_pickle, tensor_pickle, write_zip
from tests.formats.growth import assert_indexed_in_linear_time
from tests.fresh_process import run_fresh

FLOAT = tensor_pickle(storage_pickle())


@pytest.fixture(scope="module")
def small() -> bytes:
    tied = torch.arange(8.0)
    return save_bytes(
        {"state_dict": {"weight": tied, "tied": tied[2:5], "bias": torch.ones(3, dtype=torch.int16)}, "epoch": 1}
    )


def without_path(index: Checkpoint) -> object:
    return index.file_size, index.tensors, index.storages


class TestTruncation:
    def test_at_many_places(self, path: Path, small: bytes) -> None:
        path.write_bytes(small)
        whole = open_checkpoint(path)
        places = {*range(0, len(small), 50), *range(4), *range(len(small) - 70, len(small))}
        for length in sorted(places):
            path.write_bytes(small[:length])
            with pytest.raises(CheckpointFormatError, match=r"truncated|no checkpoint at all"):
                open_checkpoint(path)
            with pytest.raises(CheckpointFormatError, match=r"truncated|no checkpoint at all"):
                load_mapped(path)
        path.write_bytes(small)
        assert without_path(open_checkpoint(path)) == without_path(whole)

    def test_in_the_middle_with_an_intact_directory(self, path: Path, small: bytes) -> None:
        # What remains is the end of the file, so every record lies elsewhere than the directory says.
        for missing in (64, 128, 1000):
            path.write_bytes(small[:64] + small[64 + missing :])
            with pytest.raises(CheckpointFormatError):
                open_checkpoint(path)


class TestFlips:
    @pytest.mark.slow
    def test_every_byte(self, path: Path, small: bytes) -> None:
        path.write_bytes(small)
        whole = open_checkpoint(path)
        data = [range(s.offset, s.offset + s.nbytes) for s in whole.storages]
        refused = 0
        for position in range(len(small)):
            for flip in (0x01, 0xFF):
                damaged = bytearray(small)
                damaged[position] ^= flip
                path.write_bytes(damaged)
                try:
                    index = open_checkpoint(path)
                except CheckpointFormatError:
                    refused += 1
                    assert not any(position in span for span in data)
                else:
                    described = [(t.path, t.dtype, t.shape, t.stride, t.storage_offset) for t in index]
                    assert described == [(t.path, t.dtype, t.shape, t.stride, t.storage_offset) for t in whole]
                    assert [s.nbytes for s in index.storages] == [s.nbytes for s in whole.storages]
        assert refused > len(small) // 10  # the pickle and the directory

    @pytest.mark.slow
    def test_every_byte_of_a_pickle_without_checksum(self, path: Path) -> None:
        """The worst that a pickle can hold: then only the unpickler stands between it and the caller."""
        pickled = (
            b"\x80\x02}(X\x01\x00\x00\x00aq\x00" + FLOAT + b"X\x01\x00\x00\x00br\x01\x00\x00\x00]q\x02" + FLOAT + b"au."
        )
        for position in range(len(pickled)):
            for value in (0, 1, 0x28, 0x2E, 0x62, 0x71, 0x72, 0x80, 0xFF, pickled[position] ^ 1):
                damaged = bytearray(pickled)
                damaged[position] = value
                write_zip(path, bytes(damaged), {"0": bytes(16)})
                try:
                    index = open_checkpoint(path)
                except CheckpointFormatError:
                    pass
                else:
                    for tensor in index:
                        start, end = tensor.file_range
                        assert tensor.storage.offset <= start <= end <= tensor.storage.offset + tensor.storage.nbytes


class TestContradictions:
    @pytest.mark.parametrize(
        "tensor",
        [
            tensor_pickle(storage_pickle(), shape=b"(K\x05t"),
            tensor_pickle(storage_pickle(), offset=b"K\x01"),
            tensor_pickle(storage_pickle(), stride=b"(K\x02t"),
            tensor_pickle(storage_pickle(), shape=b"(J\xff\xff\xff\xfft"),
            tensor_pickle(storage_pickle(), stride=b"(J\xff\xff\xff\xfft"),
            tensor_pickle(storage_pickle(), offset=b"J\xff\xff\xff\xff"),
            tensor_pickle(storage_pickle(), shape=b"(K\x02K\x02t"),
            tensor_pickle(storage_pickle(), shape=b"(X\x01\x00\x00\x00at"),
        ],
        ids=["shape", "offset", "stride", "negative-shape", "negative-stride", "negative-offset", "ranks", "text"],
    )
    def test_a_tensor_beyond_its_storage(self, path: Path, tensor: bytes) -> None:
        write_zip(path, b"\x80\x02}X\x01\x00\x00\x00a" + tensor + b"s.", {"0": bytes(16)})
        with pytest.raises(CheckpointFormatError, match=r"a has shape .* does not fit its storage of 16 bytes"):
            open_checkpoint(path)

    @pytest.mark.parametrize("where", ["offset", "shape", "stride"])
    def test_a_number_too_long_to_print(self, path: Path, where: str) -> None:
        number = b"\x8b\x10\x27\x00\x00" + b"\x7f" * 10000
        tensor = tensor_pickle(storage_pickle(), **{where: number if where == "offset" else b"(" + number + b"t"})
        write_zip(path, b"\x80\x02" + tensor + b".", {"0": bytes(16)})
        with pytest.raises(CheckpointFormatError, match=r"data\.pkl cannot be read .*digits"):
            open_checkpoint(path)

    @pytest.mark.parametrize(
        ("storage", "message"),
        [
            (storage_pickle(key=b"7"), "needs storage '7' of 16 bytes, which the file lacks"),
            (storage_pickle(numel=b"K\x05"), "gives storage '0' 20 bytes, the file 16"),
            (storage_pickle(numel=b"J\xff\xff\xff\xff"), "gives storage '0' -4 bytes"),
            (storage_pickle(numel=b"X\x01\x00\x00\x004"), "refers to a storage as"),
            (b"K\x07Q", "refers to 7 outside itself"),
        ],
    )
    def test_a_storage_that_is_not_there(self, path: Path, storage: bytes, message: str) -> None:
        write_zip(path, b"\x80\x02" + storage + b".", {"0": bytes(16)})
        with pytest.raises(CheckpointFormatError, match=message):
            open_checkpoint(path)

    @pytest.mark.filterwarnings("ignore:Duplicate name")
    def test_a_record_that_is_there_twice(self, path: Path) -> None:
        import zipfile

        write_zip(path, b"\x80\x02" + FLOAT + b".", {"0": bytes(16)})
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("archive/data/0", bytes(range(16)))
        with pytest.raises(CheckpointFormatError, match="'data/0' twice"):
            open_checkpoint(path)

    def test_a_record_outside_of_the_folder(self, path: Path) -> None:
        import zipfile

        write_zip(path, b"\x80\x02" + FLOAT + b".", {"0": bytes(16)})
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("__MACOSX/data/0", bytes(range(16)))
        with pytest.raises(RuntimeError, match="not in a subdirectory"):
            torch.load(path)
        with pytest.raises(CheckpointFormatError, match="'__MACOSX/data/0' outside of its folder"):
            open_checkpoint(path)


class TestHostilePickles:
    """Each of these is some hundred bytes to a megabyte long."""

    PROGRAM = """
import sys, time
sys.set_int_max_str_digits(4300)
from lightning_memload.formats import open_checkpoint
from lightning_memload.memory.host import read_status
from lightning_memload.errors import CheckpointFormatError, UnmappableCheckpointError
import resource, pathlib
resource.setrlimit(resource.RLIMIT_DATA, (3 << 30, 3 << 30))
RESULT = {}
for path in sorted(pathlib.Path(ARGS["folder"]).iterdir()):
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    try:
        outcome = f"{len(open_checkpoint(path))} tensors"
    except (CheckpointFormatError, UnmappableCheckpointError) as error:
        outcome = type(error).__name__
        assert len(str(error)) < 2000, str(error)[:3000]
    seconds = time.perf_counter() - start
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10
    RESULT[path.name] = [outcome, seconds, grown]
"""

    def pickles(self) -> dict[str, bytes]:
        start = b"\x80\x02"
        empty = b"ccollections\nOrderedDict\n)R"
        tuples = start + b"K\x01q\x00" + b"".join(b"h\x00h\x00\x86q\x00" for _ in range(200))
        # f(n+1) = frozenset((f(n), (f(n),))): quick to hash, exponential to print.
        body = b"(K\x01\x91q\x00" + b"".join(b"0(h\x00h\x00\x85\x91q\x00" for _ in range(200))
        frozen = b"\x80\x04" + body
        reference = storage_pickle()
        return {
            "memo-index": start + b"]r\xff\xff\xff\x7f.",
            "memo-index-text": start + b"]p1000000000\n.",
            "bytearray": b"\x80\x05\x96" + (20 << 30).to_bytes(8, "little") + b"a.",
            "bytes": b"\x80\x05\x8e" + (20 << 30).to_bytes(8, "little") + b"a.",
            "unicode": b"\x80\x05\x8d" + (20 << 30).to_bytes(8, "little") + b"a.",
            "frame": b"\x80\x04\x95" + (20 << 30).to_bytes(8, "little") + b"N.",
            "tuple-bomb": tuples + b".",
            "tuple-bomb-as-storage-id": tuples + b"Q.",
            "tuple-bomb-as-shape": start
            + b"ctorch._utils\n_rebuild_tensor_v2\n("
            + reference
            + b"K\x00"
            + tuples[2:]
            + b"(K\x01t\x89}tR.",
            "tuple-bomb-as-argument": start + b"cos\nsystem\n" + tuples[2:] + b"R.",
            "tuple-bomb-as-location": start
            + b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000"
            + tuples[2:]
            + b"K\x04tQ.",
            "frozenset-bomb-as-key": b"\x80\x04}" + body + b"N" + b"s.",
            "frozenset-bomb-as-storage-key": b"\x80\x04(X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
            + body
            + b"X\x03\x00\x00\x00cpuK\x04tQ.",
            "frozenset-bomb": frozen + b".",
            "dict-bomb": start
            + empty
            + b"q\x00"
            + b"".join(b"}(K\x01h\x00K\x02h\x00uq\x00" for _ in range(200))
            + b".",
            "deep-lists": start + b"]" * 300_000 + b"a" * 299_999 + b".",
            "deep-opaque": start + b"cx\ny\nq\x000N" + b"".join(b"\x85q\x010h\x00h\x01R" for _ in range(50_000)) + b".",
            "wide-references": start + b"](" + b"N" * 100_000 + b"eq\x00](" + b"h\x00" * 100_000 + b"e.",
            "self-reference": start + b"]q\x00h\x00a.",
            "big-number-key": start + b"}\x8b\x10\x27\x00\x00" + b"\x7f" * 10_000 + FLOAT + b"s.",
            "many-classes": start + b"".join(b"cx\ny\n0" for _ in range(100_000)) + b"N.",
            "replaced-items": start + empty + b"}X\x05\x00\x00\x00itemsK\x05sb.",
            "odd-items": start + b"ccollections\nOrderedDict\nK\x05\x85R.",
            "many-references": start + FLOAT + b"q\x00](" + b"h\x00" * 50_000 + b"e.",
            "no-stop": start + b"]",
            "no-such-opcode": start + b"\xfe",
            "extension": start + b"\x82\x01.",
            "out-of-band": b"\x80\x05\x97.",
        }

    def test_bounded_time_and_memory(self, tmp_path: Path) -> None:
        for name, pickled in self.pickles().items():
            write_zip(tmp_path / name, pickled, {"0": bytes(16)})
        results = run_fresh(self.PROGRAM, folder=tmp_path, timeout_seconds=60).result
        assert set(results) == set(self.pickles())
        too_slow = {name: result for name, result in results.items() if result[1] > 3}
        too_large = {name: result for name, result in results.items() if result[2] > 100}
        assert not too_slow
        assert not too_large
        assert results["deep-lists"][0] == "UnmappableCheckpointError"
        assert results["many-references"][0] == "50000 tensors"
        assert results["big-number-key"][0] == "1 tensors"
        for name in ("tuple-bomb-as-storage-id", "bytearray", "no-stop", "extension"):
            assert results[name][0] == "CheckpointFormatError", name

    def test_what_python_can_save_is_not_too_deep(self, path: Path) -> None:
        value: object = torch.ones(1)
        for _ in range(150):
            value = [{"inner": (value,)}]
        torch.save(value, path)
        assert len(open_checkpoint(path)) == 1
        write_zip(path, b"\x80\x02" + b"]" * 1001 + b"a" * 1000 + b".")
        with pytest.raises(UnmappableCheckpointError, match="more than 1000 deep"):
            open_checkpoint(path)


def test_fifty_thousand_tensors_are_indexed_in_linear_time(tmp_path: Path) -> None:
    write = """
import torch
def write(path, count):
    torch.save({"state": {number: torch.tensor(float(number)) for number in range(count)}}, path)
"""
    assert_indexed_in_linear_time(write, 50_000, tmp_path)
