"""Saving the weights as safetensors beside everything else: complete for other readers, exact for a resume."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from lightning_memload.errors import CheckpointFormatError
from lightning_memload.formats import load_mapped, open_checkpoint
from lightning_memload.pickles.pickling import SavedStorage
from lightning_memload.save import SaveStats, save_directory
from lightning_memload.transfer.contents import GatheredBytes
from lightning_memload.verify import verify_checkpoint
from tests.formats.files import ALL_DTYPES, as_bytes, layouts, of_dtype, tensors_of
from tests.fresh_process import run_fresh


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "last.ckpt"


def save(obj: Any, path: Path, **options: Any) -> SaveStats:
    """Saves, and checks that all of it is loaded as it was: values, strides, ties."""
    stats = save_directory(obj, path, safetensors=True, **options)
    loaded, mapped = load_mapped(path, weights_only=True)
    saved, got = dict(tensors_of(obj)), dict(tensors_of(loaded))
    assert {name: as_bytes(t) for name, t in got.items()} == {name: as_bytes(t) for name, t in saved.items()}
    assert {name: t.stride() for name, t in got.items()} == {name: t.stride() for name, t in saved.items()}
    mapped.detach()
    assert verify_checkpoint(path).is_verified
    return stats


def header_of(path: Path) -> dict[str, Any]:
    data = (path / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header: dict[str, Any] = json.loads(data[8 : 8 + length])
    return header


def checkpoint() -> dict[str, Any]:
    weights = {"a": torch.randn(100, 100), "b": torch.randn(7)}
    states = {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(100, 100)}}
    return {"epoch": 1, "state_dict": weights, "optimizer_states": [{"state": states}]}


def test_every_weight_is_there_once_and_nothing_else(path: Path) -> None:
    state = checkpoint()
    stats = save(state, path)
    weights = load_file(path / "model.safetensors")
    assert {name: as_bytes(t) for name, t in weights.items()} == {
        name: as_bytes(t) for name, t in state["state_dict"].items()
    }
    assert sorted(os.listdir(path)) == ["manifest.json", "model.safetensors", "state.pt"]
    sizes = {name: (path / name).stat().st_size for name in ("model.safetensors", "state.pt")}
    assert 40_028 <= sizes["model.safetensors"] <= 40_028 + 512
    assert 40_004 <= sizes["state.pt"] <= 40_004 + 4096
    assert (stats.bytes_written, stats.bytes_linked) == (sum(sizes.values()), 0)
    index = open_checkpoint(path)
    assert index.place(index["state_dict.a"].storage.offset)[0] == str(path / "model.safetensors")
    assert index.place(index["optimizer_states[0].state[0].exp_avg"].storage.offset)[0] == str(path / "state.pt")


def test_every_dtype_and_layout(path: Path) -> None:
    kinds = [dtype for dtype in ALL_DTYPES if dtype not in (torch.complex128, torch.complex32)]
    weights = {f"dtype {dtype}": of_dtype(dtype) for dtype in kinds} | layouts()
    weights |= {f"strided {dtype}": of_dtype(dtype, 60).as_strided((5, 11), (1, 5)) for dtype in kinds}
    save({"state_dict": weights}, path)
    found = load_file(path / "model.safetensors")
    assert sorted(found) == sorted(weights)
    assert {name: (t.dtype, tuple(t.shape)) for name, t in found.items()} == {
        name: (t.dtype, tuple(t.shape)) for name, t in weights.items()
    }
    assert {name: as_bytes(t) for name, t in found.items()} == {name: as_bytes(t) for name, t in weights.items()}


def test_values_begin_where_their_type_wants_them(path: Path) -> None:
    weights = {
        "bytes": torch.ones(3, dtype=torch.uint8),
        "half": torch.ones(5).half(),
        "double": torch.ones(3).double(),
    }
    save({"state_dict": weights}, path)
    data = (path / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    assert (8 + length) % 64 == 0
    header = header_of(path)
    assert all(header[name]["data_offsets"][0] % weights[name].dtype.itemsize == 0 for name in weights)


def test_ties_are_written_once_and_named(path: Path) -> None:
    tied = torch.randn(50, 20)
    weights = {"embedding": tied, "head": tied, "other way round": tied.t(), "row": tied[3]}
    save({"state_dict": weights, "callbacks": {"average": tied}}, path)
    with safe_open(path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "head": "embedding"}
        assert sorted(file.keys()) == ["embedding", "other way round", "row"]
    loaded, _ = load_mapped(path)
    pointers = {name: tensor.data_ptr() for name, tensor in loaded["state_dict"].items()}
    assert pointers["embedding"] == pointers["head"] == pointers["other way round"]
    assert loaded["callbacks"]["average"].data_ptr() == pointers["embedding"]
    assert (path / "state.pt").stat().st_size < 4096


def test_parts_of_one_buffer_are_in_both(path: Path) -> None:
    """As weights of recurrent layers are on a GPU."""
    buffer = torch.randn(1000)
    save({"state_dict": {"first": buffer[:600].view(20, 30), "second": buffer[600:]}}, path)
    assert as_bytes(load_file(path / "model.safetensors")["second"]) == as_bytes(buffer[600:])
    assert (path / "state.pt").stat().st_size > 4000


def test_what_safetensors_cannot_hold_is_said(path: Path) -> None:
    weights = {"fine": torch.ones(2), "complex": torch.ones(3, dtype=torch.complex128), "__metadata__": torch.ones(1)}
    weights["view"] = torch.ones(4, dtype=torch.complex64).conj()
    with pytest.warns(UserWarning, match=r"cannot hold complex, __metadata__, view: .* in state\.pt only"):
        save_directory({"state_dict": weights}, path, safetensors=True)
    assert list(load_file(path / "model.safetensors")) == ["fine"]
    loaded, _ = load_mapped(path)
    assert all(bool((loaded["state_dict"][name] == value).all()) for name, value in weights.items())


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_weights_without_values_in_memory_are_left_out(path: Path) -> None:
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    weights = {"fine": torch.ones(2), "meta": torch.empty(3, 4, device="meta"), "nested": nested}
    with pytest.warns(UserWarning, match="cannot hold meta, nested: "):
        save_directory({"state_dict": weights}, path, safetensors=True)
    assert list(load_file(path / "model.safetensors")) == ["fine"]
    loaded, _ = load_mapped(path, weights_only=False)
    assert loaded["state_dict"]["meta"].is_meta
    assert loaded["state_dict"]["meta"].shape == (3, 4)
    assert [len(part) for part in loaded["state_dict"]["nested"].unbind()] == [2, 3]


def test_a_tied_weight_with_the_name_of_the_format(path: Path) -> None:
    weight = torch.arange(3.0)
    save({"a": weight, "format": weight, "b": weight}, path)
    loaded = load_file(path / "model.safetensors")
    assert sorted(loaded) == ["a", "format"]
    assert torch.equal(loaded["format"], weight)
    with safe_open(path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"b": "a", "format": "pt"}


def test_a_tensor_without_its_memory_is_not_read(path: Path) -> None:
    gone = torch.ones(50)
    gone.untyped_storage().resize_(0)
    with (
        pytest.warns(UserWarning, match="cannot hold gone"),
        pytest.raises(CheckpointFormatError, match="does not fit its storage"),
    ):
        save_directory({"state_dict": {"gone": gone}}, path, safetensors=True)


@pytest.mark.parametrize(
    ("obj", "names"),
    [
        ({"w": torch.ones(3), "n": 1}, ["w"]),
        ({"state_dict": {}}, []),
        ([torch.ones(3)], []),
        ({"state_dict": [torch.ones(3)]}, []),
        ({"state_dict": {"w": torch.ones(3), 5: torch.ones(4), "nested": {"x": torch.ones(5)}}}, ["w"]),
    ],
)
def test_what_counts_as_weights(path: Path, obj: Any, names: list[str]) -> None:
    save(obj, path)
    assert list(load_file(path / "model.safetensors")) == names


class Restless:
    """Has another buffer each time it is pickled."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight
        self.count = 0

    def __getstate__(self) -> dict[str, Any]:
        self.count += 1
        return {"view": self.weight[: 100 * self.count]}


def test_an_object_that_changes_while_it_is_saved_is_saved(path: Path) -> None:
    buffer = torch.arange(1000.0)
    save_directory({"state_dict": {"w": buffer[:100]}, "other": Restless(buffer)}, path, safetensors=True)
    loaded, _ = load_mapped(path, weights_only=False)
    assert as_bytes(loaded["state_dict"]["w"]) == as_bytes(buffer[:100])
    assert as_bytes(load_file(path / "model.safetensors")["w"]) == as_bytes(buffer[:100])


@pytest.mark.parametrize("num_threads", [1, 3])
def test_through_the_staging_buffer(path: Path, num_threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As from a device, on any machine, with pieces that are cut."""
    weight = torch.randn((9 << 18) + 1)
    weights = {"weight": weight, "turned": torch.randn(700, 900).t(), "narrow": of_dtype(torch.bfloat16, 999_999)[::3]}
    with monkeypatch.context() as patch:
        for kind in (SavedStorage, GatheredBytes):
            patch.setattr(kind, "is_in_host_memory", property(lambda self: False))
        stats = save_directory(
            {"state_dict": weights, "state": torch.ones(1 << 20)}, path, host_budget_bytes=4 << 20,
            num_threads=num_threads, safetensors=True,
        )  # fmt: skip
    assert 0 < stats.staging_bytes <= 4 << 20
    found = load_file(path / "model.safetensors")
    assert [as_bytes(found[name]) == as_bytes(weights[name]) for name in weights] == [True] * 3
    assert verify_checkpoint(path).is_verified


@pytest.mark.memory
def test_memory_of_weights_in_any_order(path: Path) -> None:
    program = """
import torch
from lightning_memload.memory import MemoryMonitor
from lightning_memload.memory.host import read_status
from lightning_memload.save import save_directory
torch.set_num_threads(1)
small = {"a": torch.ones(9, 3).t()}
save_directory(small, ARGS["path"], safetensors=True)
state = {"a": torch.full((300, 1 << 18), 1.0).t(), "b": torch.full((100 << 18,), 2.0)}
RESULT = []
def contiguous():
    return {name: tensor.contiguous() for name, tensor in state.items()}
for write in (lambda: save_directory(state, ARGS["path"], safetensors=True, num_threads=1), contiguous):
    start = read_status().anonymous_bytes
    with MemoryMonitor() as monitor:
        write()
    RESULT.append(monitor.peaks.anonymous_peak_bytes - start)
"""
    ours, naive = run_fresh(program, path=path).result
    assert ours <= 24 << 20
    assert naive >= 280 << 20  # 300 MiB are put in order; some of that memory was there


# Damage --------------------------------------------------------------------------------------------------------------


def change_manifest(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    # The name of the format stands at the very beginning.
    (path / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["storages"][0].update(offset=m["storages"][0]["offset"] + 64), "ends at byte .* and goes on at"),
        (lambda m: m["storages"][0].update(offset=0), "ends at byte"),
        (lambda m: m["storages"][1].update(offset=1 << 62), "ends at byte .* and goes on at"),
        (lambda m: m["weights"].update(nbytes=1 << 40), "ends at byte .* but gives it 1099511627776"),
        (lambda m: m["weights"].update(header_bytes=1 << 40), "gives the header of model.safetensors 1099511627776"),
        (lambda m: m["weights"].update(copies=[[0, 1]]), "describes a copy of a weight as"),
        (lambda m: m["weights"].update(copies=[[-1, 1, 0]]), "'offset' is -1"),
        (lambda m: m.pop("weights"), "places 2 storages in model.safetensors, but does not describe that file"),
    ],
)
def test_contradictions(path: Path, change: Callable[[dict[str, Any]], object], message: str) -> None:
    save_directory(checkpoint(), path, safetensors=True)
    change_manifest(path, change)
    with pytest.raises(CheckpointFormatError, match=message):
        open_checkpoint(path)
    assert verify_checkpoint(path).damage


def test_another_header_is_not_believed(path: Path) -> None:
    save_directory(checkpoint(), path, safetensors=True)
    data = bytearray((path / "model.safetensors").read_bytes())
    data[12] ^= 1
    (path / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointFormatError, match=r"model.safetensors is damaged: its header has CRC-32"):
        load_mapped(path)


def test_a_missing_file_is_named(path: Path) -> None:
    save_directory(checkpoint(), path, safetensors=True)
    (path / "model.safetensors").unlink()
    with pytest.raises(CheckpointFormatError, match=r"1 of 2 files are missing \(model.safetensors\)"):
        load_mapped(path)


def test_without_the_manifest_it_is_weights(path: Path) -> None:
    save_directory(checkpoint(), path, safetensors=True)
    (path / "manifest.json").unlink()
    index = open_checkpoint(path)
    assert (index.format, [tensor.name for tensor in index]) == ("safetensors", ["a", "b"])
