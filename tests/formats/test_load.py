"""load_mapped returns the same object as torch.load, bit for bit, without reading tensors."""

from __future__ import annotations

import gc
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_memload.checkpoint import span_bytes
from lightning_memload.errors import CheckpointFormatError, UnmappableCheckpointError, UnsafeGlobalsError
from lightning_memload.formats import load_mapped
from tests.formats.files import (
    ALL_DTYPES,
    Settings,
    as_bytes,
    from_file,
    layouts,
    nested,
    of_dtype,
    save_sparse,
    tensors_of,
    write_zip,
)
from tests.fresh_process import run_fresh

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")


def assert_same_as_torch_load(path: Path, weights_only: bool | None = True) -> None:
    expected = torch.load(path, weights_only=weights_only)
    loaded, mapped = load_mapped(path, weights_only=weights_only)
    ours, theirs = list(tensors_of(loaded)), list(tensors_of(expected))
    assert [name for name, _ in ours] == [name for name, _ in theirs]
    for (name, mine), (_, other) in zip(ours, theirs, strict=True):
        assert type(mine) is type(other)
        assert (mine.dtype, mine.shape, mine.stride(), mine.storage_offset(), mine.requires_grad, mine.device) == (
            other.dtype, other.shape, other.stride(), other.storage_offset(), other.requires_grad, other.device,
        )  # fmt: skip
        pieces = mapped.locate(mine)
        if mine.numel():
            assert pieces is not None, name
            (offset,) = (piece.offset for piece in pieces)
            raw = bytearray(from_file(path, (offset, offset + span_bytes(mine))))
            assert as_bytes(torch.frombuffer(raw, dtype=mine.dtype).as_strided(mine.shape, mine.stride())) == as_bytes(
                other
            )
        else:
            assert pieces is None
        assert as_bytes(mine) == as_bytes(other), name
    mine_shared = [(a, b) for a, x in ours for b, y in ours if x.data_ptr() == y.data_ptr() and x.numel() and y.numel()]
    shared = [(a, b) for a, x in theirs for b, y in theirs if x.data_ptr() == y.data_ptr() and x.numel() and y.numel()]
    assert mine_shared == shared


def test_every_dtype(path: Path) -> None:
    torch.save({str(dtype): of_dtype(dtype) for dtype in ALL_DTYPES}, path)
    assert_same_as_torch_load(path)


def test_every_layout(path: Path) -> None:
    torch.save(layouts(), path)
    assert_same_as_torch_load(path)


@pytest.mark.parametrize("protocol", [2, 4])
def test_nested(path: Path, protocol: int) -> None:
    torch.save(nested(), path, pickle_protocol=protocol)
    assert_same_as_torch_load(path, weights_only=False)


def test_objects_of_users(path: Path) -> None:
    torch.manual_seed(0)
    saved = {"user": Settings(), "module": torch.nn.Linear(3, 2), "sparse": torch.eye(3).to_sparse()}
    saved["conjugate"] = torch.randn(3, dtype=torch.complex64).conj()
    torch.save(saved, path)
    loaded, mapped = load_mapped(path, weights_only=False)
    expected = torch.load(path, weights_only=False)
    assert as_bytes(loaded["user"].table) == as_bytes(expected["user"].table)
    assert mapped.locate(loaded["user"].table) is not None
    assert mapped.locate(loaded["module"].weight) is not None
    assert as_bytes(loaded["module"].weight) == as_bytes(expected["module"].weight)
    assert torch.equal(loaded["sparse"].to_dense(), torch.eye(3))
    assert torch.equal(loaded["conjugate"], expected["conjugate"])
    assert mapped.locate(loaded["conjugate"]) is None
    assert mapped.locate(torch.ones(3)) is None


def test_files_without_checksums_and_without_data(path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(nested(), path)
    finally:
        torch.serialization.set_crc32_options(True)
    assert_same_as_torch_load(path, weights_only=False)
    with torch.serialization.skip_data():
        torch.save(layouts(), path)
    assert_same_as_torch_load(path)


class TestWeightsOnly:
    @pytest.mark.parametrize("given", [None, True, False])
    def test_is_passed_on_as_it_is(self, path: Path, given: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
        seen: list[Any] = []
        original = torch.load

        def spy(*args: Any, **kwargs: Any) -> Any:
            seen.append(kwargs["weights_only"])
            return original(*args, **kwargs)

        torch.save({"a": torch.ones(1)}, path)
        monkeypatch.setattr(torch, "load", spy)
        load_mapped(path, weights_only=given)
        assert seen == [given]
        assert seen[0] is given

    def test_a_refusal_is_torchs_verdict_in_our_words(self, path: Path) -> None:
        torch.save({"user": Settings()}, path)
        with pytest.raises(pickle.UnpicklingError):
            torch.load(path, weights_only=True)
        for weights_only in (True, None):
            with pytest.raises(UnsafeGlobalsError) as ours:
                load_mapped(path, weights_only=weights_only)
            assert isinstance(ours.value, pickle.UnpicklingError)
            assert ours.value.places == {f"{Settings.__module__}.Settings": "user"}

    def test_a_refusal_for_another_reason_is_torchs_own(self, path: Path) -> None:
        torch.save({"user": 1 << 70}, path, pickle_protocol=4)
        for load in (torch.load, load_mapped):
            with pytest.warns(UserWarning, match="protocol 4"), pytest.raises(pickle.UnpicklingError) as error:
                load(path, weights_only=True)
            assert "Unsupported operand" in str(error.value)
            assert not isinstance(error.value, UnsafeGlobalsError)

    def test_allowed_by_the_user(self, path: Path) -> None:
        torch.save({"user": Settings()}, path)
        with torch.serialization.safe_globals([Settings]):
            load_mapped(path, weights_only=True)

    def test_code_runs_only_where_the_user_allowed_it(self, tmp_path: Path, path: Path) -> None:
        trace = tmp_path / "trace"
        python = f"open({str(trace)!r}, 'w').close()".encode()
        write_zip(path, b"\x80\x02cbuiltins\nexec\n(X" + len(python).to_bytes(4, "little") + python + b"tR.")
        with pytest.raises(pickle.UnpicklingError):
            load_mapped(path, weights_only=True)
        assert not trace.exists()
        load_mapped(path, weights_only=False)
        assert trace.exists()


def test_what_cannot_be_mapped_says_so(path: Path) -> None:
    torch.save(nested(), path, _use_new_zipfile_serialization=False)
    with pytest.raises(UnmappableCheckpointError, match="none of the known formats"):
        load_mapped(path)


def test_a_file_that_changes_between_index_and_load(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = torch.load

    def replaced(*args: Any, **kwargs: Any) -> Any:
        torch.save({"a": torch.ones(7)}, path)
        return original(*args, **kwargs)

    torch.save({"a": torch.ones(3)}, path)
    monkeypatch.setattr(torch, "load", replaced)
    with pytest.raises(CheckpointFormatError, match="changed while it was read"):
        load_mapped(path)


def test_failures_leave_nothing_open(path: Path) -> None:
    torch.save({"user": Settings()}, path)
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        with pytest.raises(pickle.UnpicklingError):
            load_mapped(path, weights_only=True)
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before
    assert str(path) not in Path("/proc/self/maps").read_text()


MEMORY_BYTES = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def memory_and_swap_bytes() -> int:
    swap = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("SwapTotal"))
    return MEMORY_BYTES + int(swap.split()[1]) * 1024


class TestLargerThanMemory:
    PROGRAM = """
import os
from lightning_memload.formats import load_mapped, open_checkpoint
from lightning_memload.errors import InsufficientMemoryError
from lightning_memload.memory.host import read_status
from lightning_memload.memory import MemoryMonitor
import torch
path = ARGS["path"]
torch.save({"a": torch.ones(1)}, path + ".warm")
load_mapped(path + ".warm", weights_only=True)
start = read_status().anonymous_bytes
with MemoryMonitor() as monitor:
    index = open_checkpoint(path)
    try:
        loaded, mapped = load_mapped(path, weights_only=True)
        small = [loaded["small"].sum().item(), mapped.locate(loaded["small"])[0].offset == index["small"].file_range[0]]
    except InsufficientMemoryError as error:
        small = [str(error), error.needed_bytes]
RESULT = {"names": [tensor.name for tensor in index], "file": index.file_size, "small": small,
          "anonymous": monitor.peaks.anonymous_peak_bytes - start}
"""

    def sizes(self, pieces: int) -> dict[str, int]:
        total = memory_and_swap_bytes() * 3 // 2
        return {"small": 4096} | {f"large{number}": total // pieces for number in range(pieces)} | {"last": 64}

    def test_many_tensors(self, path: Path) -> None:
        if torch.__version__ < "2.7":
            pytest.skip("torch 2.6 skips the data of tensors only when it saves")
        save_sparse(path, self.sizes(12))
        result = run_fresh(self.PROGRAM, path=path).result
        assert result["file"] > 1.49 * memory_and_swap_bytes()
        assert result["names"] == list(self.sizes(12))
        assert result["small"] == [0.0, True]
        assert result["anonymous"] < 64 << 20

    def test_one_tensor_larger_than_memory_is_indexed_but_not_loaded(self, path: Path) -> None:
        if torch.__version__ < "2.7":
            pytest.skip("torch 2.6 skips the data of tensors only when it saves")
        save_sparse(path, self.sizes(1))
        result = run_fresh(self.PROGRAM, path=path).result
        assert result["names"] == ["small", "large0", "last"]
        assert result["small"][1] == self.sizes(1)["large0"]
        assert "holds a tensor of" in result["small"][0]
        assert result["anonymous"] < 64 << 20
