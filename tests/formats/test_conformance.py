"""One state, written in every format: the index, the load and the stream give the same bytes for each format.

A new format joins by one entry in ``WRITERS``. The checks are functions of a format, so that the last tests can hand
them formats that lie, and see that they notice.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import io
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_memload.checkpoint import (
    Checkpoint,
    Inventory,
    MappedCheckpoint,
)
from lightning_memload.errors import CheckpointFormatError, ChecksumError, MemloadError
from lightning_memload.formats import CheckpointFormat, load_mapped, open_checkpoint
from lightning_memload.formats.registry import FORMATS, find_format
from lightning_memload.storage.file_mapping import FileMapping
from lightning_memload.transfer import (
    RingLayout,
    choose_layout,
)
from tests.formats.conformance import (
    WRITERS,
    Case,
    check_index,
    check_load,
    check_recognition,
    check_stream,
    expected_values,
    format_of,
    in_order,
    parts_of,
    stream,
    values_of,
    write_case,
)
from tests.formats.files import as_bytes, tensors_of
from tests.fresh_process import run_fresh

pytestmark = [
    pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental"),
    pytest.mark.skipif(not FileMapping.supported, reason="mappings need Linux"),
]


# The writers ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    return {writer.label: write_case(writer, tmp_path_factory.mktemp(writer.label)) for writer in WRITERS}


@pytest.fixture(params=[writer.label for writer in WRITERS])
def case(request: pytest.FixtureRequest, cases: dict[str, Case]) -> Case:
    return cases[request.param]


# The checks ----------------------------------------------------------------------------------------------------------


def traces(folder: Path) -> list[str]:
    """Mappings and open descriptors of files in a folder."""
    gc.collect()
    found = [line for line in Path("/proc/self/maps").read_text().splitlines() if f"{folder}{os.sep}" in line]
    for number in os.listdir("/proc/self/fd"):
        try:
            link = os.readlink(f"/proc/self/fd/{number}")
        except FileNotFoundError:
            continue
        found += [link] if link.startswith(f"{folder}{os.sep}") else []
    return found


# The tests -----------------------------------------------------------------------------------------------------------


def test_every_format_has_a_writer() -> None:
    assert {known.name for known in FORMATS} == {writer.format for writer in WRITERS}
    assert len({known.name for known in FORMATS}) == len(FORMATS)


@pytest.mark.parametrize("known", FORMATS, ids=lambda known: known.name)
def test_recognizes_only_its_own(known: CheckpointFormat, cases: dict[str, Case], tmp_path: Path) -> None:
    check_recognition(known, cases)
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty").touch()
    (tmp_path / "text").write_text("12345678 is a number, and {this} is not")
    (tmp_path / "list.json").write_text('{"some": "other", "json": {}}')
    torch.save({"a": torch.ones(1)}, tmp_path / "legacy", _use_new_zipfile_serialization=False)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "picture.safetensors").write_bytes(b"\x89PNG\r\n\x1a\n and so on")
    for other in tmp_path.iterdir():
        assert not known.recognizes(str(other)), other


def test_the_format_is_told_without_its_suffix(case: Case, tmp_path: Path) -> None:
    assert find_format(case.path).name == case.writer.format
    again = case.again(tmp_path)
    if again.path.is_file():
        renamed = again.path.rename(again.path.parent / "no-suffix")
        assert values_of(load_mapped(renamed)[0]) == expected_values(case)


def test_index(case: Case) -> None:
    check_index(format_of(case), case)


def test_load(case: Case) -> None:
    check_load(format_of(case), case)


@pytest.mark.parametrize(
    "layout",
    [RingLayout(2, 4, 4096), RingLayout(1, 1, 12345), choose_layout(512 << 10, 1), choose_layout(8 << 20, 3)],
    ids=["16KiB", "odd", "512KiB", "8MiB"],
)
def test_stream(case: Case, layout: RingLayout) -> None:
    check_stream(format_of(case), case, layout)


def test_a_flipped_bit_is_told_where_there_are_checksums(case: Case, tmp_path: Path) -> None:
    again = case.again(tmp_path)
    index = open_checkpoint(again.path)
    large = next(info for info in index if info.name.endswith("large"))
    part = parts_of(large)[0]
    path, position = index.place(part.storage.offset + part.storage.nbytes // 2)
    with open(path, "r+b") as file:
        file.seek(position)
        (byte,) = file.read(1)
        file.seek(position)
        file.write(bytes([byte ^ 1]))
    loaded, mapped = load_mapped(again.path)
    destinations = {path: in_order(tensor) for path, tensor in tensors_of(loaded)}
    layout = choose_layout(512 << 10, 1)
    if case.writer.checksums:
        with pytest.raises(ChecksumError, match="is damaged"):
            stream(loaded, mapped, destinations, layout)
    else:
        stream(loaded, mapped, destinations, layout)
        assert as_bytes(destinations[large.path]) != as_bytes(case.expected[large.path])


MEASURE_READING = """
import os
from pathlib import Path
from lightning_memload.formats import load_mapped, open_checkpoint

def read_bytes():
    return int(Path("/proc/self/io").read_text().split("rchar:")[1].split()[0])

def resident_bytes(folder):
    "Pages of files of this folder that were read or written through a mapping."
    total, counts = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0] and not line.split()[0].endswith(":"):
            counts = folder + "/" in line
        elif counts and line.startswith("Rss:"):
            total += int(line.split()[1]) << 10
    return total

RESULT = {}
for label, (folder, path) in ARGS["paths"].items():
    load_mapped(path)  # late imports happen now
    open_checkpoint(path)
    start = read_bytes()
    open_checkpoint(path)
    opened = read_bytes() - start
    start = read_bytes()
    loaded, mapped = load_mapped(path, weights_only=True)
    located = mapped.locate_all(list(loaded.values()))
    read, touched = read_bytes() - start, resident_bytes(folder)
    total = float(loaded["ones"].sum())
    RESULT[label] = {
        "open": opened, "load": read, "touched": touched, "located": all(located), "sum": total,
        "touched by sum": resident_bytes(folder) + read_bytes() - start - read,
    }
"""


def test_neither_open_nor_load_read_tensor_data(tmp_path: Path) -> None:
    numel = 2 << 20
    paths = {}
    for writer in WRITERS:
        folder = tmp_path / writer.label
        folder.mkdir()
        path = writer.write(folder, {"ones": torch.ones(numel), "more": torch.zeros(64, 1000)})
        paths[writer.label] = [str(folder), str(path)]
    results = run_fresh(MEASURE_READING, paths=paths).result
    assert set(results) == set(paths)
    for label, result in results.items():
        # /proc/self/io and smaps themselves are read as well.
        assert result["open"] < 64 << 10, (label, result)
        assert result["load"] < 128 << 10, (label, result)
        assert result["touched"] == 0, (label, result)
        assert result["located"], label
        # The meter sees what it should see: the sum needs all of the bytes, however the format brings them.
        assert result["sum"] == numel
        assert result["touched by sum"] >= 4 * numel, (label, result)


class TestLettingGo:
    def test_detach_leaves_nothing_and_the_values_stay(self, case: Case, tmp_path: Path) -> None:
        again = case.again(tmp_path)
        loaded, mapped = load_mapped(again.path)
        assert traces(tmp_path)  # the meter can see
        assert mapped.referenced_bytes > 0
        kept = mapped.detach()
        assert kept >= max(tensor.nbytes for tensor in case.expected.values())
        assert traces(tmp_path) == []
        for file in again.files():
            file.unlink()
        assert values_of(loaded) == expected_values(case)
        assert all(mapped.locate(tensor) is None for _, tensor in tensors_of(loaded))
        dict(tensors_of(loaded))[next(path for path in case.expected if str(path[-1]).endswith("large"))].zero_()

    def test_without_references_nothing_is_kept(self, case: Case, tmp_path: Path) -> None:
        again = case.again(tmp_path)
        loaded, mapped = load_mapped(again.path)
        del loaded
        gc.collect()
        assert mapped.referenced_bytes == 0
        assert mapped.detach() == 0
        assert traces(tmp_path) == []

    def test_the_end_of_all_references_lets_go_too(self, case: Case, tmp_path: Path) -> None:
        again = case.again(tmp_path)
        loaded, mapped = load_mapped(again.path)
        del mapped
        assert traces(tmp_path)
        del loaded
        assert traces(tmp_path) == []

    def test_an_index_holds_nothing_open(self, case: Case, tmp_path: Path) -> None:
        again = case.again(tmp_path)
        index = open_checkpoint(again.path)
        assert traces(tmp_path) == []
        assert copy.deepcopy(pickle.loads(pickle.dumps(index))) == index

    def test_deleted_under_the_mapping(self, case: Case, tmp_path: Path) -> None:
        again = case.again(tmp_path)
        loaded, mapped = load_mapped(again.path)
        for file in again.files():
            file.unlink()
        layout = choose_layout(512 << 10, 1)
        destinations = {path: in_order(tensor) for path, tensor in tensors_of(loaded)}
        stream(loaded, mapped, destinations, layout)
        assert {path: as_bytes(tensor) for path, tensor in destinations.items()} == expected_values(case)
        assert values_of(loaded) == expected_values(case)
        mapped.detach()
        assert values_of(loaded) == expected_values(case)

    def test_writes_stay_in_the_process(self, case: Case, tmp_path: Path) -> None:
        again = case.again(tmp_path)
        before = {file: file.read_bytes() for file in again.files()}
        loaded, mapped = load_mapped(again.path)
        for _, tensor in tensors_of(loaded):
            tensor.view(-1)[:1].fill_(1) if tensor.numel() and tensor.is_contiguous() else None
        mapped.detach()
        assert {file: file.read_bytes() for file in again.files()} == before


class TestCopies:
    @pytest.fixture
    def loaded(self, case: Case, tmp_path: Path) -> tuple[Case, Any, MappedCheckpoint]:
        again = case.again(tmp_path)
        return again, *load_mapped(again.path)

    def test_deepcopy(self, loaded: tuple[Case, Any, MappedCheckpoint]) -> None:
        case, state, mapped = loaded
        copied = copy.deepcopy(state)
        assert values_of(copied) == expected_values(case)
        assert not any(mapped.holds(tensor) for _, tensor in tensors_of(copied) if tensor.numel())

    def test_saved_again(self, loaded: tuple[Case, Any, MappedCheckpoint]) -> None:
        case, state, _ = loaded
        stream = io.BytesIO()
        torch.save(state, stream)
        # The tensors' own storages, not the files under them.
        assert len(stream.getvalue()) < 1.1 * sum(file.stat().st_size for file in case.files()) + 64_000
        stream.seek(0)
        assert values_of(torch.load(stream)) == expected_values(case)

    def test_pickle(self, loaded: tuple[Case, Any, MappedCheckpoint]) -> None:
        case, state, _ = loaded
        compared = 0
        for path, tensor in tensors_of(state):
            try:
                pickle.loads(pickle.dumps(tensor.detach().clone()))
            except AttributeError:
                continue  # torch 2.13 cannot unpickle any tensor of a dtype without a storage class, such as uint16
            assert as_bytes(pickle.loads(pickle.dumps(tensor))) == as_bytes(case.expected[path])
            compared += 1
        assert compared > len(case.expected) // 2


def test_a_missing_path_and_an_unknown_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        open_checkpoint(tmp_path / "absent")
    with pytest.raises(CheckpointFormatError, match="is a directory, but no checkpoint of a known format"):
        open_checkpoint(tmp_path)


class Lying:
    """A format with one fault."""

    def __init__(self, truth: CheckpointFormat, fault: str) -> None:
        self.truth = truth
        self.fault = fault
        self.name = truth.name

    def recognizes(self, path: str) -> bool:
        return self.fault == "recognizes all" or (self.fault != "recognizes none" and self.truth.recognizes(path))

    def read_index(self, path: str) -> Checkpoint:
        return self.bend(self.truth.read_index(path))

    def bend(self, index: Checkpoint) -> Checkpoint:
        first = next(info for info in index if info.name.endswith("large"))
        moved = first.storage._replace(offset=first.storage.offset + 1)
        bends: dict[str, dict[str, Any]] = {
            "offset": {"storage": moved},
            "dtype": {"dtype": torch.int32},
            "shape": {"shape": (10, *first.shape[1:])},
            "stride": {"stride": tuple(reversed(first.stride))},
            "name": {"path": (*first.path[:-1], "other")},
        }
        bent = bends.get(self.fault, {})
        if first.chunks and self.fault in ("offset", "stride"):
            bent["chunks"] = (dataclasses.replace(first.chunks[0], **bent), *first.chunks[1:])
        tensors = tuple(info._replace(**bent) if info is first else info for info in index)
        storages = tuple(s._replace(crc32=5) if self.fault == "crc32" else s for s in index.storages)
        return dataclasses.replace(index, tensors=tensors[self.fault == "forgets" :], storages=storages)

    def take_inventory(self, path: str) -> Inventory:
        return self.truth.take_inventory(path)

    def load(self, path: str, *, weights_only: bool | None, erases: bool = False) -> tuple[Any, MappedCheckpoint]:
        loaded, mapped = self.truth.load(path, weights_only=weights_only, erases=erases)
        if self.fault == "reads":
            return copy.deepcopy(loaded), mapped
        if self.fault == "writes":
            next(tensor for name, tensor in tensors_of(loaded) if str(name[-1]).endswith("large")).mul_(1)
        if self.fault == "swaps":
            mapped.source.files = tuple(reversed(mapped.source.files))
        mapped.index = self.bend(mapped.index)
        return loaded, mapped


class TestTheChecksCanFail:
    """And pass for a format without a fault that goes through the same hands."""

    LAYOUT = choose_layout(512 << 10, 1)

    @pytest.mark.parametrize("fault", ["none", "offset", "dtype", "shape", "stride", "name", "crc32", "forgets"])
    def test_index(self, case: Case, fault: str) -> None:
        lying = Lying(format_of(case), fault)
        if fault == "none":
            check_index(lying, case)
        else:
            with pytest.raises(AssertionError):
                check_index(lying, case)

    @pytest.mark.parametrize("fault", ["none", "reads", "writes", "offset", "forgets"])
    def test_load(self, case: Case, fault: str) -> None:
        lying = Lying(format_of(case), fault)
        if fault == "none":
            check_load(lying, case)
        else:
            with pytest.raises(AssertionError):
                check_load(lying, case)

    @pytest.mark.parametrize("fault", ["none", "reads", "crc32", "swaps"])
    def test_stream(self, cases: dict[str, Case], fault: str) -> None:
        case = cases["torch" if fault == "crc32" else "shards"]
        lying = Lying(format_of(case), fault)
        if fault == "none":
            check_stream(lying, case, self.LAYOUT)
        else:
            with pytest.raises((AssertionError, MemloadError)):
                check_stream(lying, case, self.LAYOUT)

    @pytest.mark.parametrize("fault", ["none", "recognizes all", "recognizes none"])
    def test_recognition(self, cases: dict[str, Case], fault: str) -> None:
        lying = Lying(FORMATS[0], fault)
        if fault == "none":
            check_recognition(lying, cases)
        else:
            with pytest.raises(AssertionError):
                check_recognition(lying, cases)
