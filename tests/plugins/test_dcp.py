"""Checkpoints that two processes saved in shards, resumed and evaluated by one."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.lightning.pytorch.plugins.io import AsyncCheckpointIO

from lightning_memload import MemoryEfficientRestore, StreamingCheckpointIO, convert_checkpoint
from lightning_memload.checkpoint import ChunkedTensor
from lightning_memload.errors import (
    CheckpointFormatError,
    ChecksumError,
    IncompleteCheckpointError,
    OptimizerMismatchError,
)
from lightning_memload.formats import load_mapped, open_checkpoint
from lightning_memload.restore import OptimizerRestore, RestoreSession
from lightning_memload.transfer import LazyRing, choose_layout
from tests.formats.files import save_dcp
from tests.fresh_process import run_program
from tests.plugins.harness import FEATURES, TRUSTED, Case, assert_same, make_trainer, resume
from tests.plugins.modules import Sharded

# Two processes: FSDP2 under ModelParallelStrategy, whose state is then saved once more as a whole, and once more in
# Lightning's layout for FSDP with every matrix cut along its columns, as tensor parallelism does.
PROGRAM = """
import os
import pathlib
import warnings

warnings.simplefilter("ignore")
import tests.lightning as L
import torch
import torch.distributed.checkpoint as dcp
from tests.lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from tests.plugins.harness import make_trainer
from tests.plugins.modules import Sharded


class Distributed(Sharded):
    def configure_model(self):
        mesh = self.device_mesh["data_parallel"]
        for module in (self.first, self.second, self):
            fully_shard(module, mesh=mesh)


class Saving(L.Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx != 4:
            return
        trainer.save_checkpoint(FOLDER / "mp.ckpt")
        trainer.strategy._save_distributed_checkpoint = False
        trainer.save_checkpoint(FOLDER / "full.ckpt")
        trainer.strategy.barrier()
        save_columns(pl_module, trainer.strategy.device_mesh["data_parallel"], trainer.global_rank)
        trainer.strategy.barrier()


def save_columns(module, mesh, rank):
    rest = torch.load(FOLDER / "full.ckpt", weights_only=False)
    numbers = [name for name, _ in module.named_parameters()]

    def cut(value):
        if not isinstance(value, torch.Tensor) or value.dim() == 0:
            return value
        return distribute_tensor(value, mesh, [Shard(value.dim() - 1)])

    (optimizer,) = rest.pop("optimizer_states")
    state = {
        "model": {name: cut(value) for name, value in rest.pop("state_dict").items()},
        "optimizer_0": {
            "state": {
                numbers[number]: {key: cut(value) for key, value in kept.items()}
                for number, kept in optimizer["state"].items()
            },
            # In another order than the optimizer's: what counts are the names.
            "param_groups": [
                {**group, "params": [numbers[number] for number in reversed(group["params"])]}
                for group in optimizer["param_groups"]
            ],
        },
    }
    dcp.save(state, checkpoint_id=FOLDER / "columns.ckpt")
    if rank == 0:
        torch.save(rest, FOLDER / "columns.ckpt" / "meta.pt")


FOLDER = pathlib.Path(os.environ["MEMLOAD_TEST_FOLDER"])
if __name__ == "__main__":
    torch.manual_seed(10)
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    trainer = make_trainer(
        FOLDER, [Saving()], strategy=strategy, devices=2, max_steps=5, use_distributed_sampler=False
    )
    trainer.fit(Distributed())
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not hasattr(torch.cpu.Stream, "record_event"):
        pytest.skip("this torch cannot train with FSDP2 on CPUs")
    folder = tmp_path_factory.mktemp("sharded")
    (folder / "program.py").write_text(PROGRAM)
    done = run_program(folder / "program.py", MEMLOAD_TEST_FOLDER=str(folder))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return folder


LAYOUTS = ["mp.ckpt", "columns.ckpt"]
CASE = Case(Sharded)


@pytest.fixture(scope="module")
def stock(saved: Path) -> Any:
    """Stock Lightning from the file that holds the same state as a whole."""
    return resume(CASE, saved / "full.ckpt", saved, None)


def ordered(value: Any) -> Any:
    """The keys of dicts in one order: that of sharded states follows from which rank wrote what."""
    if isinstance(value, dict):
        return {key: ordered(value[key]) for key in sorted(value, key=str)}
    return type(value)(map(ordered, value)) if type(value) in (list, tuple) else value


def reads(monkeypatch: pytest.MonkeyPatch) -> list[ChunkedTensor]:
    """The chunked tensors that are read from now on."""
    found: list[ChunkedTensor] = []
    original = ChunkedTensor.read

    def read(self: ChunkedTensor) -> torch.Tensor:
        if not self.is_read:
            found.append(self)
        return original(self)

    monkeypatch.setattr(ChunkedTensor, "read", read)
    return found


@pytest.mark.lightning_only
def test_the_directories_are_what_is_meant(saved: Path) -> None:
    """FSDP2 cuts rows, the other one columns; both keep the states under names, and the buffer on one rank."""
    rows, columns = (open_checkpoint(saved / layout) for layout in LAYOUTS)
    for index in (rows, columns):
        assert len(index.files) == 3
        assert len(index["state_dict.first.weight"].chunks) == 2
        assert len(index["optimizer_states[0].state.second.weight.exp_avg"].chunks) == 2
        assert index["average"].shape == (5,)
        assert index["optimizer_states[0].state.second.weight.step"].chunks == ()
    assert rows["state_dict.seen"].chunks == ()
    assert [chunk.starts for chunk in rows["state_dict.first.weight"].chunks] == [(0, 0), (5, 0)]
    assert [chunk.starts for chunk in columns["state_dict.first.weight"].chunks] == [(0, 0), (0, FEATURES // 2)]
    full = torch.load(saved / "full.ckpt", weights_only=False)
    for layout in LAYOUTS:
        ours, _ = load_mapped(saved / layout, weights_only=False)
        assert set(ours) == set(full)
        for name, value in full["state_dict"].items():
            assert torch.equal(ours["state_dict"][name], value)
        assert ours["loops"] == full["loops"]
        assert torch.equal(ours["average"], full["average"])


@pytest.mark.parametrize("meta", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_resumes_as_stock_from_the_whole(
    layout: str, meta: bool, saved: Path, stock: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touched = reads(monkeypatch)
    restore = MemoryEfficientRestore()
    module, probe = resume(CASE, saved / layout, tmp_path, restore, meta=meta)
    stock_module, stock_probe = stock
    assert_same(ordered(stock_probe.restored), ordered(probe.restored), "restored")
    assert_same(stock_module.losses, module.losses, "losses")
    assert_same(ordered(stock_probe.ended), ordered(probe.ended), "ended")
    assert len(module.losses) > 5
    # Everything was streamed and verified, nothing read or copied the ordinary way.
    assert touched == []
    report = restore.report
    assert report is not None
    assert report.mode == "copy"
    index = open_checkpoint(saved / layout)
    restored = sum(t.nbytes for t in index if t.path[0] in ("state_dict", "optimizer_states"))
    assert report.bytes_verified == restored
    assert report.bytes_kept == report.bytes_copied_ordinarily == 0
    assert held(saved) == []


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_converted_directory_resumes_as_stock_from_the_whole(
    layout: str, saved: Path, stock: Any, tmp_path: Path
) -> None:
    convert_checkpoint(saved / layout, tmp_path / "whole.ckpt", weights_only=False)
    module, probe = resume(CASE, tmp_path / "whole.ckpt", tmp_path, MemoryEfficientRestore())
    stock_module, stock_probe = stock
    assert_same(ordered(stock_probe.restored), ordered(probe.restored), "restored")
    assert_same(stock_module.losses, module.losses, "losses")


def held(folder: Path) -> list[str]:
    """Files of the folder that this process has open or mapped."""
    links = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
    names = [os.readlink(link) for link in links if os.path.islink(link)]
    names += Path("/proc/self/maps").read_text().splitlines()
    return [name for name in names if str(folder) in name]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_evaluates_as_stock_from_the_whole(layout: str, saved: Path, tmp_path: Path) -> None:
    losses = []
    for path, callbacks in ((saved / "full.ckpt", []), (saved / layout, [MemoryEfficientRestore()])):
        torch.manual_seed(5)
        module = Sharded()
        trainer = make_trainer(tmp_path, callbacks)
        trainer.validate(module, ckpt_path=path, verbose=False, **TRUSTED)
        trainer.predict(module, module.val_dataloader(), ckpt_path=path, **TRUSTED)
        losses.append(module.losses)
    assert len(losses[0]) == 8
    assert_same(losses[0], losses[1], "losses")
    assert held(saved) == []


def test_the_checkpoint_io_alone(saved: Path, stock: Any, tmp_path: Path) -> None:
    case = Case(Sharded, plugins=lambda: [AsyncCheckpointIO(StreamingCheckpointIO())])
    module, probe = resume(case, saved / "mp.ckpt", tmp_path, None)
    assert_same(stock[0].losses, module.losses, "losses")
    assert_same(ordered(stock[1].ended["parameters"]), ordered(probe.ended["parameters"]), "ended")


def test_assigning_is_not_possible(saved: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, [MemoryEfficientRestore(mode="assign")])
    with pytest.warns(UserWarning, match="stores its tensors in parts.*The weights are copied"):
        trainer.validate(Sharded(), ckpt_path=saved / "mp.ckpt", verbose=False, **TRUSTED)


def test_a_hook_changes_a_tensor(saved: Path, tmp_path: Path) -> None:
    class Halved(Sharded):
        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            weights = checkpoint["state_dict"]
            weights["first.weight"] = weights["first.weight"] / 2
            weights["second.weight"].zero_()

    _, probe = resume(Case(Halved, trains=False), saved / "columns.ckpt", tmp_path, MemoryEfficientRestore())
    expected = torch.load(saved / "full.ckpt", weights_only=False)["state_dict"]
    assert torch.equal(probe.restored["parameters"]["first.weight"], expected["first.weight"] / 2)
    assert not probe.restored["parameters"]["second.weight"].any()
    assert torch.equal(probe.restored["parameters"]["first.bias"], expected["first.bias"])


# What is missing is said ---------------------------------------------------------------------------------------------


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved / "mp.ckpt", tmp_path / "mp.ckpt"))


class OtherNames(Sharded):
    def groups(self) -> list[dict[str, Any]]:
        return list(reversed(super().groups()))


def test_optimizer_of_other_parameters(saved: Path, tmp_path: Path) -> None:
    """The sizes agree, so that stock torch would hand every parameter another one's states."""
    with pytest.raises(
        OptimizerMismatchError,
        match=r"optimizer_states\[0\]\.param_groups\[0\] .* is for 2 parameters by name, the optimizer's is for 2\. "
        r"Not among the optimizer's: second\.weight, second\.bias\. Missing .*: first\.weight, first\.bias\.",
    ) as caught:
        resume(Case(OtherNames), saved / "mp.ckpt", tmp_path, MemoryEfficientRestore())
    assert caught.value.missing == ("first.weight", "first.bias")
    assert caught.value.unexpected == ("second.weight", "second.bias")


def test_names_of_wrapped_modules(tmp_path: Path) -> None:
    """torch.compile and activation checkpointing put themselves into the names; strategies save without them."""
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    names = ["0.weight", "0.bias", "1.weight", "1.bias"]
    values = {name: torch.randn(parameter.shape) for name, parameter in module.named_parameters()}
    saved = {"state": {n: {"momentum_buffer": v} for n, v in values.items()}, "param_groups": [{"params": names[::-1]}]}
    save_dcp({"optim": saved}, tmp_path / "dcp")
    loaded, mapped = load_mapped(tmp_path / "dcp")
    optimizer = torch.optim.SGD(module.parameters(), momentum=0.9)
    session = RestoreSession(mapped, device=torch.device("cpu"), ring=LazyRing(choose_layout(1 << 20, 1), pinned=False))
    wrapped = {
        f"_orig_mod.{name.replace('.', '._checkpoint_wrapped_module.')}": parameter
        for name, parameter in module.named_parameters()
    }
    restore = OptimizerRestore([optimizer], session, parameters=wrapped)
    optimizer.load_state_dict(loaded["optim"])
    restore.remove()
    session.close()
    for name, parameter in module.named_parameters():
        assert type(optimizer.state[parameter]["momentum_buffer"]) is torch.Tensor
        assert torch.equal(optimizer.state[parameter]["momentum_buffer"], values[name])
    assert session.bytes_copied_ordinarily == 0


def test_lost_files(copied: Path, tmp_path: Path) -> None:
    for file in copied.glob("*.distcp"):
        file.unlink()
    with pytest.raises(CheckpointFormatError, match=r"lacks 2 of the 2 files .*__0_0\.distcp, __1_0\.distcp"):
        resume(CASE, copied, tmp_path, MemoryEfficientRestore())


def test_damaged_part(copied: Path, tmp_path: Path) -> None:
    index = open_checkpoint(copied)
    file, position = index.place(index["optimizer_states[0].state.first.weight.exp_avg"].chunks[1].storage.offset)
    with open(file, "r+b") as stream:
        stream.seek(position)
        stream.write(b"\xff\xfe\xfd")
    with pytest.raises(ChecksumError, match=r"__1_0\.distcp is damaged.*first\.weight\.exp_avg"):
        resume(CASE, copied, tmp_path, MemoryEfficientRestore())


def test_no_checkpoint_of_a_trainer(tmp_path: Path) -> None:
    save_dcp({"model": Sharded().state_dict()}, tmp_path / "bare")
    trainer = make_trainer(tmp_path, [MemoryEfficientRestore()])
    with pytest.raises(IncompleteCheckpointError, match=r"bare holds weights, but not: optimizer"):
        trainer.fit(Sharded(), ckpt_path=tmp_path / "bare", **TRUSTED)


def test_weights_only_forbids_what_meta_holds(copied: Path, tmp_path: Path) -> None:
    if not TRUSTED:
        pytest.skip("Lightning 2.5 has no such argument")
    meta = torch.load(copied / "meta.pt", weights_only=False)
    torch.save({**meta, "case": CASE}, copied / "meta.pt")
    trainer = make_trainer(tmp_path, [MemoryEfficientRestore()])
    with pytest.raises(pickle.UnpicklingError, match="refuses under weights_only=True"):
        trainer.fit(Sharded(), ckpt_path=copied, weights_only=True)
    assert held(copied) == []
