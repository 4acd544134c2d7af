"""A place of bytes takes one file and one entry in the registry. One that is written here goes through everything."""

from __future__ import annotations

import copy
import dataclasses
import gc
import io
import os
import re
from argparse import Namespace
from collections import OrderedDict, defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lightning_memload import (
    MemoryEfficientRestore,
    StreamingCheckpointIO,
    load_weights,
    meta_init,
    open_checkpoint,
    verify_checkpoint,
)
from lightning_memload.checkpoint import Checkpoint, ChunkedTensor, Inventory, MappedCheckpoint
from lightning_memload.cli import main
from lightning_memload.errors import (
    CheckpointFormatError,
    CheckpointReadError,
    ChecksumError,
    UnmappableCheckpointError,
    UnsafeGlobalsError,
)
from lightning_memload.formats import CheckpointFormat, load_mapped
from lightning_memload.formats.registry import FORMATS, find_format
from lightning_memload.storage import FileMapping, FileSet, FileWatch, places
from lightning_memload.transfer import choose_layout
from tests.formats.conformance import WRITERS, Case, check_index, check_load, check_stream, write_case
from tests.formats.files import as_bytes
from tests.fresh_process import run_fresh
from tests.plugins.harness import FEATURES, TRUSTED, TinyModule, adamw, make_trainer
from tests.storage.toy import SCHEME, ToyBucket

pytestmark = [
    pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning"),
    pytest.mark.skipif(not FileMapping.supported, reason="loading needs Linux"),
]


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ToyBucket:
    """A new place is registered with one entry."""
    (tmp_path / "objects").mkdir()
    bucket = ToyBucket(tmp_path / "objects")
    monkeypatch.setitem(places.PLACES, SCHEME, bucket)
    return bucket


class InBucket:
    """A format for checks that know files: it is given the path of a file, and reads the object."""

    def __init__(self, inner: CheckpointFormat, bucket: ToyBucket) -> None:
        self.name = inner.name
        self._inner = inner
        self._bucket = bucket

    def recognizes(self, path: str) -> bool:
        return self._inner.recognizes(self._bucket.url(path))

    def read_index(self, path: str) -> Checkpoint:
        return self._of_files(self._inner.read_index(self._bucket.url(path)))

    def load(self, path: str, *, weights_only: bool | None, erases: bool = False) -> tuple[Any, MappedCheckpoint]:
        loaded, mapped = self._inner.load(self._bucket.url(path), weights_only=weights_only, erases=erases)
        mapped.index = self._of_files(mapped.index)
        return loaded, mapped

    def take_inventory(self, path: str) -> Inventory:
        raise NotImplementedError

    def _of_files(self, index: Checkpoint) -> Checkpoint:
        files = tuple(dataclasses.replace(span, path=str(self._bucket.file(span.path))) for span in index.files)
        return dataclasses.replace(index, path=str(self._bucket.file(index.path)), files=files)


@pytest.fixture(params=[writer.label for writer in WRITERS])
def case(request: pytest.FixtureRequest, bucket: ToyBucket, tmp_path: Path) -> Case:
    (tmp_path / "objects" / "case").mkdir()
    (writer,) = (writer for writer in WRITERS if writer.label == request.param)
    return write_case(writer, tmp_path / "objects" / "case")


def test_the_checks_of_every_format(case: Case, bucket: ToyBucket) -> None:
    (found,) = (known for known in FORMATS if known.name == case.writer.format)
    assert find_format(bucket.url(case.path)) is found
    at_place = InBucket(found, bucket)
    check_index(at_place, case)
    check_load(at_place, case)
    check_stream(at_place, case, choose_layout(1 << 20, 2))


def test_verification(case: Case, bucket: ToyBucket, capsys: pytest.CaptureFixture[str]) -> None:
    url = bucket.url(case.path)
    report = verify_checkpoint(url)
    assert not report.is_damaged, report
    of_file = verify_checkpoint(case.path)
    assert report.is_verified == of_file.is_verified
    assert report.bytes_verified == of_file.bytes_verified
    assert main(["inspect", url]) == 0
    assert main(["verify", url]) == (0 if report.is_verified else 3)
    assert url in capsys.readouterr().out
    if case.writer.checksums:
        index = open_checkpoint(url)
        path, position = index.place(index["large" if "large" in index else "state_dict.large"].file_range[0])
        file = bucket.file(path)
        data = bytearray(file.read_bytes())
        data[position] ^= 1
        file.write_bytes(data)
        (damage,) = verify_checkpoint(url).damage
        assert damage.path == path


def write(bucket: ToyBucket, name: str, value: Any, **options: Any) -> str:
    """Saves an object to the bucket and returns its URL."""
    path = bucket.file(f"{SCHEME}://bucket/{name}")
    torch.save(value, path, **options)
    return bucket.url(path)


@pytest.mark.parametrize("mode", ["copy", "assign"])
@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_weights(suffix: str, mode: Any, bucket: ToyBucket) -> None:
    torch.manual_seed(1)
    expected = nn.Sequential(nn.Linear(300, 200), nn.BatchNorm1d(200), nn.Linear(200, 300))
    if suffix == ".ckpt":
        url = write(bucket, "last.ckpt", {"state_dict": expected.state_dict(), "epoch": 3})
    else:
        save_file(expected.state_dict(), bucket.file(f"{SCHEME}://bucket/model.safetensors"))
        url = f"{SCHEME}://bucket/model.safetensors"
    with meta_init():
        module = nn.Sequential(nn.Linear(300, 200), nn.BatchNorm1d(200), nn.Linear(200, 300))
    load_weights(module, url, mode=mode)
    assert all(type(tensor) in (torch.Tensor, nn.Parameter) for tensor in module.state_dict(keep_vars=True).values())
    assert not differing(module.state_dict(), expected.state_dict())


def differing(got: Any, expected: Any) -> list[str]:
    assert list(got) == list(expected)
    return [name for name, value in expected.items() if as_bytes(got[name]) != as_bytes(value)]


class TestLoadedObject:
    def test_no_tensor_is_read_before_it_is_used(self, bucket: ToyBucket) -> None:
        weight = torch.randn(300, 300)
        url = write(bucket, "a.pt", {"weight": weight, "epoch": 3})
        offset = open_checkpoint(url)["weight"].file_range[0]
        bucket.requests.clear()
        loaded, mapped = load_mapped(url, weights_only=True)
        assert bucket.requests
        end = offset + 360_000
        assert not [start for _, start, nbytes in bucket.requests if offset < start + nbytes and start < end]
        assert isinstance(loaded["weight"], ChunkedTensor)
        assert "in 1 part of the file" in repr(loaded["weight"])
        assert torch.equal(loaded["weight"] * 2, weight * 2)
        assert not mapped.holds(loaded["weight"])

    def test_tensors_of_one_storage_share_it(self, bucket: ToyBucket) -> None:
        base = torch.arange(5000.0)
        state = {
            "all": base,
            "again": base,
            "some": base[10:20],
            "steps": base[::2],
            "column": base.view(50, 100)[:, 3],
        }
        loaded, mapped = load_mapped(write(bucket, "ties.pt", state), weights_only=True)
        assert loaded["all"] is loaded["again"]
        assert {name: (v.stride(), v.storage_offset()) for name, v in loaded.items()} == {
            name: (v.stride(), v.storage_offset()) for name, v in state.items()
        }
        loaded["some"].fill_(-1)
        base[10:20] = -1
        assert all(torch.equal(loaded[name], value) for name, value in state.items())
        assert [pieces for pieces in mapped.locate_all(list(loaded.values())) if pieces is not None] == []

    def test_parameters(self, bucket: ToyBucket) -> None:
        state = {
            "a": nn.Parameter(torch.randn(40, 40)),
            "b": nn.Parameter(torch.randn(40), requires_grad=False),
            "c": torch.randn(3, requires_grad=True),
        }
        loaded, _ = load_mapped(write(bucket, "p.pt", state), weights_only=True)
        assert [isinstance(value, nn.Parameter) for value in loaded.values()] == [True, True, False]
        assert [value.requires_grad for value in loaded.values()] == [True, False, True]
        copied = copy.deepcopy(loaded)
        again = io.BytesIO()
        torch.save(loaded, again)
        again.seek(0)
        for value in (loaded, copied, torch.load(again, weights_only=True)):
            assert not differing(value, state)
            assert [isinstance(item, nn.Parameter) for item in value.values()] == [True, True, False]
            assert [item.requires_grad for item in value.values()] == [True, False, True]
            assert value is loaded or ChunkedTensor not in map(type, value.values())

    @pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
    def test_every_container(self, bucket: ToyBucket) -> None:
        tensors = [torch.full((2000,), float(number)) for number in range(8)]
        state: Any = OrderedDict(a=[tensors[0], (tensors[1], {"b": (tensors[2], 3)})], c=(tensors[3],))
        state["self"] = state["a"]
        state["defaults"] = defaultdict(list, {"d": [tensors[4]]})
        state["set"] = {tensors[5]}
        state["storage"] = tensors[6].untyped_storage()
        indices = torch.arange(2000).repeat(1, 1)
        state["sparse"] = torch.sparse_coo_tensor(indices, tensors[7], (2000,), check_invariants=True)
        loaded, _ = load_mapped(write(bucket, "nested.pt", state), weights_only=False)
        assert list(loaded) == list(state)
        assert type(loaded["defaults"]) is defaultdict
        assert loaded["self"] is loaded["a"]
        found = [
            loaded["a"][0],
            loaded["a"][1][0],
            loaded["a"][1][1]["b"][0],
            loaded["c"][0],
            loaded["defaults"]["d"][0],
        ]
        assert all(isinstance(value, ChunkedTensor) for value in found)
        found += loaded["set"]
        assert all(torch.equal(value, tensors[number]) for number, value in enumerate(found))
        assert bytes(loaded["storage"].untyped()) == bytes(state["storage"])
        assert torch.equal(loaded["sparse"].to_dense(), tensors[7])

    def test_code_that_runs_while_the_object_is_built(self, bucket: ToyBucket) -> None:
        total = torch.arange(3000.0)
        state = {"first": torch.ones(3000), "sum": Summed(total), "total": total, "last": torch.ones(3000)}
        loaded, _ = load_mapped(write(bucket, "code.pt", state), weights_only=False)
        assert loaded["sum"].value == float(total.sum())
        # The object and the dict hold one tensor, as they did when they were saved.
        loaded["sum"].tensor.zero_()
        assert not loaded["total"].any()
        assert torch.equal(loaded["first"], torch.ones(3000))
        assert torch.equal(loaded["last"], torch.ones(3000))

    def test_what_weights_only_refuses(self, bucket: ToyBucket) -> None:
        state: dict[str, Any] = {"weight": torch.ones(3000), "arguments": Namespace(lr=0.1)}
        url = write(bucket, "refused.pt", state)
        with pytest.raises(UnsafeGlobalsError, match=re.escape(f"{url} holds objects of 1 class")):
            load_mapped(url, weights_only=True)
        loaded, mapped = load_mapped(url, weights_only=True, erases=True)
        assert mapped.refusal is not None
        assert torch.equal(loaded["weight"], state["weight"])
        assert load_mapped(url, weights_only=False)[0]["arguments"] == state["arguments"]

    def test_many_storages(self, bucket: ToyBucket) -> None:
        state = {f"{number}": torch.full((number % 7 + 1,), float(number)) for number in range(1500)}
        loaded, _ = load_mapped(write(bucket, "many.pt", state), weights_only=True)
        assert not differing(loaded, state)

    def test_what_is_kept_outlives_the_files(self, bucket: ToyBucket) -> None:
        loaded, mapped = load_mapped(write(bucket, "kept.pt", {"a": torch.ones(5000), "b": torch.ones(9)}))
        kept = loaded.pop("a")
        loaded.clear()
        assert mapped.referenced_bytes == mapped.detach() == 20000
        bucket.requests.clear()
        assert torch.equal(kept, torch.ones(5000))
        assert not bucket.requests

    def test_nothing_is_left(self, bucket: ToyBucket) -> None:
        url = write(bucket, "w.pt", {"a": torch.ones(5000), "b": [torch.ones(9)], "s": {torch.ones(4000)}})
        figures = []
        for number in range(12):
            loaded, mapped = load_mapped(url, weights_only=False)
            loaded["a"].sum()
            mapped.detach()
            del loaded, mapped
            gc.collect()
            if number in (1, 11):
                maps = Path("/proc/self/maps").read_text().splitlines()
                figures.append((len(maps), len(os.listdir("/proc/self/fd"))))
        assert figures[1][0] <= figures[0][0] + 2
        assert figures[1][1] == figures[0][1]


TRACEBACK = """
import sys, torch, traceback
from pathlib import Path
from argparse import Namespace
from lightning_memload.formats import load_mapped, open_checkpoint
from lightning_memload.storage import places
from tests.storage.toy import ToyBucket

folder = Path(ARGS["folder"])
bucket = places.PLACES["toy"] = ToyBucket(folder)
torch.save({"weight": torch.ones(30_000), "set": {torch.ones(5000)}, "last": Namespace()}, folder / "a.pt")
failures = []
start, end = open_checkpoint("toy://bucket/a.pt").tensors[1].file_range
for weights_only in (True, False):
    bucket.fails_at = lambda path, offset: not weights_only and start + 1000 < offset < end
    try:
        load_mapped("toy://bucket/a.pt", weights_only=weights_only)
    except Exception as error:
        failures.append(type(error).__name__)
        traceback.TracebackException.from_exception(error, capture_locals=True)
RESULT = failures
"""


def test_a_traceback_may_show_its_variables(tmp_path: Path) -> None:
    """A failed load leaves tensors without values. To look at them must not end the process."""
    assert run_fresh(TRACEBACK, folder=tmp_path).result == ["UnsafeGlobalsError", "CheckpointReadError"]


# Readers that ask the system about paths themselves would not find what is at another place.
OF_THE_SYSTEM = re.compile(r"\bos\.(path\.(is|ex|lex|getsize|same)|stat|lstat|listdir|scandir|open)|(?<![.\w])open\(")
LOCAL_ONLY = {
    "formats/tensor_directory/linking.py",  # writes
    "formats/torch_zip/hollow.py",  # a file in memory
    "checkpoint/missing.py",  # whether a path may be a name of a hub
}


def test_readers_know_no_disk() -> None:
    assert OF_THE_SYSTEM.search("if os.path.isfile(path):")
    assert OF_THE_SYSTEM.search("with open(path) as file:")
    package = Path(places.__file__).parents[1]
    files = [*package.glob("formats/**/*.py"), *package.glob("checkpoint/*.py"), package / "verify" / "verification.py"]
    found = {file.relative_to(package).as_posix() for file in files if OF_THE_SYSTEM.search(file.read_text())}
    assert found == LOCAL_ONLY


class TestErrors:
    def test_a_read_that_fails_names_object_and_position(self, bucket: ToyBucket) -> None:
        module = nn.Linear(300, 300)
        url = write(bucket, "w.pt", module.state_dict())
        start, end = open_checkpoint(url)["weight"].file_range
        bucket.fails_at = lambda path, offset: start + 5000 < offset < end
        with pytest.raises(
            CheckpointReadError, match=r"Reading weight from toy://bucket/w\.pt failed at byte \d+: .*GET"
        ):
            load_weights(module, url)
        assert "toy://bucket/w.pt cannot be read at byte" in verify_checkpoint(url).damage[0].problem
        loaded, _ = load_mapped(url)
        with pytest.raises(CheckpointReadError, match="weight"):
            loaded["weight"].sum()

    def test_a_bit_that_flipped(self, bucket: ToyBucket) -> None:
        url = write(bucket, "w.pt", nn.Linear(300, 300).state_dict())
        data = bytearray(bucket.file(url).read_bytes())
        data[open_checkpoint(url)["weight"].file_range[0] + 7] ^= 1
        bucket.file(url).write_bytes(data)
        with pytest.raises(ChecksumError):
            load_weights(nn.Linear(300, 300), url)
        loaded, _ = load_mapped(url)
        with pytest.raises(ChecksumError, match="weight"):
            loaded["weight"].sum()

    def test_another_version_is_not_mixed_in(self, bucket: ToyBucket) -> None:
        url = write(bucket, "w.pt", {"weight": torch.ones(3000)})
        loaded, _ = load_mapped(url)
        write(bucket, "w.pt", {"weight": torch.zeros(3000)})
        with pytest.raises(CheckpointReadError, match="If-Match"):
            loaded["weight"].sum()

    @pytest.mark.parametrize("read", [open_checkpoint, verify_checkpoint, load_mapped])
    def test_nothing_there(self, read: Any, bucket: ToyBucket) -> None:
        with pytest.raises(FileNotFoundError):
            read(f"{SCHEME}://bucket/none.ckpt")
        with pytest.raises(FileNotFoundError, match="Not a local file"):
            read("unknown://bucket/none.ckpt")

    def test_no_checkpoint(self, bucket: ToyBucket) -> None:
        bucket.file(f"{SCHEME}://bucket/text").write_text("hello")
        with pytest.raises(
            CheckpointFormatError, match=r"toy://bucket/text \(5 bytes\) is no checkpoint at all.*It is text"
        ):
            open_checkpoint(f"{SCHEME}://bucket/text")
        with pytest.raises(CheckpointFormatError, match=r"toy://bucket/ is a directory, but no checkpoint"):
            open_checkpoint(f"{SCHEME}://bucket/")

    def test_a_file_that_only_torch_reads(self, bucket: ToyBucket) -> None:
        url = write(bucket, "old.pt", {"a": torch.ones(3)}, _use_new_zipfile_serialization=False)
        with pytest.raises(UnmappableCheckpointError, match="none of the known formats"):
            open_checkpoint(url)
        module = nn.Linear(300, 300)
        expected = nn.Linear(300, 300)
        url = write(bucket, "old.pt", expected.state_dict(), _use_new_zipfile_serialization=False)
        with pytest.warns(UserWarning, match="It is loaded the ordinary way"):
            load_weights(module, url)
        assert not differing(module.state_dict(), expected.state_dict())

    def test_files_at_a_place_cannot_be_mapped(self, bucket: ToyBucket) -> None:
        source = FileSet([write(bucket, "w.pt", {})])
        with pytest.raises(UnmappableCheckpointError, match=r"toy://bucket/w\.pt is not on a disk of this machine"):
            FileMapping(source)
        assert FileWatch(source).begin() == "it is not on a disk of this machine"


class Summed:
    """Reads its tensor while it is built."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self.value = float(tensor.sum())

    def __reduce__(self) -> Any:
        return Summed, (self.tensor,)


MEMORY = """
import sys, torch
from pathlib import Path
from lightning_memload import MemoryMonitor, load_weights
from lightning_memload.storage import places
from tests.storage.toy import ToyBucket

bucket = places.PLACES["toy"] = ToyBucket(Path(ARGS["folder"]))
module = torch.nn.Linear(4096, 4096)
with torch.no_grad():
    module.weight.zero_()
with MemoryMonitor() as monitor:
    load_weights(module, "toy://bucket/large.ckpt", strict=False)
RESULT = [monitor.peaks.anonymous_peak_bytes - monitor.peaks.anonymous_start_bytes, float(module.weight[7, 7])]
"""


def test_memory(tmp_path: Path) -> None:
    """The file holds five times the weights. What is not taken is never in memory."""
    state = {f"other.{number}": torch.full((4096, 4096), 2.0) for number in range(4)}
    torch.save({"state_dict": {"weight": torch.full((4096, 4096), 3.0), **state}}, tmp_path / "large.ckpt")
    anonymous_bytes, value = run_fresh(MEMORY, folder=tmp_path).result
    assert value == 3.0
    assert anonymous_bytes < 48 << 20


class Resuming(TinyModule):
    """A layer that is large enough to be streamed, and a channels-last state."""

    def __init__(self) -> None:
        super().__init__(adamw)
        self.wide = nn.Linear(FEATURES, 20_000)
        self.convolution = nn.Conv2d(2, 8, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        picture = self.convolution(inputs.view(-1, 2, 1, 3).repeat(1, 1, 3, 1))
        return super().forward(inputs) + self.wide(inputs).mean() + picture.mean()

    def predict_dataloader(self) -> Any:
        return self.train_dataloader()

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.losses.append(self.loss(*batch))

    def test_dataloader(self) -> Any:
        return self.train_dataloader()


@pytest.fixture
def saved(bucket: ToyBucket, tmp_path: Path) -> str:
    file = bucket.file(f"{SCHEME}://bucket/last.ckpt")
    torch.manual_seed(1)
    trainer = make_trainer(tmp_path, [], max_steps=5)
    trainer.fit(Resuming())
    trainer.save_checkpoint(file)
    return bucket.url(file)


@pytest.mark.filterwarnings("ignore")
class TestTrainer:
    def run(self, stage: str, path: Any, tmp_path: Path, callbacks: list[Any], **options: Any) -> Any:
        torch.manual_seed(2)
        module = Resuming()
        trainer = make_trainer(tmp_path, callbacks, **options)
        trusted = TRUSTED if stage == "fit" else {}
        getattr(trainer, stage)(module, ckpt_path=path, **trusted)
        return module, trainer

    @pytest.mark.parametrize("restore", [MemoryEfficientRestore, lambda: MemoryEfficientRestore(mode="copy")])
    def test_resume(self, restore: Any, saved: str, bucket: ToyBucket, tmp_path: Path) -> None:
        stock, stock_trainer = self.run("fit", bucket.file(saved), tmp_path, [], max_steps=9)
        ours, trainer = self.run("fit", saved, tmp_path, [restore()], max_steps=9)
        assert trainer.global_step == stock_trainer.global_step == 9
        assert [as_bytes(loss) for loss in ours.losses] == [as_bytes(loss) for loss in stock.losses]
        assert not differing(ours.state_dict(), stock.state_dict())
        (mine,), (theirs,) = trainer.optimizers, stock_trainer.optimizers
        for one, other in zip(mine.state.values(), theirs.state.values(), strict=True):
            assert not differing(one, other)
            assert all(type(value) is torch.Tensor for value in one.values())
            assert [value.stride() for value in one.values()] == [value.stride() for value in other.values()]

    @pytest.mark.parametrize("stage", ["test", "predict"])
    @pytest.mark.parametrize("mode", ["auto", "assign"])
    def test_evaluation(self, mode: Any, stage: str, saved: str, bucket: ToyBucket, tmp_path: Path) -> None:
        stock, _ = self.run(stage, bucket.file(saved), tmp_path, [])
        ours, _ = self.run(stage, saved, tmp_path, [MemoryEfficientRestore(mode=mode)])
        assert not differing(ours.state_dict(), stock.state_dict())

    def test_checkpoint_io_alone(self, saved: str, bucket: ToyBucket, tmp_path: Path) -> None:
        stock, _ = self.run("fit", bucket.file(saved), tmp_path, [], max_steps=9)
        ours, _ = self.run("fit", saved, tmp_path, [], max_steps=9, plugins=[StreamingCheckpointIO()])
        assert not differing(ours.state_dict(), stock.state_dict())

    def test_a_damaged_one(self, saved: str, bucket: ToyBucket, tmp_path: Path) -> None:
        data = bytearray(bucket.file(saved).read_bytes())
        data[open_checkpoint(saved)["state_dict.wide.weight"].file_range[0]] ^= 1
        bucket.file(saved).write_bytes(data)
        with pytest.raises(ChecksumError, match=re.escape(f"{saved} is damaged")):
            self.run("fit", saved, tmp_path, [MemoryEfficientRestore()], max_steps=9)
        with pytest.raises(ChecksumError, match=re.escape(f"{saved} is damaged")):
            self.run("fit", saved, tmp_path, [MemoryEfficientRestore(on_corrupt="previous")], max_steps=9)

    def test_nothing_there(self, saved: str, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError):
            self.run("fit", saved + "x", tmp_path, [MemoryEfficientRestore()], max_steps=9)

    def test_a_file_that_only_torch_reads(self, saved: str, bucket: ToyBucket, tmp_path: Path) -> None:
        stock, _ = self.run("fit", bucket.file(saved), tmp_path, [], max_steps=9)
        checkpoint = torch.load(bucket.file(saved), weights_only=False)
        url = write(bucket, "old.ckpt", checkpoint, _use_new_zipfile_serialization=False)
        ours, _ = self.run("fit", url, tmp_path, [MemoryEfficientRestore()], max_steps=9)
        assert not differing(ours.state_dict(), stock.state_dict())
