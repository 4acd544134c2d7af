"""A directory of single tensors: what comes back is what torch.load gives, and damage of any kind is told."""

from __future__ import annotations

import collections
import errno
import json
import os
import pickle
import shutil
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_memload.checkpoint import Checkpoint, MappedCheckpoint, span_bytes
from lightning_memload.errors import (
    CheckpointFormatError,
    CheckpointReadError,
    ChecksumError,
    MemloadError,
    UnmappableCheckpointError,
)
from lightning_memload.formats import load_mapped, open_checkpoint
from lightning_memload.formats.tensor_directory import reader as tensor_directory
from lightning_memload.save import save_directory
from tests.formats.files import ALL_DTYPES, Settings, as_bytes, layouts, nested, of_dtype, tensors_of, write_zip
from tests.formats.streaming import stream
from tests.fresh_process import run_fresh

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "checkpoint"


def lightning_like() -> dict[str, Any]:
    """A checkpoint of Lightning, with some objects that users add."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.BatchNorm1d(7), torch.nn.Linear(7, 5))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, 5)).sum().backward()
    optimizer.step()
    return {
        "epoch": 3,
        "global_step": 17,
        "pytorch-lightning_version": "2.6.0",
        "state_dict": model.state_dict(),
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [{"last_epoch": 3, "_last_lr": [0.1]}],
        "callbacks": {
            "Averages": {"weights": collections.OrderedDict(a=torch.randn(3)), "by_step": {7: torch.ones(2)}}
        },
        "nested": nested(),
        "layouts": layouts(),
        "dtypes": {str(dtype): of_dtype(dtype) for dtype in ALL_DTYPES},
    }


def assert_same_as_torch(saved: Any, path: Path, tmp_path: Path) -> tuple[Any, MappedCheckpoint]:
    torch.save(saved, tmp_path / "stock.pt")
    expected = torch.load(tmp_path / "stock.pt", weights_only=False)
    save_directory(saved, path)
    loaded, mapped = load_mapped(path, weights_only=False)
    ours, theirs = list(tensors_of(loaded)), list(tensors_of(expected))
    assert [name for name, _ in ours] == [name for name, _ in theirs]
    for (name, mine), (_, other) in zip(ours, theirs, strict=True):
        assert type(mine) is type(other), name
        assert (mine.dtype, mine.shape, mine.stride(), mine.requires_grad, mine.device) == (
            other.dtype, other.shape, other.stride(), other.requires_grad, other.device,
        )  # fmt: skip
        assert as_bytes(mine) == as_bytes(other), name
        if mine.numel():
            pieces = mapped.locate(mine)
            assert pieces is not None, name
            (piece,) = pieces
            raw = torch.frombuffer(bytearray(bytes_at(mapped, piece.offset, span_bytes(mine))), dtype=mine.dtype)
            assert as_bytes(raw.as_strided(mine.shape, piece.stride)) == as_bytes(other), name
    assert ties(ours) == ties(theirs)
    return loaded, mapped


def bytes_at(mapped: MappedCheckpoint, offset: int, nbytes: int) -> bytes:
    name, position = mapped.index.place(offset)
    return Path(name).read_bytes()[position : position + nbytes]


def ties(tensors: list[tuple[Any, torch.Tensor]]) -> list[tuple[Any, Any]]:
    storages = [(name, tensor.untyped_storage().data_ptr()) for name, tensor in tensors if tensor.numel()]
    return [(a, b) for a, x in storages for b, y in storages if x == y]


class TestRoundTrip:
    def test_a_whole_checkpoint(self, path: Path, tmp_path: Path) -> None:
        saved = lightning_like()
        loaded, mapped = assert_same_as_torch(saved, path, tmp_path)
        assert loaded["state_dict"]._metadata == saved["state_dict"]._metadata
        assert loaded["nested"]["default"].default_factory is list
        assert loaded["optimizer_states"][0]["param_groups"] == saved["optimizer_states"][0]["param_groups"]
        assert loaded["lr_schedulers"] == saved["lr_schedulers"]
        assert loaded["nested"]["plain"] == saved["nested"]["plain"]
        for name, value in stream(mapped.index, mapped).items():
            assert as_bytes(value) == as_bytes(of_name(loaded, mapped.index[name].path)), name

    def test_what_only_torch_knows_to_save(self, path: Path) -> None:
        shared = torch.arange(6.0)
        saved = {
            "user": Settings(table=shared),
            "tied": shared[2:],
            "module": torch.nn.Linear(3, 2),
            "sparse": torch.eye(3).to_sparse(),
            "conjugate": torch.randn(3, dtype=torch.complex64).conj(),
            "meta": torch.empty(3, device="meta"),
            "subclass": torch.nn.parameter.Buffer(torch.ones(4)),
        }
        saved["module"].weight.note = "of a user"
        saved["list"] = [saved["module"].weight] * 2
        save_directory(saved, path)
        loaded, mapped = load_mapped(path, weights_only=False)
        assert torch.equal(loaded["user"].table, shared)
        assert loaded["user"].table.data_ptr() + 8 == loaded["tied"].data_ptr()
        assert mapped.locate(loaded["user"].table) is not None
        assert loaded["module"].weight is loaded["list"][0] is loaded["list"][1]
        assert loaded["module"].weight.note == "of a user"
        assert mapped.locate(loaded["module"].weight) is not None
        assert torch.equal(loaded["sparse"].to_dense(), torch.eye(3))
        assert torch.equal(loaded["conjugate"], saved["conjugate"])  # type: ignore[arg-type]
        assert loaded["meta"].is_meta
        assert torch.equal(loaded["subclass"], torch.ones(4))

    @pytest.mark.parametrize("saved", [torch.arange(5), [], {"epoch": 1}, {"empty": torch.empty(0)}, None])
    def test_hardly_anything(self, saved: Any, path: Path) -> None:
        save_directory(saved, path)
        loaded, mapped = load_mapped(path, weights_only=True)
        assert [as_bytes(t) for _, t in tensors_of(loaded)] == [as_bytes(t) for _, t in tensors_of(saved)]
        assert type(loaded) is type(saved)
        assert len(open_checkpoint(path)) == len(list(tensors_of(saved)))
        mapped.detach()

    def test_nothing_of_the_files_is_left(self, path: Path) -> None:
        save_directory({"a": torch.arange(5000), "b": torch.ones(3)}, path)
        loaded, mapped = load_mapped(path, weights_only=True)
        assert str(path) in Path("/proc/self/maps").read_text()
        mapped.detach()
        shutil.rmtree(path)
        assert str(path) not in Path("/proc/self/maps").read_text()
        assert torch.equal(loaded["a"], torch.arange(5000))

    def test_manifest_is_enough_to_read_a_tensor(self, path: Path) -> None:
        """Without this package: a program of five lines."""
        weight = torch.randn(6, 4)
        save_directory({"state_dict": {"weight": weight.t()[1:], "tied": weight}}, path)
        manifest = json.loads((path / "manifest.json").read_text())
        (storage,) = manifest["storages"]
        data = (path / "tensors" / f"{int(storage['key']):05}.bin").read_bytes()
        assert (len(data), zlib.crc32(data), storage["location"]) == (storage["nbytes"], storage["crc32"], "cpu")
        assert [entry["path"] for entry in manifest["tensors"]] == [["state_dict", "weight"], ["state_dict", "tied"]]
        entry = manifest["tensors"][0]
        raw = torch.frombuffer(bytearray(data), dtype=getattr(torch, entry["dtype"]))
        assert torch.equal(raw.as_strided(entry["shape"], entry["stride"], entry["storage_offset"]), weight.t()[1:])


def of_name(value: Any, path: tuple[Any, ...]) -> torch.Tensor:
    for key in path:
        value = value[1.5 if key == "1.5" else key]
    assert isinstance(value, torch.Tensor)
    return value


def test_weights_only_is_torchs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_directory({"user": Settings()}, path)
    torch.save({"user": Settings()}, tmp_path / "stock.pt")
    with pytest.raises(pickle.UnpicklingError, match=r"files\.Settings"):
        torch.load(tmp_path / "stock.pt", weights_only=True)
    with pytest.raises(pickle.UnpicklingError, match=r"files\.Settings, at user"):
        load_mapped(path, weights_only=True)
    seen: list[Any] = []
    original = torch.load
    monkeypatch.setattr(torch, "load", lambda *a, **k: (seen.append(k["weights_only"]), original(*a, **k))[1])
    save_directory({"a": torch.ones(1)}, tmp_path / "plain")
    for given in (None, True, False):
        load_mapped(tmp_path / "plain", weights_only=given)
    assert seen == [None, True, False]


class Creating:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_the_index_runs_nothing(path: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    save_directory({"weight": torch.ones(3), "hostile": Creating(trace)}, path)
    assert [tensor.name for tensor in open_checkpoint(path)] == ["weight"]
    with pytest.raises(pickle.UnpicklingError):
        load_mapped(path, weights_only=True)
    assert not trace.exists()
    load_mapped(path, weights_only=False)
    assert trace.exists()


def test_many_files_with_few_descriptors(path: Path) -> None:
    program = """
import os, resource, torch
from pathlib import Path
from lightning_memload.formats import load_mapped, open_checkpoint
from lightning_memload.save import save_directory
from tests.formats.files import as_bytes
from tests.formats.streaming import stream
torch.ones(1).sum()
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
saved = {number: torch.full((3 + number % 50,), float(number)) for number in range(1100)}
save_directory(saved, ARGS["path"])
loaded, mapped = load_mapped(ARGS["path"], weights_only=True)
values = stream(mapped.index, mapped)
RESULT = [
    len(os.listdir(os.path.join(ARGS["path"], "tensors"))),
    all(as_bytes(loaded[number]) == as_bytes(value) for number, value in saved.items()),
    all(as_bytes(values[f"[{number}]"]) == as_bytes(value) for number, value in saved.items()),
    len(os.listdir("/proc/self/fd")) < 30,
]
"""
    assert run_fresh(program, path=path).result == [1100, True, True, True]


class TestChangesBehindOurBack:
    @pytest.mark.parametrize("count", [3, 100])
    def test_a_flipped_byte(self, path: Path, count: int) -> None:
        save_directory({f"layer{number}": torch.randn(500) for number in range(count)}, path)
        name = path / "tensors" / "00002.bin"
        damaged = bytearray(name.read_bytes())
        damaged[777] ^= 1
        name.write_bytes(damaged)
        _, mapped = load_mapped(path, weights_only=True)
        with pytest.raises(ChecksumError, match=rf"{name} is damaged: the 2000 bytes of 2 at byte 0") as caught:
            stream(mapped.index, mapped)
        assert caught.value.path == str(name)
        stream(mapped.index, mapped, verify=False)

    @pytest.mark.parametrize("count", [3, 100])
    def test_a_file_that_is_replaced_while_it_is_used(self, path: Path, tmp_path: Path, count: int) -> None:
        save_directory({f"layer{number}": torch.full((50,), 1.0) for number in range(count)}, path)
        _, mapped = load_mapped(path, weights_only=True)
        name = path / "tensors" / "00001.bin"
        other = tmp_path / "other"
        other.write_bytes(bytes(200))
        os.replace(other, name)
        if count == 3:  # held open
            assert stream(mapped.index, mapped)["layer1"].sum() == 50
        else:
            with pytest.raises(CheckpointReadError, match=rf"{name} failed at byte 0: .*changed or replaced"):
                stream(mapped.index, mapped, verify=False)

    def test_a_checkpoint_that_is_replaced_while_it_is_loaded(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        original = torch.load

        def replaced(*args: Any, **kwargs: Any) -> Any:
            monkeypatch.undo()
            save_directory({"a": torch.zeros(3), "step": 2}, path)
            return original(*args, **kwargs)

        save_directory({"a": torch.ones(3), "step": 1}, path)
        monkeypatch.setattr(torch, "load", replaced)
        loaded, _ = load_mapped(path, weights_only=True)
        assert (loaded["a"].sum(), loaded["step"]) == (0, 2)

    def test_a_checkpoint_that_is_replaced_again_and_again(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        original = torch.load

        def replaced(*args: Any, **kwargs: Any) -> Any:
            save_directory({"a": torch.zeros(3)}, path)
            return original(*args, **kwargs)

        save_directory({"a": torch.ones(3)}, path)
        monkeypatch.setattr(torch, "load", replaced)
        with pytest.raises(CheckpointFormatError, match="replaced or changed while it was loaded"):
            load_mapped(path, weights_only=True)

    def test_a_file_that_grows_while_it_is_loaded(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        save_directory({"a": torch.ones(3)}, path)
        original = tensor_directory._read_index

        def growing(name: str) -> Checkpoint:
            index = original(name)
            (path / "tensors" / "00000.bin").write_bytes(bytes(16))
            return index

        monkeypatch.setattr(tensor_directory, "_read_index", growing)
        with pytest.raises(CheckpointFormatError, match="replaced or changed while it was loaded"):
            load_mapped(path, weights_only=True)

    def test_more_files_than_can_be_mapped(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(source: object) -> None:
            raise OSError(errno.ENOMEM, "cannot map 4096 bytes: Cannot allocate memory")

        save_directory({"a": torch.ones(3)}, path)
        monkeypatch.setattr(tensor_directory, "map_or_reserve", refuse)
        with pytest.raises(MemloadError, match=r"has 2 files, .*Raise the limit \(sysctl vm.max_map_count"):
            load_mapped(path, weights_only=True)

    def test_failures_leave_nothing_open(self, path: Path) -> None:
        save_directory({"user": Settings()}, path)
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(3):
            with pytest.raises(pickle.UnpicklingError):
                load_mapped(path, weights_only=True)
        assert len(os.listdir("/proc/self/fd")) == before


def small() -> dict[str, Any]:
    tied = torch.arange(8.0)
    return {"state_dict": {"weight": tied, "tied": tied[2:5], "bias": torch.ones(3, dtype=torch.int16)}, "epoch": 1}


@pytest.fixture
def sound(path: Path) -> Path:
    save_directory(small(), path)
    return path


def edited(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    edit(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


def refused(path: Path, match: str) -> None:
    for reading in (open_checkpoint, load_mapped):
        with pytest.raises(CheckpointFormatError, match=match) as caught:
            reading(path)
        assert caught.value.path == str(path)
        assert len(str(caught.value)) < 2000


BIG = 1 << 62


class TestLyingManifest:
    @pytest.mark.parametrize(
        ("edit", "match"),
        [
            (lambda m: m.update(format="another"), "does not name the format"),
            (lambda m: m.update(version=2), "has version 2 of the format .* reads version 1"),
            (lambda m: m.update(version=True), "has version True of the format"),
            (lambda m: m.update(version="1"), "has version '1' of the format"),
            (lambda m: m.pop("version"), "has version None of the format"),
            (lambda m: m.pop("tensors"), "'tensors' should be of type list, but is None"),
            (lambda m: m.update(storages={}), "'storages' should be of type list"),
            (lambda m: m.update(storages=[7]), "describes a storage as 7"),
            (lambda m: m.update(state=3), "'state' should be of type dict"),
            (lambda m: m["state"].update(nbytes=-1), "'nbytes' is -1"),
            (lambda m: m["state"].update(nbytes=10), "state.pt is too long: it has .* bytes instead of 10"),
            (lambda m: m["state"].update(pickle_crc32=5), "they were not written together"),
            (lambda m: m["state"].update(pickle_crc32=1 << 32), "which is no CRC-32"),
            (lambda m: m["storages"][0].update(nbytes=31), "00000.bin is too long: it has 32 bytes instead of 31"),
            (lambda m: m["storages"][0].update(nbytes=BIG), "00000.bin is truncated: it has 32 bytes"),
            (lambda m: m["storages"][0].update(nbytes=10**30), "'nbytes' is 1000000000000000000000000000000, which"),
            (lambda m: m["storages"][0].update(nbytes=-32), "'nbytes' is -32"),
            (lambda m: m["storages"][0].update(nbytes=0), "an empty storage has no file"),
            (lambda m: m["storages"][0].update(nbytes=True), "'nbytes' should be of type int, but is True"),
            (lambda m: m["storages"][0].update(nbytes=32.0), "'nbytes' should be of type int, but is 32.0"),
            (lambda m: m["storages"][0].update(crc32=-1), "'crc32' is -1"),
            (lambda m: m["storages"][0].update(crc32=None), "'crc32' should be of type int, but is None"),
            (lambda m: m["storages"][0].pop("location"), "'location' should be of type str, but is None"),
            (lambda m: m["storages"][0].update(key=0), "'key' should be of type str, but is 0"),
            (lambda m: m["storages"][0].update(key="7"), r"not in the order"),
            (lambda m: m["storages"][1].update(key="7"), r"1 of 3 files are missing \(tensors/00007.bin\)"),
            (lambda m: m["storages"].reverse(), "not in the order of their numbers, each once"),
            (lambda m: m["storages"].append(m["storages"][1]), "not in the order of their numbers, each once"),
            (lambda m: m["tensors"].pop(), "lists 2 tensors, but state.pt has 3"),
            (lambda m: m["tensors"].append(m["tensors"][0]), "lists 4 tensors, but state.pt has 3"),
            (lambda m: m["tensors"].__setitem__(1, m["tensors"][0]), r"state_dict.tied has path .* in state.pt and"),
            (lambda m: m["tensors"].__setitem__(1, 5), "state_dict.tied has path .* in state.pt and None"),
            (lambda m: m["tensors"][0].update(path=["elsewhere"]), r"weight has path .* and \['elsewhere'\]"),
            (lambda m: m["tensors"][0].update(dtype="float99"), "weight has dtype float32 in state.pt and 'float99'"),
            (lambda m: m["tensors"][0].update(shape=[BIG]), r"weight has shape \[8\] in state.pt and \[4611"),
            (lambda m: m["tensors"][0].update(shape=[-8]), r"weight has shape \[8\] in state.pt and \[-8\]"),
            (lambda m: m["tensors"][0].update(stride=[2]), r"weight has stride \[1\] in state.pt and \[2\]"),
            (lambda m: m["tensors"][0].update(stride=[True]), r"weight has stride \[1\] in state.pt and \[True\]"),
            (lambda m: m["tensors"][0].update(storage_offset=-1), "storage_offset 0 in state.pt and -1"),
            (lambda m: m["tensors"][0].update(storage_offset=False), "storage_offset 0 in state.pt and False"),
            (lambda m: m["tensors"][0].update(storage="1"), "storage 0 in state.pt and '1'"),
            (lambda m: m["tensors"][0].update(parameter=True), "parameter False in state.pt and True"),
        ],
    )  # fmt: skip
    def test_is_refused(self, sound: Path, edit: Callable[[dict[str, Any]], object], match: str) -> None:
        edited(sound, edit)
        refused(sound, match)

    @pytest.mark.parametrize(
        "key", ["../00000", "/etc/passwd", "0/1", "-1", "+1", "00", " 1", "1_0", "", "٣", "9" * 10]
    )
    def test_cannot_name_other_files(self, sound: Path, key: str) -> None:
        edited(sound, lambda manifest: manifest["storages"][0].update(key=key))
        refused(sound, "names a storage .*, which is no number")

    def test_an_unused_storage(self, sound: Path) -> None:
        (sound / "tensors" / "00009.bin").write_bytes(b"1234")
        assert len(open_checkpoint(sound)) == 3  # a file without an entry in the manifest is ignored
        entry = {"key": "9", "nbytes": 4, "crc32": 0, "location": "cpu"}
        edited(sound, lambda manifest: manifest["storages"].append(entry))
        refused(sound, "lists storages that state.pt does not refer to: 9")

    def test_a_storage_that_it_forgets(self, sound: Path) -> None:
        edited(sound, lambda manifest: manifest["storages"].pop(0))
        refused_state = pytest.raises(
            CheckpointFormatError, match=r"weight has shape .* does not fit its storage of 16"
        )
        with refused_state:
            open_checkpoint(sound)

    @pytest.mark.parametrize(
        ("text", "match"),
        [
            ("", "cannot be parsed"),
            ("[" * 200_000, "cannot be parsed"),
            ('{"format": "lightning_memload.tensor_directory",' + '"a":[' * 100_000, "cannot be parsed"),
            ("null", "does not name the format"),
            ("[]", "does not name the format"),
            ('{"format": "lightning_memload.tensor_directory", "version": ' + "1" * 5000 + "}", "parsed|version"),
            ("\udcff", "cannot be parsed"),
        ],
        ids=["empty", "deep", "deep-object", "null", "list", "long-number", "no-text"],
    )
    def test_is_no_manifest_at_all(self, sound: Path, text: str, match: str) -> None:
        (sound / "manifest.json").write_text(text, errors="surrogateescape")
        refused(sound, match)

    def test_an_entry_as_deep_as_can_be_parsed(self, sound: Path) -> None:
        deep: Any = 1
        for _ in range(400):
            deep = [deep]
        edited(sound, lambda manifest: manifest["tensors"][0].update(shape=deep))
        refused(sound, "weight has shape")

    def test_absurdly_long(self, sound: Path) -> None:
        os.truncate(sound / "manifest.json", 1 << 40)
        refused(sound, "it has 1099511627776 bytes, and the limit is 268435456")

    def test_every_byte(self, sound: Path) -> None:
        manifest = (sound / "manifest.json").read_bytes()
        whole = open_checkpoint(sound)
        crc32s = [(storage.crc32, storage.location) for storage in whole.storages]
        unseen = 0
        for position in range(0, len(manifest), 2):
            damaged = bytearray(manifest)
            damaged[position] ^= 1
            (sound / "manifest.json").write_bytes(damaged)
            try:
                index = open_checkpoint(sound)
            except CheckpointFormatError:
                continue
            unseen += 1
            assert index.files == whole.files
            assert [(t.path, t.dtype, t.shape, t.stride, t.storage_offset) for t in index] == [
                (t.path, t.dtype, t.shape, t.stride, t.storage_offset) for t in whole
            ]
            if crc32s == [(storage.crc32, storage.location) for storage in index.storages]:
                assert damaged[position] in b"!+"  # white space at most
        assert unseen < 60  # digits of checksums, which the data will contradict, and letters of "cpu"


class TestDamagedFiles:
    def test_state_at_many_lengths(self, sound: Path) -> None:
        state = (sound / "state.pt").read_bytes()
        for length in range(0, len(state), 37):
            (sound / "state.pt").write_bytes(state[:length])
            refused(sound, rf"state.pt is truncated: it has {length} bytes instead of {len(state)}")

    def test_state_of_another_save(self, sound: Path, tmp_path: Path) -> None:
        save_directory({**small(), "epoch": 2}, tmp_path / "other")
        shutil.copy(tmp_path / "other" / "state.pt", sound / "state.pt")
        refused(sound, "they were not written together")

    def test_every_byte_of_the_state(self, sound: Path) -> None:
        state = (sound / "state.pt").read_bytes()
        whole = open_checkpoint(sound)
        for position in range(0, len(state), 5):
            damaged = bytearray(state)
            damaged[position] ^= 0xFF
            (sound / "state.pt").write_bytes(damaged)
            try:
                index = open_checkpoint(sound)
            except CheckpointFormatError:
                continue
            assert (index.tensors, index.files) == (whole.tensors, whole.files)

    def test_a_stub_that_is_none(self, sound: Path) -> None:
        """A whole torch file where stubs are expected, with a manifest that agrees in everything else."""
        torch.save(small(), sound / "state.pt")
        data = (sound / "state.pt").read_bytes()
        with zipfile.ZipFile(sound / "state.pt") as archive:
            crc32 = zlib.crc32(archive.read("state/data.pkl"))
        edited(sound, lambda manifest: manifest.update(state={"nbytes": len(data), "pickle_crc32": crc32}))
        with pytest.raises(CheckpointFormatError, match="the pickle gives it 32 bytes instead of the 16 of a stub"):
            open_checkpoint(sound)

    def test_missing_files_are_listed_together(self, path: Path) -> None:
        save_directory([torch.ones(3) for _ in range(40)], path)
        for number in range(3, 30):
            (path / "tensors" / f"{number:05}.bin").unlink()
        (path / "tensors" / "00035.bin").write_bytes(b"")
        refused(
            path,
            r"27 of 41 files are missing \(tensors/00003.bin, .*, tensors/00012.bin, and 17 more\); "
            r"tensors/00035.bin is truncated: it has 0 bytes instead of 12",
        )
        shutil.rmtree(path / "tensors")
        refused(path, "40 of 41 files are missing")
        (path / "tensors").write_bytes(b"")
        refused(path, "40 of 41 files are missing")

    def test_no_manifest(self, sound: Path) -> None:
        (sound / "manifest.json").unlink()
        refused(sound, r"no manifest.json: it was not copied completely")

    def test_links_lead_nowhere(self, sound: Path, tmp_path: Path) -> None:
        for name in ("state.pt", "tensors/00001.bin"):
            (sound / name).rename(tmp_path / "elsewhere")
            (sound / name).symlink_to(tmp_path / "elsewhere")
            refused(sound, rf"{name} is no regular file")
            os.replace(tmp_path / "elsewhere", sound / name)
        (sound / "tensors").rename(tmp_path / "folder")
        (sound / "tensors").symlink_to(tmp_path / "folder")
        refused(sound, "tensors is a link")

    def test_pipes_and_folders(self, sound: Path) -> None:
        (sound / "tensors" / "00000.bin").unlink()
        os.mkfifo(sound / "tensors" / "00000.bin")
        refused(sound, "00000.bin is no regular file")
        (sound / "tensors" / "00000.bin").unlink()
        (sound / "tensors" / "00000.bin").mkdir()
        refused(sound, "00000.bin is no regular file")
        (sound / "manifest.json").unlink()
        os.mkfifo(sound / "manifest.json")
        refused(sound, "manifest.json is damaged: it is no regular file")

    def test_other_directories(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointFormatError, match=r"is a directory, but no checkpoint of a known format"):
            open_checkpoint(tmp_path)
        (tmp_path / "manifest.json").write_text('{"format": "something else"}')
        with pytest.raises(CheckpointFormatError, match=r"no checkpoint of a known format .*tensor_directory"):
            open_checkpoint(tmp_path)

    def test_a_bomb_in_the_state(self, sound: Path) -> None:
        write_zip(sound / "state.pt", b"\x80\x02" + b"]" * 2000 + b"a" * 1999 + b".")
        edited(sound, lambda m: m["state"].update(nbytes=(sound / "state.pt").stat().st_size))
        with pytest.raises(UnmappableCheckpointError, match="more than 1000 deep"):
            open_checkpoint(sound)
