"""On a real GPU: the file that torch would write, values as the stream leaves them, host memory within the budget."""

from __future__ import annotations

import copy
import gc
import io
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from tests.lightning.pytorch.callbacks import ModelCheckpoint
from tests.lightning.pytorch.plugins.io import AsyncCheckpointIO
from torch import nn
from torch.utils.data import DataLoader

import tests.lightning as L
from lightning_memload import MemoryEfficientRestore, StreamingCheckpointIO, open_checkpoint, save_directory
from lightning_memload.formats import load_mapped
from lightning_memload.memory import MemoryMonitor
from lightning_memload.save import (
    BackgroundSave,
    plan_directory_save,
    plan_torch_save,
    save_torch,
    tensors_of_optimizers,
    write_torch,
)
from lightning_memload.verify import verify_checkpoint
from tests.formats.files import ALL_DTYPES, as_bytes, layouts, of_dtype, tensors_of

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]

MIB = 1 << 20


@pytest.fixture(autouse=True)
def _free_the_gpu() -> Iterator[None]:
    yield
    gc.collect()
    torch.cuda.empty_cache()


def everything() -> dict[str, Any]:
    big = torch.randn(9 * MIB, device="cuda")
    base = torch.arange(1 << 20, device="cuda")
    return {
        "dtypes": {str(dtype): of_dtype(dtype).cuda() for dtype in ALL_DTYPES},
        "layouts": {name: tensor.cuda() for name, tensor in layouts().items()},
        "parameter": nn.Parameter(torch.randn(7, device="cuda")),
        "transposed": torch.randn(300, 70, device="cuda").t(),
        "big": big,
        "tied": big,
        "row": big[100:200],
        "slice": base[1000:1100],
        "host": [torch.randn(1000), torch.tensor(3.0)],
        "steps": [torch.tensor(float(number), device="cuda") for number in range(3000)],
        "sparse": torch.eye(5, device="cuda").to_sparse(),
    }


def assert_same(loaded: Any, obj: Any) -> None:
    expected, found = list(tensors_of(obj)), list(tensors_of(loaded))
    assert [path for path, _ in found] == [path for path, _ in expected]
    for (path, ours), (_, theirs) in zip(found, expected, strict=True):
        assert (ours.dtype, ours.device, ours.shape) == (theirs.dtype, theirs.device, theirs.shape), path
        if ours.layout is torch.sparse_coo:
            assert torch.equal(ours.to_dense(), theirs.to_dense()), path
            continue
        assert ours.stride() == theirs.stride(), path
        assert as_bytes(ours.cpu()) == as_bytes(theirs.cpu()), path


@pytest.mark.parametrize("num_threads", [1, 2, 4, 12])
@pytest.mark.parametrize("budget_bytes", [8 * MIB, 128 * MIB])
def test_every_bit_and_every_device_comes_back(tmp_path: Path, num_threads: int, budget_bytes: int) -> None:
    obj = everything()
    path = tmp_path / "file.pt"
    stats = save_torch(obj, path, num_threads=num_threads, host_budget_bytes=budget_bytes)
    assert 0 < stats.staging_bytes <= budget_bytes
    loaded = torch.load(path, weights_only=True)
    assert_same(loaded, obj)
    assert loaded["big"].data_ptr() == loaded["tied"].data_ptr()
    assert loaded["row"].untyped_storage().data_ptr() == loaded["big"].untyped_storage().data_ptr()
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    index = open_checkpoint(path)
    assert index["big"].storage.location == "cuda:0"
    assert index["host[0]"].storage.location == "cpu"
    assert index["slice"].storage.nbytes < 1000


def test_the_file_is_torchs_but_for_its_identity(tmp_path: Path) -> None:
    obj = {"a": torch.randn(3 * MIB, device="cuda"), "b": [torch.ones(5, device="cuda"), torch.ones(3)]}
    save_torch(obj, tmp_path / "file.pt")
    stock, ours = io.BytesIO(), io.BytesIO()
    torch.save(obj, stock)
    write_torch(obj, ours, name="stream")
    assert ours.getvalue() == (tmp_path / "file.pt").read_bytes()
    with zipfile.ZipFile(tmp_path / "file.pt") as archive, zipfile.ZipFile(stock) as expected:
        for name in set(expected.namelist()) - {"archive/.data/serialization_id"}:
            assert archive.read(name) == expected.read(name), name


@pytest.mark.parametrize("on_side_stream", [False, True])
def test_values_are_those_that_the_current_stream_leaves(tmp_path: Path, on_side_stream: bool) -> None:
    """Work that is still queued when the save begins counts: the copies wait for it."""
    stream = torch.cuda.Stream() if on_side_stream else torch.cuda.current_stream()
    value = torch.zeros(16 * MIB, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(2_000_000_000)  # about a second
        value.fill_(7)
        save_torch({"value": value}, tmp_path / "file.pt")
    assert (torch.load(tmp_path / "file.pt", map_location="cpu")["value"] == 7).all()


def test_host_memory_stays_within_the_budget(tmp_path: Path) -> None:
    """2 GiB from the GPU through 32 MiB, above a warm process; the stock way takes all of it on the host."""
    state = {"state_dict": {f"w{i}": torch.randn(64 * MIB // 4, device="cuda") for i in range(32)}}
    io_plugin = StreamingCheckpointIO(host_budget_mib=32)
    io_plugin.save_checkpoint({"warm": torch.ones(1, device="cuda")}, tmp_path / "warm.ckpt")
    with MemoryMonitor("cuda") as ours:
        io_plugin.save_checkpoint(state, tmp_path / "ours.ckpt")
    with MemoryMonitor("cuda") as stock:
        TorchCheckpointIO().save_checkpoint(state, tmp_path / "stock.ckpt")
    assert (tmp_path / "ours.ckpt").stat().st_size == (tmp_path / "stock.ckpt").stat().st_size
    assert ours.peaks.host_above_start_bytes is not None
    assert ours.peaks.host_above_start_bytes <= (32 + 32) * MIB
    assert ours.peaks.cuda_allocated_peak_bytes is not None
    assert ours.peaks.cuda_allocated_start_bytes is not None
    assert ours.peaks.cuda_allocated_peak_bytes - ours.peaks.cuda_allocated_start_bytes <= MIB
    assert stock.peaks.host_above_start_bytes is not None
    assert stock.peaks.host_above_start_bytes >= 2000 * MIB


def test_pinned_memory_is_given_back(tmp_path: Path) -> None:
    state = torch.ones(32 * MIB, device="cuda")
    for _ in range(5):
        save_torch(state, tmp_path / "file.pt")
    assert torch.empty(32 * MIB, dtype=torch.uint8, pin_memory=True).is_pinned()


class Net(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 64))
        self.losses: list[float] = []

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        loss = self.layers(batch).square().mean()
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), fused=True)


def fit(folder: Path, plugins: list[Any], callbacks: list[Any], max_steps: int, **options: Any) -> tuple[Any, Net]:
    torch.manual_seed(3)
    trainer = L.Trainer(
        accelerator="gpu",
        devices=1,
        max_steps=max_steps,
        plugins=plugins,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    module = Net()
    data: Any = DataLoader(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)), batch_size=8)  # type: ignore[arg-type]
    trainer.fit(module, data, **options)
    return trainer, module


class SaveAtEnd(L.Callback):
    """Saves while everything is still on the GPU."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("make", [StreamingCheckpointIO, lambda: AsyncCheckpointIO(StreamingCheckpointIO())])
def test_what_is_saved_on_the_gpu_resumes_stock_and_ours(tmp_path: Path, make: Any) -> None:
    fit(tmp_path, [make()], [SaveAtEnd(tmp_path / "ours.ckpt")], 5)
    fit(tmp_path, [], [SaveAtEnd(tmp_path / "stock.ckpt")], 5)
    losses = []
    for name, callbacks in (("stock", []), ("ours", []), ("ours", [MemoryEfficientRestore()])):
        _, module = fit(tmp_path, [], callbacks, 10, ckpt_path=tmp_path / f"{name}.ckpt")
        losses.append(module.losses)
    assert len(losses[0]) == 5
    assert losses[0] == losses[1] == losses[2]


class Keep(L.Callback):
    """Keeps a copy of the state after every batch, of which a ModelCheckpoint saves then."""

    def __init__(self) -> None:
        self.states: list[Any] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        optimizers = [optimizer.state_dict() for optimizer in trainer.optimizers]
        self.states.append(copy.deepcopy((dict(pl_module.state_dict()), optimizers)))


@pytest.mark.parametrize("save_snapshot", [False, "auto"])
@pytest.mark.parametrize("asynchronous_save", [True, "until_step"])
def test_asynchronous_saves_hold_the_state_of_the_call(
    tmp_path: Path, asynchronous_save: Any, save_snapshot: Any
) -> None:
    """Steps that run on the GPU right after each save do not reach into its file, and training is as without."""
    _, stock = fit(tmp_path, [], [], 8)
    restore = MemoryEfficientRestore(
        asynchronous_save=asynchronous_save, save_snapshot=save_snapshot, host_budget_mib=1
    )
    keep = Keep()
    saver = ModelCheckpoint(tmp_path / "run", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    _, ours = fit(tmp_path, [], [restore, keep, saver], 8)
    assert ours.losses == stock.losses
    assert len(keep.states) == 8
    for number, expected in enumerate(keep.states, start=1):
        saved = torch.load(tmp_path / "run" / f"step={number}.ckpt", weights_only=False)
        found = (dict(saved["state_dict"]), saved["optimizer_states"])
        for (path, theirs), (_, mine) in zip(tensors_of(expected), tensors_of(found), strict=True):
            assert as_bytes(mine.cpu()) == as_bytes(theirs.cpu()), (number, path)


def test_a_step_waits_for_the_copies_and_not_for_the_disk(tmp_path: Path) -> None:
    """512 MiB through 8 MiB: a step right behind the save changes nothing in the file, and the GPU holds no copy."""
    weight = nn.Parameter(torch.ones(128 * MIB, device="cuda"))
    weight.grad = torch.ones_like(weight)
    optimizer = torch.optim.SGD([weight], lr=0.5)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    plan = plan_torch_save({"weight": weight.detach()}, tmp_path / "file.pt", host_budget_bytes=8 * MIB)
    save = BackgroundSave(plan, tensors_of_optimizers([optimizer]))
    optimizer.step()
    assert torch.cuda.max_memory_allocated() - before <= MIB
    save.result()
    assert (torch.load(tmp_path / "file.pt", map_location="cpu")["weight"] == 1).all()
    assert (weight == 0.5).all()


def test_a_background_save_waits_for_the_stream_of_its_caller(tmp_path: Path) -> None:
    """Another thread writes, whose current stream knows nothing of what is queued here."""
    value = torch.zeros(16 * MIB, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(2_000_000_000)  # about a second
        value.fill_(7)
        BackgroundSave(plan_torch_save({"value": value}, tmp_path / "file.pt")).result()
    assert (torch.load(tmp_path / "file.pt", map_location="cpu")["value"] == 7).all()


@pytest.mark.parametrize("format", ["torch", "directory", "safetensors+state"])
@pytest.mark.parametrize("budget_bytes", [MIB, 128 * MIB])
def test_a_snapshot_holds_the_state_of_its_copy(tmp_path: Path, format: str, budget_bytes: int) -> None:
    """Every dtype and layout, on the GPU and on the host; all bytes change before the first one is written."""
    obj = {"state_dict": everything()}
    del obj["state_dict"]["sparse"]
    options: dict[str, Any] = {"host_budget_bytes": budget_bytes}
    plan: Any = plan_torch_save
    if format != "torch":
        plan, options["safetensors"] = plan_directory_save, format != "directory"
    plan(obj, tmp_path / "expected", **options).run()
    save = plan(obj, tmp_path / "found", **options)
    assert save.copy(lambda needed_bytes: None)
    for _, tensor in tensors_of(obj):
        storage = tensor.untyped_storage()
        torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage, 0, (storage.nbytes(),), (1,)).zero_()
    BackgroundSave(save).result()
    paths = [tmp_path / "expected", *sorted((tmp_path / "expected").rglob("*"))]
    for path in filter(Path.is_file, paths):
        found = tmp_path / "found" / path.relative_to(tmp_path / "expected")
        assert found.read_bytes() == path.read_bytes(), path.name


def test_a_snapshot_takes_the_state_of_the_stream_and_frees_all_memory(tmp_path: Path) -> None:
    """2 GiB: the host's peak is the state and the ring, the GPU holds nothing more, and the ring is unpinned."""
    stream = torch.cuda.Stream()
    warm = plan_torch_save({"warm": torch.ones(1, device="cuda")}, tmp_path / "file.pt")
    assert warm.copy(lambda needed_bytes: None)
    BackgroundSave(warm).result()
    values = [torch.zeros(16 * MIB, device="cuda") for _ in range(32)]
    torch.cuda.synchronize()
    with MemoryMonitor("cuda") as monitor:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(2_000_000_000)  # about a second
            for number, value in enumerate(values):
                value.fill_(number)
            save = plan_torch_save({"values": values}, tmp_path / "file.pt", host_budget_bytes=64 * MIB)
            assert save.copy(lambda needed_bytes: None)
            for value in values:
                value.fill_(-1)
        background = BackgroundSave(save)
        background.result()
    peaks = monitor.peaks
    assert peaks.host_above_start_bytes is not None
    assert peaks.host_above_start_bytes <= (2048 + 64 + 64) * MIB
    assert peaks.cuda_allocated_peak_bytes is not None
    assert peaks.cuda_allocated_start_bytes is not None
    assert peaks.cuda_allocated_peak_bytes - peaks.cuda_allocated_start_bytes <= MIB
    assert background.held_bytes == 0
    loaded = torch.load(tmp_path / "file.pt", map_location="cpu", mmap=True)["values"]
    assert all((value == number).all() for number, value in enumerate(loaded))
    assert torch.empty(32 * MIB, dtype=torch.uint8, pin_memory=True).is_pinned()


def test_a_snapshot_keeps_no_memory_of_the_gpu(tmp_path: Path) -> None:
    """Old values that training replaces are freed at once, not when they are written."""
    ways: list[tuple[Any, dict[str, Any]]] = [(plan_torch_save, {}), (plan_directory_save, {})]
    for plan, options in (*ways, (plan_directory_save, {"safetensors": True})):
        before = torch.cuda.memory_allocated()
        value = torch.ones(64 * MIB, device="cuda")
        save = plan({"state_dict": {"value": value, "strided": value[::2]}}, tmp_path / "file", **options)
        assert save.copy(lambda needed_bytes: None)
        del value
        assert torch.cuda.memory_allocated() == before
        BackgroundSave(save).result()


def test_directory_is_the_same_through_any_ring(tmp_path: Path) -> None:
    obj = everything()
    for num_threads, budget_bytes in ((1, MIB), (4, 128 * MIB)):
        stats = save_directory(
            obj, tmp_path / "folder", num_threads=num_threads, host_budget_bytes=budget_bytes, durable=False
        )
        assert 0 < stats.staging_bytes <= budget_bytes
        loaded, _ = load_mapped(tmp_path / "folder", weights_only=True)
        dense = {name: value for name, value in obj.items() if name != "sparse"}
        for (path, theirs), (_, mine) in zip(
            tensors_of(dense), tensors_of({name: loaded[name] for name in dense}), strict=True
        ):
            assert as_bytes(mine) == as_bytes(theirs.cpu()), path


def test_directory(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    # Three pieces, the last one of an odd size, and a view that starts within the second.
    weight = torch.randn((9 << 18) + 1, device="cuda")
    save_directory({"weight": weight, "view": weight[5 << 18 : 6 << 18], "step": torch.ones(1)}, path)
    loaded, _ = load_mapped(path, weights_only=True)
    assert torch.equal(loaded["weight"], weight.cpu())
    assert torch.equal(loaded["view"], weight[5 << 18 : 6 << 18].cpu())
    manifest = json.loads((path / "manifest.json").read_text())
    assert [storage["location"] for storage in manifest["storages"]] == ["cuda:0", "cpu"]


def test_weights_for_other_programs(tmp_path: Path) -> None:
    """Tensors of any strides on the GPU are in order in the file, and equal after a load, in bounded memory."""
    torch.manual_seed(0)
    kinds = [dtype for dtype in ALL_DTYPES if dtype not in (torch.complex128, torch.complex32)]
    weights = {str(dtype): of_dtype(dtype).cuda() for dtype in kinds}
    weights |= {name: tensor.cuda() for name, tensor in layouts().items()}
    weights |= {"turned": torch.randn(5000, 9000, device="cuda").t(), "large": torch.randn(50 * MIB, device="cuda")}
    weights |= {f"lstm.{name}": value.detach() for name, value in nn.LSTM(512, 512).cuda().named_parameters()}
    obj = {"state_dict": weights, "optimizer_states": [torch.randn(30 * MIB, device="cuda"), torch.tensor(1.0)]}
    save_directory({"state_dict": {"turned": torch.ones(8, 5, device="cuda").t()}}, tmp_path / "warm", safetensors=True)
    torch.cuda.synchronize()
    allocated = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with MemoryMonitor("cuda") as monitor:
        stats = save_directory(obj, tmp_path / "last", safetensors=True, host_budget_bytes=64 * MIB)
    assert 0 < stats.staging_bytes <= 64 * MIB
    host = monitor.peaks.host_above_start_bytes
    assert host is not None
    assert host <= (64 + 32) * MIB
    assert torch.cuda.max_memory_allocated() - allocated <= 64 * MIB + 16 * MIB
    found = load_file(tmp_path / "last" / "model.safetensors")
    assert [name for name in weights if as_bytes(found[name]) != as_bytes(weights[name].cpu())] == []
    loaded, mapped = load_mapped(tmp_path / "last", weights_only=True)
    for name, weight in weights.items():
        assert loaded["state_dict"][name].stride() == weight.stride(), name
        assert as_bytes(loaded["state_dict"][name]) == as_bytes(weight.cpu()), name
    mapped.detach()
    assert verify_checkpoint(tmp_path / "last").is_verified


def test_what_has_not_changed_on_the_gpu_is_linked(tmp_path: Path) -> None:
    frozen = torch.randn(20 * MIB, device="cuda")
    trained = torch.zeros(1000, device="cuda")
    before = None
    for step in range(3):
        trained += 1
        path = tmp_path / str(step)
        stats = save_directory({"frozen": frozen, "trained": trained}, path, link_unchanged_from=before)
        assert stats.bytes_linked == (frozen.nbytes if step else 0)
        before = path
    frozen.view(torch.int32)[-1] ^= 1
    assert save_directory({"frozen": frozen, "trained": trained}, path, link_unchanged_from=before).bytes_linked == 4000
    assert as_bytes(load_mapped(path)[0]["frozen"]) == as_bytes(frozen.cpu())
