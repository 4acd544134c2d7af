"""On a real GPU: the same bits as stock Lightning, the placement of torch, and host memory within the budget."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import tests.lightning as L
from lightning_memload import (
    ChecksumError,
    InsufficientMemoryError,
    MemoryEfficientRestore,
    load_weights,
    meta_init,
)
from lightning_memload.memory import MemoryMonitor
from lightning_memload.restore import StateStream, follow_recipes
from lightning_memload.storage import LocalFile
from lightning_memload.transfer import RingLayout, StagingRing, TensorCopy, choose_layout, transfer

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]

MIB = 1 << 20
OptimizerFactory = Callable[[Any], torch.optim.Optimizer]


class Net(L.LightningModule):
    """Batch norm, a tie, a non-persistent buffer, an LSTM: one of each trouble."""

    def __init__(self, make_optimizer: OptimizerFactory, late: bool = False) -> None:
        super().__init__()
        self.make_optimizer = make_optimizer
        self.losses: list[float] = []
        if not late:
            self.build()

    def build(self) -> None:
        self.first = nn.Linear(64, 256)
        self.norm = nn.BatchNorm1d(256)
        self.second = nn.Linear(256, 256)
        self.tied = nn.Linear(256, 256)
        self.tied.weight = self.second.weight
        self.lstm = nn.LSTM(256, 32, batch_first=True)
        self.conv = nn.Conv1d(1, 4, 3)
        self.register_buffer("scale", torch.full((1,), 0.5), persistent=False)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        x = self.norm(self.first(batch)).relu()
        x = self.tied(self.second(x).relu()) * self.scale
        y, _ = self.lstm(x.unsqueeze(1))
        loss = y.float().square().mean() + self.conv(x.unsqueeze(1)).float().square().mean()
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        x = self.norm(self.first(batch)).relu()
        self.log("v", self.tied(self.second(x).relu()).float().mean())

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self.parameters())
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)}


class LateNet(Net):
    def __init__(self, make_optimizer: OptimizerFactory) -> None:
        super().__init__(make_optimizer, late=True)

    def configure_model(self) -> None:
        if not hasattr(self, "first"):
            self.build()


OPTIMIZERS: dict[str, OptimizerFactory] = {
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "adamw-capturable": lambda p: torch.optim.AdamW(p, lr=1e-2, capturable=True),
    "adamw-amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
}


@pytest.fixture(autouse=True)
def _deterministic() -> Iterator[None]:
    torch.backends.cudnn.deterministic = True
    yield
    gc.collect()
    torch.cuda.empty_cache()


def data() -> DataLoader[torch.Tensor]:
    return DataLoader(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)), batch_size=8)  # type: ignore[arg-type]


def make_trainer(tmp_path: Path, callbacks: list[L.Callback], **arguments: Any) -> L.Trainer:
    return L.Trainer(
        accelerator="gpu",
        devices=1,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        **arguments,
    )


def make_checkpoint(tmp_path: Path, make_optimizer: OptimizerFactory, **arguments: Any) -> Path:
    L.seed_everything(0)
    trainer = make_trainer(tmp_path, [], max_steps=5, **arguments)
    trainer.fit(Net(make_optimizer), data())
    path = tmp_path / "model.ckpt"
    trainer.save_checkpoint(path)
    return path


def resume(
    tmp_path: Path, path: Path, model: Net, restore: MemoryEfficientRestore | None, **arguments: Any
) -> dict[str, Any]:
    """Resumes for five steps and returns everything that could differ."""
    L.seed_everything(1)
    trainer = make_trainer(tmp_path, [restore] if restore else [], max_steps=10, **arguments)
    states: dict[str, Any] = {}

    class Snapshot(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            for name, value in pl_module.state_dict().items():
                states[name] = (value.device, value.clone())
            for number, state in trainer.optimizers[0].state_dict()["state"].items():
                for key, value in state.items():
                    states[f"{number}.{key}"] = (value.device, value.clone()) if torch.is_tensor(value) else value

    trainer.callbacks.append(Snapshot())
    trainer.fit(model, data(), ckpt_path=path)
    return {"states": states, "losses": model.losses, "lr": trainer.lr_scheduler_configs[0].scheduler.state_dict()}


def assert_equal(stock: dict[str, Any], ours: dict[str, Any]) -> None:
    assert stock["losses"] == ours["losses"]
    assert len(ours["losses"]) == 5
    assert stock["lr"] == ours["lr"]
    assert stock["states"].keys() == ours["states"].keys()
    for name, expected in stock["states"].items():
        actual = ours["states"][name]
        if isinstance(expected, tuple):
            assert expected[0] == actual[0], name
            assert expected[1].dtype == actual[1].dtype, name
            assert torch.equal(expected[1], actual[1]), name
        else:
            assert expected == actual, name


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_resume_equals_stock(tmp_path: Path, optimizer: str) -> None:
    make = OPTIMIZERS[optimizer]
    path = make_checkpoint(tmp_path, make)
    stock = resume(tmp_path, path, Net(make), None)
    ours = resume(tmp_path, path, Net(make), MemoryEfficientRestore())
    assert_equal(stock, ours)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_states_that_follow_the_weights_equal_stock(
    tmp_path: Path, optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[bool] = []
    take = StateStream.take

    def noted(stream: StateStream, wanted: Any, **kwargs: Any) -> None:
        take(stream, wanted, **kwargs)
        taken.extend(state.destination is not None for state in wanted)

    monkeypatch.setattr(StateStream, "take", noted)
    # The states of the tests are small.
    monkeypatch.setattr("lightning_memload.restore.state_stream._WORTH_BYTES", 1)
    monkeypatch.setattr("lightning_memload.restore.state_stream._WORTH_BYTES_EACH", 0)
    make = OPTIMIZERS[optimizer]
    path = make_checkpoint(tmp_path, make)
    stock = resume(tmp_path, path, Net(make), None)
    ours = resume(tmp_path, path, Net(make), MemoryEfficientRestore())
    assert_equal(stock, ours)
    assert taken
    assert all(taken)


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_that_overlaps_equals_stock(tmp_path: Path, optimizer: str, accumulate: int) -> None:
    make = OPTIMIZERS[optimizer]
    path = make_checkpoint(tmp_path, make)
    stock = train_on(tmp_path, path, Net(make), None, accumulate_grad_batches=accumulate)
    restore = MemoryEfficientRestore(overlap=True)
    ours = train_on(tmp_path, path, Net(make), restore, accumulate_grad_batches=accumulate)
    assert_trained_equal(stock, ours)
    assert restore.report is not None
    assert restore.report.waited_seconds is not None


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed", "bf16-true"])
def test_precisions_that_overlap_equal_stock(tmp_path: Path, precision: str) -> None:
    make = OPTIMIZERS["adamw"]
    path = make_checkpoint(tmp_path, make, precision=precision)
    stock = train_on(tmp_path, path, Net(make), None, precision=precision)
    ours = train_on(tmp_path, path, Net(make), MemoryEfficientRestore(overlap=True), precision=precision)
    assert_trained_equal(stock, ours)


def test_a_look_before_the_first_step_waits(tmp_path: Path) -> None:
    make = OPTIMIZERS["adamw-fused"]
    path = make_checkpoint(tmp_path, make)
    stock = resume(tmp_path, path, Net(make), None)
    assert_equal(stock, resume(tmp_path, path, Net(make), MemoryEfficientRestore(overlap=True)))


def train_on(
    tmp_path: Path, path: Path, model: Net, restore: MemoryEfficientRestore | None, **arguments: Any
) -> dict[str, Any]:
    """Resumes, and returns everything that could differ in the end. No code looks at the states before a step."""
    L.seed_everything(1)
    trainer = make_trainer(tmp_path, [restore] if restore else [], max_steps=10, **arguments)
    trainer.fit(model, data(), ckpt_path=path)
    states = trainer.optimizers[0].state_dict()["state"]
    named = {f"{number}.{key}": value for number, state in states.items() for key, value in state.items()}
    return {"losses": model.losses, "states": named, "weights": model.state_dict()}


def assert_trained_equal(stock: dict[str, Any], ours: dict[str, Any]) -> None:
    assert stock["losses"] == ours["losses"]
    for part in ("states", "weights"):
        assert stock[part].keys() == ours[part].keys()
        for name, expected in stock[part].items():
            actual = ours[part][name]
            assert torch.equal(expected, actual) if torch.is_tensor(expected) else expected == actual, name


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed", "bf16-true", "16-true"])
def test_precisions_equal_stock(tmp_path: Path, precision: str) -> None:
    make = OPTIMIZERS["sgd-momentum" if precision == "16-true" else "adamw"]
    path = make_checkpoint(tmp_path, make, precision=precision)
    stock = resume(tmp_path, path, Net(make), None, precision=precision)
    ours = resume(tmp_path, path, Net(make), MemoryEfficientRestore(), precision=precision)
    assert_equal(stock, ours)


def test_full_precision_checkpoint_into_true_half_precision(tmp_path: Path) -> None:
    make = OPTIMIZERS["adamw"]
    path = make_checkpoint(tmp_path, make)
    stock = resume(tmp_path, path, Net(make), None, precision="bf16-true")
    ours = resume(tmp_path, path, Net(make), MemoryEfficientRestore(), precision="bf16-true")
    assert_equal(stock, ours)


@pytest.mark.parametrize("way", ["configure-model", "meta-init"])
def test_other_ways_to_build_equal_stock(tmp_path: Path, way: str) -> None:
    make = OPTIMIZERS["adamw-fused"]
    path = make_checkpoint(tmp_path, make)
    stock = resume(tmp_path, path, Net(make), None)
    if way == "configure-model":
        model: Net = LateNet(make)
    else:
        with meta_init():
            model = Net(make)
    assert_equal(stock, resume(tmp_path, path, model, MemoryEfficientRestore()))
    assert model.tied.weight is model.second.weight


class Masked(nn.Module):
    """A large buffer that no file holds, and data that no file holds."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 64)
        self.table = nn.Parameter(torch.empty(64, 64), requires_grad=False)
        with torch.no_grad():
            self.table.copy_(torch.arange(4096.0).view(64, 64))
        self.register_buffer("mask", torch.ones(4096, 4096).tril(), persistent=False)


def test_buffers_are_made_on_the_gpu() -> None:
    with meta_init(device="cuda"):
        Masked()  # what CUDA itself takes
    with MemoryMonitor() as monitor, meta_init(device="cuda"):
        module = Masked()
        assert module.layer.weight.is_cuda
        assert module.layer.weight.device == torch.device("cuda", torch.cuda.current_device())
    assert monitor.peaks.anonymous_above_start_bytes < 16 * MIB
    assert module.layer.weight.is_meta
    assert module.mask.is_cuda
    assert torch.equal(module.mask.cpu(), torch.ones(4096, 4096).tril())  # type: ignore[arg-type]
    follow_recipes(module)
    assert module.table.is_cuda
    assert torch.equal(module.table.cpu(), torch.arange(4096.0).view(64, 64))
    assert module.layer.weight.std() > 0


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_the_file_lacks_goes_to_the_gpu(tmp_path: Path, device: str) -> None:
    torch.save({f"layer.{name}": value for name, value in nn.Linear(64, 64).state_dict().items()}, tmp_path / "w.pt")
    with meta_init(device=device):
        module = Masked()
    load_weights(module, tmp_path / "w.pt", device="cuda", strict=False)
    assert all(tensor.is_cuda for tensor in (*module.parameters(), *module.buffers()))
    assert torch.equal(module.table.cpu(), torch.arange(4096.0).view(64, 64))


def test_random_values_on_the_gpu_leave_its_generator_alone() -> None:
    torch.manual_seed(1)
    with meta_init(device="cuda"):
        module = nn.Linear(64, 64)
    torch.cuda.manual_seed(5)
    expected = torch.randn(4, device="cuda")
    torch.cuda.manual_seed(5)
    follow_recipes(module)
    assert torch.equal(torch.randn(4, device="cuda"), expected)


def test_evaluation_equals_stock_and_reads_no_optimizer(tmp_path: Path) -> None:
    make = OPTIMIZERS["adamw"]
    path = make_checkpoint(tmp_path, make)
    results = []
    for restore in (None, MemoryEfficientRestore()):
        trainer = make_trainer(tmp_path, [restore] if restore else [])
        results.append(trainer.validate(Net(make), data(), ckpt_path=path, verbose=False))
    assert results[0] == results[1]
    assert restore is not None
    assert restore.report is not None
    weights = sum(t.numel() * t.element_size() for t in Net(make).state_dict().values())
    assert restore.report.total.bytes_read < weights * 1.1


def test_parameters_keep_their_identity_and_leave_the_host(tmp_path: Path) -> None:
    make = OPTIMIZERS["adamw"]
    path = make_checkpoint(tmp_path, make)
    model = Net(make)
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    resume(tmp_path, path, model, MemoryEfficientRestore())
    assert before == {name: id(parameter) for name, parameter in model.named_parameters()}


def test_damage_is_found_before_training_and_the_model_is_as_it_was(tmp_path: Path) -> None:
    make = OPTIMIZERS["adamw"]
    path = make_checkpoint(tmp_path, make)
    from lightning_memload import open_checkpoint

    start, end = open_checkpoint(path)["state_dict.second.weight"].file_range
    damaged = bytearray(path.read_bytes())
    damaged[(start + end) // 2] ^= 1
    path.write_bytes(damaged)
    model = Net(make)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ChecksumError, match=r"second\.weight"):
        resume(tmp_path, path, model, MemoryEfficientRestore())
    assert model.losses == []
    for name, value in model.state_dict().items():
        assert torch.equal(value.cpu(), before[name]), name


def test_a_restore_that_cannot_fit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make = OPTIMIZERS["adamw"]
    path = make_checkpoint(tmp_path, make)
    monkeypatch.setattr("lightning_memload.restore.free_memory.free_device_bytes", lambda device: 1000)
    with pytest.raises(InsufficientMemoryError, match="check_fit"):
        resume(tmp_path, path, Net(make), MemoryEfficientRestore())


def test_host_memory_stays_within_the_budget(tmp_path: Path) -> None:
    """1 GiB onto the GPU through 32 MiB; the naive way on the same file takes all of it."""
    state = {f"w{i}": torch.randn(64 * MIB // 4) for i in range(16)}
    path = tmp_path / "big.pt"
    torch.save(state, path)
    del state
    gc.collect()
    from lightning_memload.formats import load_mapped

    loaded, mapped = load_mapped(path)
    destinations = {name: torch.empty_like(value, device="cuda") for name, value in loaded.items()}
    torch.cuda.synchronize()
    layout = choose_layout(32 * MIB, 4)
    with MemoryMonitor("cuda") as ours, StagingRing(layout, pinned=True) as ring:
        copies = [
            TensorCopy(name, mapped.locate(value)[0].offset, value.dtype, value.stride(), destinations[name])
            for name, value in loaded.items()
        ]
        transfer(
            mapped.source,
            copies,
            lambda: ring,
            num_threads=layout.num_threads,
            block_bytes=layout.block_bytes,
            on_progress=lambda _: ours.tick(pinned_bytes=ring.pinned_bytes),
        )
    with MemoryMonitor("cuda") as naive:
        expected = torch.load(path, map_location="cpu")
    for name, value in expected.items():
        assert torch.equal(destinations[name].cpu(), value)
    assert ours.peaks.host_above_start_bytes is not None
    assert ours.peaks.host_above_start_bytes <= (32 + 32) * MIB
    assert naive.peaks.host_above_start_bytes is not None
    assert naive.peaks.host_above_start_bytes >= 1000 * MIB


@pytest.mark.parametrize("source", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int32])
@pytest.mark.parametrize("target", [torch.float32, torch.bfloat16, torch.float64])
def test_conversion_and_rearrangement_on_the_device(tmp_path: Path, source: torch.dtype, target: torch.dtype) -> None:
    values = torch.randn(700, 1111).mul(100).to(source)
    tensors = {"plain": values, "transposed": values.t(), "sliced": values[3:600:2, ::3], "scalar": values[0, 0]}
    path = tmp_path / "t.pt"
    torch.save(tensors, path)
    from lightning_memload.formats import load_mapped

    loaded, mapped = load_mapped(path)
    copies, expected = [], []
    for name, value in loaded.items():
        destination = torch.full(value.shape, 7, dtype=target, device="cuda")
        copies.append(TensorCopy(name, mapped.locate(value)[0].offset, value.dtype, value.stride(), destination))
        expected.append(value.to(target))
    with StagingRing(RingLayout(3, 4, 256 * 1024), pinned=True) as ring:
        transfer(mapped.source, copies, lambda: ring, num_threads=3, block_bytes=256 * 1024)
    for copy, value in zip(copies, expected, strict=True):
        assert torch.equal(copy.destination.cpu(), value), copy.name


def test_pinned_memory_is_given_back_and_can_be_pinned_again() -> None:
    for _ in range(5):
        with StagingRing(RingLayout(4, 8, 4 * MIB), pinned=True) as ring:
            assert ring.pinned_bytes == 32 * MIB
            assert ring.tensors[0].is_pinned()
        assert ring.pinned_bytes == 0
    assert torch.empty(32 * MIB, dtype=torch.uint8, pin_memory=True).is_pinned()


def test_failing_read_ends_all_threads_and_the_gpu_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "t.bin"
    path.write_bytes(bytes(20 * MIB))
    destination = torch.empty(30 * MIB, dtype=torch.uint8, device="cuda")
    from lightning_memload import CheckpointReadError

    copies = [TensorCopy("t", 0, torch.uint8, (1,), destination)]
    with (
        StagingRing(RingLayout(4, 5, MIB), pinned=True) as ring,
        LocalFile(path) as file,
        pytest.raises(CheckpointReadError, match="ends at byte"),
    ):
        transfer(file, copies, lambda: ring, num_threads=4, block_bytes=MIB)
    destination.zero_()
    torch.cuda.synchronize()
