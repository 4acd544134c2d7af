"""Verifying: every flipped byte and every truncation is found, or told to be beyond finding, in bounded memory."""

from __future__ import annotations

import json
import os
import re
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lightning_memload import (
    CheckpointFormatError,
    UnmappableCheckpointError,
    VerifyReport,
    open_checkpoint,
    save_directory,
    verify_checkpoint,
)
from lightning_memload.bytes import FileRange
from lightning_memload.formats import load_mapped
from lightning_memload.formats.dcp.metadata import SavedTensor, read_metadata
from lightning_memload.formats.registry import FORMATS
from lightning_memload.formats.torch_zip.reader import read_zip_inventory
from lightning_memload.storage import FileSet, LocalFile
from lightning_memload.verify import verification as verify_module
from tests.formats.dcp_shards import change, chunks_of, place_of, sharded, write_shards
from tests.formats.files import as_bytes, save_bytes, save_sparse, tensors_of, write_zip
from tests.fresh_process import run_fresh

# One for each byte, in turn.
FLIPS = (0x01, 0x10, 0xFF, 0x80)


def small() -> dict[str, Any]:
    tied = torch.arange(8.0)
    return {
        "state_dict": {"weight": tied, "tied": tied[2:5], "bias": torch.ones(3, dtype=torch.int16)},
        "empty": torch.empty(0),
        "epoch": 1,
    }


def contents(value: Any) -> list[tuple[Any, ...]]:
    return [(path, t.dtype, t.shape, t.stride(), as_bytes(t)) for path, t in tensors_of(value)]


def outcome(path: Path) -> VerifyReport | None:
    """The report, ``None`` where the file is not even taken for a checkpoint."""
    try:
        return verify_checkpoint(path)
    except CheckpointFormatError:
        return None


def is_found(path: Path) -> bool:
    report = outcome(path)
    return report is None or report.is_damaged


def flipped(data: bytes) -> Iterator[tuple[int, bytes]]:
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= FLIPS[position % len(FLIPS)]
        yield position, bytes(damaged)


def without_meaning(data: bytes, path: Path) -> set[int]:
    """Every byte of a torch zip file that no reader looks at, or that a reader finds elsewhere as well."""
    found: set[int] = set()
    path.write_bytes(data)
    with zipfile.ZipFile(path) as archive:
        entries, position = archive.infolist(), archive.start_dir
    for entry in entries:
        start = entry.header_offset
        name_length, extra_length = struct.unpack_from("<2H", data, start + 26)
        found.update(range(start + 4, start + 6))  # the version needed to extract
        # Checksum and sizes, which the descriptor and the directory have: empty, or right.
        found.update(range(start + 14, start + 26))
        extra = start + 30 + name_length
        found.update(range(extra, extra + extra_length))  # padding
        if entry.file_size == 0:
            found.update(range(start + 28, start + 30))  # of nothing: where nothing starts
        found.update(range(position + 4, position + 8))  # versions
        found.update(range(position + 36, position + 42))  # attributes of a file, which are for its extraction
        position += 46 + sum(struct.unpack_from("<3H", data, position + 28))
    found.update(range(position + 12, position + 16))  # versions at the end
    return found


class TestTorch:
    @pytest.mark.slow
    def test_every_flipped_byte(self, tmp_path: Path) -> None:
        path = tmp_path / "checkpoint.pt"
        data = save_bytes(small())
        harmless = without_meaning(data, path)
        expected = contents(torch.load(path))
        unfound: set[int] = set()
        for position, damaged in flipped(data):
            path.write_bytes(damaged)
            if is_found(path):
                continue
            unfound.add(position)
            assert position in harmless, f"byte {position}, {damaged[position]:#x} instead of {data[position]:#x}"
            assert contents(torch.load(path)) == expected
            assert contents(load_mapped(path)[0]) == expected
        assert unfound

    def test_the_bits_that_mislead_torch(self, tmp_path: Path) -> None:
        """A record that is marked as a directory, and a last entry with a longer name."""
        path = tmp_path / "checkpoint.pt"
        data = save_bytes(small())
        path.write_bytes(data)
        with zipfile.ZipFile(path) as archive:
            entries, position = archive.infolist(), archive.start_dir
        for number, entry in enumerate(entries):
            lengths = struct.unpack_from("<3H", data, position + 28)
            for offset, flip in (
                (38, 0x10),
                (34, 1),
                *([(28, 1), (30, 1), (32, 1)] if number == len(entries) - 1 else []),
            ):
                damaged = bytearray(data)
                damaged[position + offset] ^= flip
                path.write_bytes(damaged)
                assert is_found(path), (entry.filename, offset)
            position += 46 + sum(lengths)

    @pytest.mark.parametrize(
        "make", [lambda data, end: data[:end], lambda data, end: data[:end] + bytes(len(data) - end)]
    )
    def test_every_truncation(self, tmp_path: Path, make: Callable[[bytes, int], bytes]) -> None:
        """Cut, or followed by zeros as after a power failure."""
        path = tmp_path / "checkpoint.pt"
        data = save_bytes(small())
        for length in range(0, len(data), 3):
            if make(data, length) != data:
                path.write_bytes(make(data, length))
                assert is_found(path), length

    def test_all_damage_is_listed(self, tmp_path: Path) -> None:
        path = tmp_path / "checkpoint.pt"
        torch.save({f"layer{number}": torch.full((5000,), number) for number in range(30)}, path)
        sound = verify_checkpoint(path)
        assert (sound.is_verified, sound.is_damaged, sound.bytes_without_checksum) == (True, False, 0)
        with zipfile.ZipFile(path) as archive:
            records = {entry.filename.partition("/")[2]: entry for entry in archive.infolist()}
        assert sound.num_verified == len(records)
        assert sound.bytes_verified == sum(entry.file_size for entry in records.values())
        data = bytearray(path.read_bytes())
        where = {}
        for number in (3, 7, 29):
            entry = records[f"data/{number}"]
            extra = sum(struct.unpack_from("<2H", data, entry.header_offset + 26))
            where[f"layer{number}"] = entry.header_offset + 30 + extra
            data[where[f"layer{number}"] + 40_000 - 1] ^= 4
        data[records["version"].header_offset + 8] ^= 1
        path.write_bytes(data)
        report = verify_checkpoint(path)
        # The header of one record is wrong, so names cannot be trusted, but everything is checked all the same.
        assert len(report.damage) == 4
        data[records["version"].header_offset + 8] ^= 1
        path.write_bytes(data)
        report = verify_checkpoint(path, num_threads=3)
        # In the order of the file, which is that of the keys as text in torch 2.6.
        damage = {item.key: item for item in report.damage}
        assert list(damage) == sorted(where, key=lambda key: where[key])
        for number in (3, 7, 29):
            item = damage[f"layer{number}"]
            assert (item.offset, item.path) == (where[f"layer{number}"], str(path))
            assert item.expected == records[f"data/{number}"].CRC
            assert item.actual not in (None, item.expected)
            assert f"have CRC-32 {item.actual:#010x}, but the file records {item.expected:#010x}" in str(report)
        assert report.bytes_verified == sound.bytes_verified - 3 * 40_000
        assert "damaged, 3 problems" in str(report)

    def test_files_without_checksums_are_told_as_such(self, tmp_path: Path) -> None:
        path = tmp_path / "checkpoint.pt"
        before = torch.serialization.get_crc32_options()
        torch.serialization.set_crc32_options(False)
        try:
            torch.save(small(), path)
        finally:
            torch.serialization.set_crc32_options(before)
        report = verify_checkpoint(path)
        assert (report.is_damaged, report.is_verified, report.bytes_verified) == (False, False, 0)
        assert report.bytes_without_checksum > 38
        assert "could be read but not verified" in str(report)
        assert "nothing wrong was found, but not all of it can be verified" in str(report)

    def test_what_cannot_be_verified_is_an_error(self, tmp_path: Path) -> None:
        write_zip(tmp_path / "packed", b"\x80\x02N.", compression=zipfile.ZIP_DEFLATED)
        with pytest.raises(UnmappableCheckpointError, match="compressed"):
            verify_checkpoint(tmp_path / "packed")
        (tmp_path / "old").mkdir()
        torch.save({}, tmp_path / "old" / "pytorch_model.bin", _use_new_zipfile_serialization=False)
        with pytest.raises(UnmappableCheckpointError, match=r"since torch 1\.6"):
            verify_checkpoint(tmp_path / "old")
        (tmp_path / "text").write_text("hello")
        with pytest.raises(CheckpointFormatError, match="none of the known formats"):
            verify_checkpoint(tmp_path / "text")
        with pytest.raises(FileNotFoundError):
            verify_checkpoint(tmp_path / "nothing")

    def test_the_other_byte_order_is_verified_too(self, tmp_path: Path) -> None:
        report = verify_checkpoint(write_zip(tmp_path / "big", b"\x80\x02N.", byteorder=b"big"))
        assert report.is_verified

    def test_records_beyond_four_gibibytes(self, tmp_path: Path) -> None:
        """Whose descriptors are longer, however small they are."""
        path = tmp_path / "sparse.pt"
        save_sparse(path, {"small": 10, "large": (1 << 32) + 5, "beyond": 10})
        index = open_checkpoint(path)
        assert index["beyond"].storage.offset > 1 << 32
        with LocalFile(path) as file:
            _, damage = read_zip_inventory(file)
        assert damage == []
        with open(path, "r+b") as changed:
            changed.seek(index["beyond"].storage.offset + 10 + 8)
            changed.write(b"\xff")
        with LocalFile(path) as file:
            _, damage = read_zip_inventory(file)
        (item,) = damage
        assert "packed size 10" in item.problem

    def test_a_pickle_that_contradicts_its_records(self, tmp_path: Path) -> None:
        write_zip(tmp_path / "odd", b"\x80\x02K\x07Q.")
        (item,) = verify_checkpoint(tmp_path / "odd").damage
        assert "refers to 7 outside itself" in item.problem


class TestSafetensors:
    @pytest.mark.slow
    def test_every_flipped_byte_is_found_or_told(self, tmp_path: Path) -> None:
        path = tmp_path / "model.safetensors"
        save_file(small()["state_dict"] | {"tied": torch.ones(2)}, path, metadata={"format": "pt"})
        data = path.read_bytes()
        found = 0
        for _, damaged in flipped(data):
            path.write_bytes(damaged)
            report = outcome(path)
            if report is None or report.is_damaged:
                found += 1
                continue
            assert not report.is_verified
            assert report.bytes_verified == 0
            assert report.bytes_without_checksum == len(data)
        assert found > 100
        for length in range(0, len(data), 3):
            path.write_bytes(data[:length])
            assert is_found(path)

    def test_every_damaged_shard_is_listed(self, tmp_path: Path) -> None:
        for number in range(4):
            save_file({f"weight{number}": torch.ones(100)}, tmp_path / f"{number}.safetensors")
        for number in (1, 3):
            os.truncate(tmp_path / f"{number}.safetensors", 300)
        report = verify_checkpoint(tmp_path)
        assert [item.path for item in report.damage] == [str(tmp_path / f"{n}.safetensors") for n in (1, 3)]
        assert report.bytes_without_checksum == sum(
            os.path.getsize(tmp_path / f"{number}.safetensors") for number in (0, 2)
        )


BESIDE = [(False, ("tensors/00000.bin", "tensors/00001.bin")), (True, ("model.safetensors",))]


class TestDirectory:
    @pytest.mark.slow
    @pytest.mark.parametrize(("safetensors", "beside"), BESIDE)
    def test_every_flipped_byte(self, tmp_path: Path, safetensors: bool, beside: tuple[str, ...]) -> None:
        path = tmp_path / "checkpoint"
        save_directory(small(), path, safetensors=safetensors)
        assert verify_checkpoint(path).is_verified
        expected = contents(load_mapped(path)[0])
        state = (path / "state.pt").read_bytes()
        harmless = {"state.pt": without_meaning(state, tmp_path / "state.pt")}
        manifest = (path / "manifest.json").read_text()
        # White space between the words of JSON may be another one.
        harmless["manifest.json"] = {number for number, sign in enumerate(manifest) if sign.isspace()}
        for name in ("manifest.json", "state.pt", *beside):
            data = (path / name).read_bytes()
            for position, damaged in flipped(data):
                (path / name).write_bytes(damaged)
                if not is_found(path):
                    assert position in harmless.get(name, ()), f"{name}: byte {position}"
                    assert contents(load_mapped(path)[0]) == expected
            (path / name).write_bytes(data)
        assert json.loads(manifest)

    @pytest.mark.parametrize(("safetensors", "beside"), BESIDE)
    def test_every_truncation(self, tmp_path: Path, safetensors: bool, beside: tuple[str, ...]) -> None:
        path = tmp_path / "checkpoint"
        save_directory(small(), path, safetensors=safetensors)
        for name in ("manifest.json", "state.pt", *beside):
            data = (path / name).read_bytes()
            end = len(data.rstrip()) if name == "manifest.json" else len(data)
            for length in range(0, end, 3):
                (path / name).write_bytes(data[:length])
                assert is_found(path), (name, length)
            (path / name).write_bytes(data)

    def test_all_damage_is_listed(self, tmp_path: Path) -> None:
        path = tmp_path / "checkpoint"
        save_directory([torch.full((100,), number) for number in range(6)], path)
        (path / "tensors" / "00001.bin").unlink()
        os.truncate(path / "tensors" / "00002.bin", 5)
        data = bytearray((path / "tensors" / "00004.bin").read_bytes())
        data[17] ^= 1
        (path / "tensors" / "00004.bin").write_bytes(data)
        report = verify_checkpoint(path)
        files = [str(path / "tensors" / f"0000{number}.bin") for number in (1, 2, 4)]
        assert [item.path for item in report.damage] == files
        missing, short, wrong = report.damage
        assert (missing.expected, missing.actual) == (800, None)
        assert (short.expected, short.actual) == (800, 5)
        assert (wrong.offset, wrong.key) == (0, "tensors/00004.bin")


class TestDcp:
    """Whose metadata are the only description of what lies where, and have no checksum."""

    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        return write_shards(tmp_path / "dcp", {"weight": sharded(torch.arange(6.0), 2), "epoch": 7})

    @pytest.mark.slow
    def test_every_flipped_byte_is_found_or_told(self, path: Path, tmp_path: Path) -> None:
        sound = verify_checkpoint(path)
        assert not sound.is_damaged
        entries = read_metadata(str(path / ".metadata")).entries
        # Nothing says whether the metadata are what was written, and no report may be taken to say so.
        assert not sound.is_verified
        assert sound.bytes_without_checksum == os.path.getsize(path / ".metadata")
        expected = contents(load_mapped(path)[0])
        for file in sorted(path.iterdir()):
            data = file.read_bytes()
            harmless: set[int] = set()
            for entry in entries if file.suffix else ():
                if entry.file == file.name:
                    within = without_meaning(data[entry.offset : entry.end], tmp_path / "entry.pt")
                    harmless.update(entry.offset + position for position in within)
            found = 0
            for position, damaged in flipped(data):
                if file.name == "__1_0.distcp" and position % 7:
                    continue  # the like of what the other file holds
                file.write_bytes(damaged)
                report = outcome(path)
                if report is None or report.is_damaged:
                    found += 1
                elif file.suffix:
                    assert position in harmless, f"{file.name}: byte {position}"
                    assert contents(load_mapped(path)[0]) == expected
                else:
                    assert (report.is_verified, report.bytes_without_checksum) == (False, len(data))
            assert found > len(data) // 30
            file.write_bytes(data)

    def test_every_truncation(self, path: Path) -> None:
        for file in sorted(path.iterdir()):
            data = file.read_bytes()
            for length in range(0, len(data), 13):
                file.write_bytes(data[:length])
                assert is_found(path), (file.name, length)
            file.write_bytes(data)

    def test_all_damage_is_listed(self, tmp_path: Path) -> None:
        """Of every kind at once, and each once: gone, cut, flipped, contradicting."""
        tensor = torch.randn(8, 500)
        path = write_shards(tmp_path / "dcp", {"a": sharded(tensor, 8), "b": sharded(tensor, 8), "c": 1, "d": [2]})
        sound = verify_checkpoint(path)
        entries = read_metadata(str(path / ".metadata")).items

        def entry_of(name: str, rank: int) -> FileRange:
            item = entries[name]
            assert isinstance(item, SavedTensor)
            return item.chunks[rank].entry

        (path / "__1_0.distcp").unlink()
        os.truncate(path / "__2_0.distcp", entry_of("b", 2).offset + 5)  # "a" before it is still whole
        for name, rank in (("a", 3), ("a", 4), ("b", 4)):
            entry = entry_of(name, rank)
            data = bytearray((path / entry.file).read_bytes())
            position = data.index(tensor[rank].numpy().tobytes(), entry.offset)
            data[position + 7] ^= 1
            (path / entry.file).write_bytes(data)
        data = bytearray((path / "__5_0.distcp").read_bytes())
        data[entry_of("b", 5).offset] ^= 1
        (path / "__5_0.distcp").write_bytes(data)

        def edit(metadata: Any) -> None:
            chunks_of(metadata, "a")[6].sizes = torch.Size((2, 500))
            metadata.state_dict_metadata["b"].properties.dtype = torch.int32
            place_of(metadata, "c").relative_path = "../c"
            metadata.planner_data["d"] = ()

        change(path, edit)
        report = verify_checkpoint(path)
        told = [(os.path.basename(item.path), item.problem) for item in report.damage]
        expected = [
            (".metadata", r"it places c in '\.\./c'"),
            (".metadata", r"chunks of a overlap"),
            (".metadata", r"keys that lead to d are \(\)"),
            ("__0_0.distcp", r"the chunk at \(0, 0\) of b is torch\.int32 of .* what lies there is torch\.float32"),
            ("__1_0.distcp", r"is missing"),
            ("__2_0.distcp", r"is truncated: .metadata declares data through byte \d+, but the file is only \d+ bytes"),
            ("__3_0.distcp", r"of a at \(3, 0\) .* have CRC-32"),
            ("__4_0.distcp", r"of a at \(4, 0\) .* have CRC-32"),
            ("__4_0.distcp", r"of b at \(4, 0\) .* have CRC-32"),
            ("__5_0.distcp", r"the entry of b at \(5, 0\) at byte \d+"),
        ]
        assert len(told) == len(expected), told
        for file, pattern in expected:
            found = [problem for name, problem in told if name == file and re.search(pattern, problem)]
            assert len(found) == 1, (file, pattern, told)
        assert sound.num_verified > report.num_verified > 0


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """10 MiB and small records between."""
    path = tmp_path / "large.pt"
    torch.save({f"t{n}": torch.full((n % 7 * 100_000 + n,), float(n)) for n in range(20)}, path)
    return path


@pytest.mark.parametrize("num_threads", [None, 1, 5])
def test_progress_ends_at_all_bytes(large: Path, num_threads: int | None) -> None:
    seen: list[tuple[int, int]] = []
    report = verify_checkpoint(large, num_threads=num_threads, progress=lambda done, total: seen.append((done, total)))
    assert report.is_verified
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (report.bytes_verified, report.bytes_verified)
    assert num_threads is None or report.num_threads == num_threads


def test_progress_as_a_bar(large: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verify_checkpoint(large, progress=True)
    assert "Verifying" in capsys.readouterr().err


def test_progress_may_end_the_verification(large: Path) -> None:
    class Enough(Exception):
        pass

    calls = []

    def stop(done: int, total: int) -> None:
        calls.append(done)
        raise Enough

    with pytest.raises(Enough):
        verify_checkpoint(large, progress=stop, num_threads=4)
    assert len(calls) <= 4


def test_num_threads_must_be_positive(large: Path) -> None:
    with pytest.raises(ValueError, match="num_threads must be at least 1"):
        verify_checkpoint(large, num_threads=0)


def test_bytes_that_the_disk_does_not_give(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reading = FileSet.readv
    bad = range(3 << 20, (3 << 20) + 1)

    def readv(self: FileSet, buffers: Any, offset: int) -> int:
        if offset <= bad.start < offset + sum(len(buffer) for buffer in buffers):
            raise OSError(5, "Input/output error")
        return reading(self, buffers, offset)

    monkeypatch.setattr(FileSet, "readv", readv)
    report = verify_checkpoint(large)
    assert report.is_damaged
    assert all("Input/output error" in item.problem for item in report.damage)
    assert report.num_verified > 15


def test_a_file_that_is_cut_while_it_is_read(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def source(paths: list[str]) -> FileSet:
        files = FileSet(paths)
        os.truncate(large, 5 << 20)
        return files

    monkeypatch.setattr(verify_module, "FileSet", source)
    report = verify_checkpoint(large)
    assert report.is_damaged
    assert all("cut short" in item.problem for item in report.damage)


def test_every_format_takes_an_inventory() -> None:
    assert [hasattr(candidate, "take_inventory") for candidate in FORMATS] == [True] * len(FORMATS)


@pytest.mark.memory
def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    program = """
import torch
from lightning_memload import MemoryMonitor, verify_checkpoint
path = ARGS["folder"] + "/checkpoint.pt"
torch.save({f"t{n}": torch.full((8 << 20,), float(n)) for n in range(10)}, path)
verify_checkpoint(path)
RESULT = {}
with MemoryMonitor() as monitor:
    report = verify_checkpoint(path, num_threads=4)
RESULT["verify"] = monitor.peaks.anonymous_above_start_bytes
RESULT["verified"] = report.bytes_verified
with MemoryMonitor() as monitor:
    state = torch.load(path)
RESULT["load"] = monitor.peaks.anonymous_above_start_bytes
"""
    result = run_fresh(program, folder=tmp_path).result
    assert result["verified"] >= 320 << 20
    assert result["load"] >= 300 << 20  # the meter sees what is read the naive way
    assert result["verify"] <= (4 << 20) + (12 << 20)  # the buffers, the stacks of threads, the index
