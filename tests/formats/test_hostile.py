"""Files made to do harm: no code of theirs runs, nothing outside them is touched, time and memory are bounded.

Each is a few bytes to some megabytes of disk, in a process of its own, whose peak the kernel tells.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.distributed.checkpoint import metadata as torch_metadata

from lightning_memload import CheckpointWriteError, save_directory, verify_checkpoint
from lightning_memload.save import save_torch
from tests.formats.dcp_shards import place_of, sharded, write_shards
from tests.formats.files import write_headers, write_zip
from tests.fresh_process import run_fresh

MIB = 1 << 20
TIB = 1 << 40

# Every way to look at a file and to load it, with default settings; errors must be those that are documented.
PROGRAM = """
import pathlib, pickle, time
from lightning_memload import MemloadError, open_checkpoint, verify_checkpoint
from lightning_memload.formats import load_mapped

def peak_bytes():
    words = pathlib.Path("/proc/self/status").read_text().split()
    return int(words[words.index("VmHWM:") + 1]) << 10

known = {"open": open_checkpoint, "load": load_mapped, "verify": verify_checkpoint}
RESULT = {}
for way in known:
    # So that the modules are there, and the first use of everything is over.
    known[way](ARGS["sound"])
for name, way in ((name, way) for name, ways in ARGS["cases"].items() for way in ways):
    print(name, way, flush=True)
    path = pathlib.Path(ARGS["folder"], name, "hostile")
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    before, started = peak_bytes(), time.perf_counter()
    try:
        outcome = known[way](path)
        outcome = "damaged" if getattr(outcome, "is_damaged", False) else "answered"
    except (MemloadError, pickle.UnpicklingError, OSError) as error:
        outcome = type(error).__name__
        assert len(str(error)) < 5000, str(error)[:5000]
    RESULT.setdefault(name, {})[way] = [outcome, time.perf_counter() - started, peak_bytes() - before]
"""


def absurd_directory(path: Path) -> None:
    path.write_bytes(b"PK\x03\x04")
    start, nbytes = 64, TIB - 200
    with open(path, "r+b") as file:
        file.seek(start + nbytes)
        file.write(struct.pack("<4sQ2H2I4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, 9, 9, nbytes, start))
        file.write(struct.pack("<4sIQI", b"PK\x06\x07", 0, start + nbytes, 1))
        file.write(struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 9, 9, 0xFFFFFFFF, 0xFFFFFFFF, 0))


def deflated(path: Path) -> None:
    """2 MiB that unpack to 2 GiB."""
    import zipfile

    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("archive/data.pkl", "w") as entry,
    ):
        for _ in range(128):
            entry.write(bytes(MIB))


def overlapping(path: Path) -> None:
    """Twenty thousand records, each of them the same gigabyte of the file."""
    names = ["a/data.pkl", *(f"a/data/{number}" for number in range(20_000))]
    write_headers([(name, 1 << 30) for name in names], path, at=[0] * len(names))


def shifted(path: Path) -> None:
    """Likewise, but each with a header of its own, so that all of them agree with the directory."""
    names = ["a/data.pkl", *(f"a/data/{number}" for number in range(20_000))]
    write_headers([(name, 1 << 30) for name in names], path, at=[number * 64 for number in range(len(names))])


def traversing(path: Path) -> None:
    names = ["../../../../tmp/data.pkl", "/etc/data/0", "..\\..\\x", "a/data/../../../x", "a/\x1b[2J"]
    write_headers([(name, 16) for name in names], path)


def evil_pickle(mark: str) -> bytes:
    word = f"touch {mark}".encode()
    return b"\x80\x02cos\nsystem\n(X" + len(word).to_bytes(4, "little") + word + b"tR."


class Evil:
    def __init__(self, mark: str) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


def evil_zip(path: Path) -> None:
    write_zip(path, evil_pickle(str(path.with_name("mark"))))


def evil_tensors(path: Path) -> None:
    torch.save({"state_dict": {"weight": torch.ones(3)}, "hook": Evil(str(path.with_name("mark")))}, path)


def evil_directory(path: Path) -> None:
    save_directory({"state_dict": {"weight": torch.ones(3)}, "hook": Evil(str(path.with_name("mark")))}, path)


def safetensors_header(path: Path, header: bytes, size: int = 0) -> None:
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(max(size, 8 + len(header)))


def safetensors_length(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 1 << 60) + b"{")
    os.truncate(path, TIB)


def safetensors_deep(path: Path) -> None:
    safetensors_header(path, b'{"a":' + b"[" * (4 * MIB))


def safetensors_many(path: Path) -> None:
    entry = b'{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    safetensors_header(path, b"{" + b",".join(b'"%d":%b' % (number, entry) for number in range(50_000)) + b"}")


def safetensors_large(path: Path) -> None:
    safetensors_header(path, b'{"a":{"dtype":"U8","shape":[%d],"data_offsets":[0,%d]}}' % (TIB, TIB), 1 << 20)


def shards(path: Path, name: str) -> None:
    path.mkdir()
    save_file({"a": torch.ones(2)}, path / "a.safetensors")
    content = {"weight_map": {"a": "a.safetensors", "b": name}}
    (path / "model.safetensors.index.json").write_text(json.dumps(content))


def shard_outside(path: Path) -> None:
    shards(path, "../secret.safetensors")


def shard_that_never_ends(path: Path) -> None:
    shards(path, "b.safetensors")
    (path / "b.safetensors").symlink_to("/dev/zero")


def shard_that_never_answers(path: Path) -> None:
    shards(path, "b.safetensors")
    os.mkfifo(path / "b.safetensors")


def saved_directory(path: Path) -> dict[str, Any]:
    save_directory({"state_dict": {"weight": torch.ones(8)}}, path)
    content: dict[str, Any] = json.loads((path / "manifest.json").read_text())
    return content


def manifest_absurd(path: Path) -> None:
    saved_directory(path)
    os.truncate(path / "manifest.json", TIB)


def manifest_deep(path: Path) -> None:
    saved_directory(path)
    (path / "manifest.json").write_text('{"format": "lightning_memload.tensor_directory",' + '"a":[' * (2 * MIB))


def manifest_sizes(path: Path) -> None:
    content = saved_directory(path)
    content["storages"][0]["nbytes"] = TIB
    (path / "manifest.json").write_text(json.dumps(content))


def manifest_outside(path: Path) -> None:
    content = saved_directory(path)
    content["storages"][0]["key"] = "../../secret"
    (path / "manifest.json").write_text(json.dumps(content))


def storage_is_a_link(path: Path) -> None:
    saved_directory(path)
    (path / "tensors" / "00000.bin").unlink()
    (path / "tensors" / "00000.bin").symlink_to("/dev/zero")


def storage_never_answers(path: Path) -> None:
    saved_directory(path)
    (path / "tensors" / "00000.bin").unlink()
    os.mkfifo(path / "tensors" / "00000.bin")


def sharded_directory(path: Path, edit: Callable[[Any], None] | None = None) -> None:
    write_shards(path, {"weight": sharded(torch.ones(8), 2), "epoch": 1}, edit=edit)


def sharded_absurd(path: Path) -> None:
    sharded_directory(path)
    os.truncate(path / ".metadata", TIB)


def sharded_evil(path: Path) -> None:
    sharded_directory(path)
    (path / ".metadata").write_bytes(evil_pickle(str(path.with_name("mark"))))


def sharded_evil_object(path: Path) -> None:
    write_shards(path, {"weight": sharded(torch.ones(8), 2), "object": Evil(str(path.with_name("mark")))})


def sharded_sizes(path: Path) -> None:
    def edit(metadata: Any) -> None:
        place_of(metadata, "weight").length = TIB

    sharded_directory(path, edit)


def sharded_outside(path: Path) -> None:
    def edit(metadata: Any) -> None:
        place_of(metadata, "weight").relative_path = "../../secret"

    sharded_directory(path, edit)


def sharded_overlapping(path: Path) -> None:
    """Twenty thousand entries, each of them nearly the whole file."""

    def edit(metadata: Any) -> None:
        info = place_of(metadata, "epoch")
        for number in range(20_000):
            metadata.state_dict_metadata[str(number)] = metadata.state_dict_metadata["epoch"]
            key = torch_metadata.MetadataIndex(str(number))
            metadata.storage_data[key] = dataclasses.replace(info, offset=number, length=MIB)
            metadata.planner_data[str(number)] = (str(number),)

    sharded_directory(path, edit)
    os.truncate(path / "__0_0.distcp", 2 * MIB)


def sharded_never_ends(path: Path) -> None:
    sharded_directory(path)
    (path / "__1_0.distcp").unlink()
    (path / "__1_0.distcp").symlink_to("/dev/zero")


def sharded_never_answers(path: Path) -> None:
    sharded_directory(path)
    (path / "__1_0.distcp").unlink()
    os.mkfifo(path / "__1_0.distcp")


def never_answers(path: Path) -> None:
    os.mkfifo(path)


ALL = ("open", "load", "verify")
REFUSED = {"open": "CheckpointFormatError", "load": "CheckpointFormatError", "verify": "damaged"}
UNMAPPABLE = {"open": "UnmappableCheckpointError", "load": "UnmappableCheckpointError"}

CASES: dict[Callable[[Path], None], dict[str, str]] = {
    absurd_directory: REFUSED,
    deflated: {**UNMAPPABLE, "verify": "UnmappableCheckpointError"},
    overlapping: REFUSED,
    shifted: REFUSED,
    traversing: REFUSED,
    # Reading a file as long as a disk takes as long as it takes: these are not verified here.
    lambda path: write_headers([("a/data.pkl", TIB)], path): UNMAPPABLE,
    lambda path: write_headers([("a/byteorder", TIB), ("a/data.pkl", 10)], path): UNMAPPABLE,
    evil_zip: {"open": "answered", "load": "UnsafeGlobalsError", "verify": "answered"},
    evil_tensors: {"open": "answered", "load": "UnsafeGlobalsError", "verify": "answered"},
    evil_directory: {"open": "answered", "load": "UnsafeGlobalsError", "verify": "answered"},
    safetensors_length: REFUSED,
    safetensors_deep: REFUSED,
    safetensors_many: dict.fromkeys(ALL, "answered"),
    safetensors_large: REFUSED,
    shard_outside: REFUSED,
    shard_that_never_ends: REFUSED,
    shard_that_never_answers: REFUSED,
    manifest_absurd: REFUSED,
    manifest_deep: REFUSED,
    manifest_sizes: REFUSED,
    manifest_outside: REFUSED,
    storage_is_a_link: REFUSED,
    storage_never_answers: REFUSED,
    sharded_absurd: REFUSED,
    sharded_evil: REFUSED,
    sharded_evil_object: {"open": "answered", "load": "UnsafeGlobalsError", "verify": "answered"},
    sharded_sizes: REFUSED,
    sharded_outside: REFUSED,
    sharded_overlapping: REFUSED,
    sharded_never_ends: REFUSED,
    sharded_never_answers: REFUSED,
    never_answers: dict.fromkeys(ALL, "CheckpointFormatError"),
}
NAMES = [make.__name__ if make.__name__ != "<lambda>" else f"record-{number}" for number, make in enumerate(CASES)]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, list[Any]]]:
    """The outcome of every case, in one process. The mark of its peak is reset before each case."""
    folder = tmp_path_factory.mktemp("hostile")
    torch.save({"weight": torch.ones(3)}, folder / "sound")
    for name, make in zip(NAMES, CASES, strict=True):
        (folder / name).mkdir()
        make(folder / name / "hostile")
    before = sorted(str(path) for path in folder.rglob("*"))
    cases = {name: list(expected) for name, expected in zip(NAMES, CASES.values(), strict=True)}
    done = run_fresh(PROGRAM, folder=folder, sound=folder / "sound", cases=cases, timeout_seconds=200)
    # Nothing was run, and nothing written.
    assert sorted(str(path) for path in folder.rglob("*")) == before
    outcome: dict[str, dict[str, list[Any]]] = done.result
    return outcome


@pytest.mark.memory
@pytest.mark.parametrize("make", CASES, ids=NAMES)
def test_is_refused_in_bounded_time_and_memory(
    make: Callable[[Path], None], results: dict[str, dict[str, list[Any]]]
) -> None:
    result = results[NAMES[list(CASES).index(make)]]
    assert {way: outcome for way, (outcome, _, _) in result.items()} == CASES[make]
    for way, (_, seconds, grown_bytes) in result.items():
        assert seconds < 15, (way, seconds)
        assert grown_bytes < 120 * MIB, (way, grown_bytes)


def test_the_pickles_can_do_harm(tmp_path: Path) -> None:
    """Or the tests above would prove nothing."""
    evil_zip(tmp_path / "hostile")
    torch.load(tmp_path / "hostile", weights_only=False)
    assert (tmp_path / "mark").exists()


class TestTemporaryNames:
    """An attacker guesses the name of a temporary file and puts a link to another file there."""

    @pytest.fixture
    def victim(self, tmp_path: Path) -> Path:
        victim = tmp_path / "victim"
        victim.write_text("precious")
        return victim

    @pytest.mark.parametrize("save", [save_torch, save_directory])
    def test_a_planted_link_is_not_followed(
        self, save: Callable[..., Any], tmp_path: Path, victim: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import secrets

        guesses = ["0" * 16, *(f"{number:016x}" for number in range(1, 1000))]
        monkeypatch.setattr(secrets, "token_hex", lambda *_: guesses.pop(0))
        folder = tmp_path / "run"
        folder.mkdir()
        made: list[str] = []
        opening, making = os.open, os.mkdir

        def plant(path: Any) -> None:
            name = os.path.basename(os.fspath(path))
            if name.startswith(".") and not made:
                made.append(name)
                os.symlink(victim, path)

        def racing_open(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
            if flags & os.O_CREAT:
                plant(path)
            return opening(path, flags, *args, **kwargs)

        def racing_mkdir(path: Any, *args: Any, **kwargs: Any) -> None:
            plant(path)
            making(path, *args, **kwargs)

        monkeypatch.setattr(os, "open", racing_open)
        monkeypatch.setattr(os, "mkdir", racing_mkdir)
        with contextlib.suppress(FileExistsError, CheckpointWriteError):
            save({"weight": torch.ones(3)}, folder / "checkpoint")
        assert made
        assert victim.read_text() == "precious"
        # Another name, or no file: never the file of the attacker.
        assert not (folder / "checkpoint").exists() or verify_checkpoint(folder / "checkpoint").is_verified
