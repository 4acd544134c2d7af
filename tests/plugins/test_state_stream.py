"""Optimizer states that stream behind the weights, before the optimizers exist: the values are those of stock."""

from __future__ import annotations

import gc
import os
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tests.lightning as L
from lightning_memload import ChecksumError, MemoryEfficientRestore
from lightning_memload.restore import RestoreSession, StateStream
from lightning_memload.restore.placement import PlannedState
from lightning_memload.restore.side_stream import SideStream
from tests.plugins.harness import (
    TRUSTED,
    Case,
    ManualModule,
    TinyModule,
    adamw,
    make_trainer,
    same_resume,
    sgd,
    write_checkpoint,
)
from tests.plugins.restored import assert_clean, flip_byte, held

NUM_STATES = 12  # of AdamW for the four parameters of a TinyModule


class Streams:
    """Counts what streams bring, and what is streamed in the ordinary way after them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun: list[StateStream] = []
        self.given = 0
        self.left = 0
        begin, take = StateStream.begin.__func__, StateStream.take

        def counted_begin(*args: Any) -> StateStream | None:
            stream: StateStream | None = begin(StateStream, *args)
            self.begun += [stream] if stream is not None else []
            return stream

        def counted_take(stream: StateStream, wanted: Any, **kwargs: Any) -> None:
            take(stream, wanted, **kwargs)
            self.given += sum(state.destination is not None for state in wanted)
            self.left += sum(state.destination is None for state in wanted)

        monkeypatch.setattr(StateStream, "begin", counted_begin)
        monkeypatch.setattr(StateStream, "take", counted_take)
        # The states of the tests are small.
        monkeypatch.setattr("lightning_memload.restore.state_stream._WORTH_BYTES", 1)
        monkeypatch.setattr("lightning_memload.restore.state_stream._WORTH_BYTES_EACH", 0)


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Streams:
    return Streams(monkeypatch)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_checkpoint(Case(lambda: TinyModule(adamw)), tmp_path)


def fit(path: Path, *callbacks: L.Callback, module: TinyModule | None = None) -> L.Trainer:
    trainer = make_trainer(path.parent, callbacks, max_epochs=1)
    trainer.fit(module or TinyModule(adamw), ckpt_path=path, **TRUSTED)
    return trainer


class TwoOptimizers(ManualModule):
    """Both optimizers step in each batch."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()


def capturable(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.01, amsgrad=True)


@pytest.mark.parametrize("meta", [False, True], ids=["in-memory", "meta"])
@pytest.mark.parametrize(
    ("make", "number"),
    [(lambda: TinyModule(adamw), NUM_STATES), (lambda: TinyModule(capturable), 16), (TwoOptimizers, 8)],
    ids=["adamw", "amsgrad", "two-optimizers"],
)
def test_all_states_are_taken_up(
    make: Callable[[], TinyModule], number: int, meta: bool, tmp_path: Path, streams: Streams
) -> None:
    restore = same_resume(Case(make), tmp_path, meta=meta)
    assert (streams.given, streams.left) == (number, 0)
    report = restore.report
    assert report is not None
    assert [phase.name for phase in report.phases] == ["open", "weights", "optimizers"]
    # Each state was read once, and is counted where it was needed.
    nbytes = sum(
        tensor.nbytes
        for optimizer in torch.load(tmp_path / "case.ckpt", weights_only=False)["optimizer_states"]
        for state in optimizer["state"].values()
        for tensor in state.values()
    )
    assert nbytes <= report.phases[2].bytes_read < 2 * nbytes + 64 * number
    assert not streams.begun[0]._plans


def test_optimizers_without_states_have_no_stream(tmp_path: Path, streams: Streams) -> None:
    same_resume(Case(lambda: TinyModule(sgd)), tmp_path)
    assert not streams.begun


def to_double(checkpoint: dict[str, Any]) -> None:
    for state in checkpoint["optimizer_states"][0]["state"].values():
        state["exp_avg"] = state["exp_avg"].double()


def tie(checkpoint: dict[str, Any]) -> None:
    states = checkpoint["optimizer_states"][0]["state"]
    states[0]["exp_avg_sq"] = states[0]["exp_avg"]
    both = torch.stack([states[1]["exp_avg"], states[1]["exp_avg_sq"]])
    states[1]["exp_avg"], states[1]["exp_avg_sq"] = both[0], both[1]


def further(checkpoint: dict[str, Any]) -> None:
    """States that lie in no record of the file, or are no floating-point tensors."""
    for state in checkpoint["optimizer_states"][0]["state"].values():
        state.update(empty=torch.empty(0, 3), number=1, count=torch.tensor([1, 2]), nested={"a": torch.ones(2)})


def strides(checkpoint: dict[str, Any]) -> None:
    for state in checkpoint["optimizer_states"][0]["state"].values():
        if state["exp_avg"].dim() == 2:
            state["exp_avg"] = state["exp_avg"].t().contiguous().t()


def test_states_are_converted_on_the_way(tmp_path: Path, streams: Streams) -> None:
    same_resume(Case(lambda: TinyModule(adamw), edit=to_double), tmp_path)
    assert (streams.given, streams.left) == (NUM_STATES, 0)


def test_further_states_do_not_stop_the_others(tmp_path: Path, streams: Streams) -> None:
    same_resume(Case(lambda: TinyModule(adamw), edit=further), tmp_path)
    assert streams.given == NUM_STATES


class Grouped(torch.optim.AdamW):
    """Saves its groups in a layout of its own, whose parameters are lists."""

    def state_dict(self) -> dict[str, Any]:
        saved = super().state_dict()
        return {**saved, "param_groups": [{**g, "params": [[n] for n in g["params"]]} for g in saved["param_groups"]]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        groups = [{**g, "params": [n for (n,) in g["params"]]} for g in state_dict["param_groups"]]
        super().load_state_dict({**state_dict, "param_groups": groups})


def test_another_layout_is_left_alone(tmp_path: Path, streams: Streams) -> None:
    same_resume(Case(lambda: TinyModule(lambda parameters: Grouped(parameters, lr=0.01))), tmp_path)
    assert not streams.begun


def test_other_strides_are_kept(tmp_path: Path, streams: Streams) -> None:
    same_resume(Case(lambda: TinyModule(adamw), edit=strides), tmp_path)
    assert streams.begun
    assert streams.given < NUM_STATES


class TwoTypes(TinyModule):
    """One layer in double precision."""

    def __init__(self) -> None:
        super().__init__(adamw)
        self.second.double()

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(inputs)).double())


def test_a_wrong_guess_is_streamed_again(tmp_path: Path, streams: Streams) -> None:
    same_resume(Case(TwoTypes, edit=to_double), tmp_path)
    assert streams.begun
    assert streams.left


@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
def test_the_precision_of_the_trainer_is_known(precision: Any, tmp_path: Path, streams: Streams) -> None:
    to_float = {"precision": precision}

    def edit(checkpoint: dict[str, Any]) -> None:
        for state in checkpoint["optimizer_states"][0]["state"].values():
            state.update({key: value.float() for key, value in state.items()})

    same_resume(Case(lambda: TinyModule(adamw), trainer=to_float, edit=edit), tmp_path)
    assert (streams.given, streams.left) == (NUM_STATES, 0)


class Edits(L.Callback):
    """Changes what the Trainer loads, after the weights have been loaded. The states are on their way then."""

    def __init__(self, edit: Callable[[dict[str, Any], L.LightningModule], None]) -> None:
        self.edit = edit

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self.edit(checkpoint, pl_module)


def _states(checkpoint: dict[str, Any]) -> dict[int, dict[str, torch.Tensor]]:
    states: dict[int, dict[str, torch.Tensor]] = checkpoint["optimizer_states"][0]["state"]
    return states


def in_place(checkpoint: dict[str, Any], module: L.LightningModule) -> None:
    _states(checkpoint)[0]["exp_avg"].mul_(3)


def through_data(checkpoint: dict[str, Any], module: L.LightningModule) -> None:
    states = _states(checkpoint)
    states[0]["exp_avg"].data = states[0]["exp_avg_sq"].data


def exchange(checkpoint: dict[str, Any], module: L.LightningModule) -> None:
    states = _states(checkpoint)
    states[0]["exp_avg"], states[0]["exp_avg_sq"] = states[0]["exp_avg_sq"], states[0]["exp_avg"]


def forget(checkpoint: dict[str, Any], module: L.LightningModule) -> None:
    checkpoint["optimizer_states"][0]["state"] = {}


def load_again(checkpoint: dict[str, Any], module: L.LightningModule) -> None:
    state_dict = {key.removeprefix("second."): v for key, v in checkpoint["state_dict"].items() if "second." in key}
    module.second.load_state_dict({key: value + 1 for key, value in state_dict.items()})
    module.second.load_state_dict(state_dict)


@pytest.mark.parametrize("edit", [in_place, through_data, exchange, forget, load_again])
def test_hooks_that_run_meanwhile(edit: Any, tmp_path: Path, streams: Streams) -> None:
    restore = same_resume(Case(lambda: TinyModule(adamw), callbacks=lambda: [Edits(edit)]), tmp_path)
    assert streams.begun
    assert restore.report is not None
    assert not held(Path(restore.report.path))


def test_states_that_share_memory_still_share_it(tmp_path: Path, streams: Streams) -> None:
    same_resume(Case(lambda: TinyModule(adamw), edit=tie), tmp_path)
    assert streams.begun


def test_damage_names_the_tensor_before_training(path: Path, streams: Streams) -> None:
    flip_byte(path, "optimizer_states[0].state[3].exp_avg_sq")
    module = TinyModule(adamw)
    with pytest.raises(ChecksumError, match=r"optimizer_states\[0\].state\[3\].exp_avg_sq"):
        fit(path, MemoryEfficientRestore(), module=module)
    assert streams.begun
    assert not module.losses


def test_damage_in_what_is_not_asked_for_is_no_error(path: Path, streams: Streams) -> None:
    flip_byte(path, "optimizer_states[0].state[3].exp_avg_sq")
    fit(path, MemoryEfficientRestore(), Edits(forget))
    assert streams.begun


def test_memory_that_is_not_there_is_asked_for_again(
    tmp_path: Path, streams: Streams, monkeypatch: pytest.MonkeyPatch
) -> None:
    allocate = PlannedState.allocate

    def refuse(state: PlannedState) -> Any:
        if threading.current_thread().name == "memload-states":
            raise torch.OutOfMemoryError("no memory")
        return allocate(state)

    monkeypatch.setattr(PlannedState, "allocate", refuse)
    same_resume(Case(lambda: TinyModule(adamw)), tmp_path)
    assert (streams.given, streams.left) == (0, NUM_STATES)


def test_states_that_leave_little_memory_wait(
    tmp_path: Path, streams: Streams, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_memload.restore.free_memory.free_device_bytes", lambda device: 1010)
    session = RestoreSession.__new__(RestoreSession)
    cpu = torch.device("cpu")
    assert session.has_room({cpu: 900})
    assert not session.has_room({cpu: 1000})
    monkeypatch.undo()
    streams = Streams(monkeypatch)
    monkeypatch.setattr(RestoreSession, "has_room", lambda self, needed: False)
    same_resume(Case(lambda: TinyModule(adamw)), tmp_path)
    assert not streams.begun


class Gated:
    """Keeps a stream from its first read until it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        stream_beside = RestoreSession.stream_beside

        def gated(session: RestoreSession, *args: Any) -> Any:
            assert self.open.wait(30)
            return stream_beside(session, *args)

        monkeypatch.setattr(RestoreSession, "stream_beside", gated)


class Failing(TinyModule):
    """Fails when the optimizers are made, while the states are on their way."""

    def __init__(self, gate: Gated) -> None:
        super().__init__(adamw)
        self.gate = [gate]

    def configure_optimizers(self) -> Any:
        self.gate[0].open.set()
        raise ZeroDivisionError


def test_an_error_meanwhile_leaves_nothing(path: Path, streams: Streams, monkeypatch: pytest.MonkeyPatch) -> None:
    module = Failing(Gated(monkeypatch))
    trainer = make_trainer(path.parent, [MemoryEfficientRestore()], max_epochs=1)
    with pytest.raises(ZeroDivisionError) as caught:
        trainer.fit(module, ckpt_path=path, **TRUSTED)
    traceback.clear_frames(caught.value.__traceback__)
    del caught
    assert len(streams.begun) == 1
    streams.begun.clear()
    assert_clean(trainer, module)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("memload-states")]
    gc.collect()
    assert not held(path)


def test_a_stream_that_is_closed_reads_no_further(
    path: Path, streams: Streams, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gated(monkeypatch)
    stops: list[bool] = []
    join = SideStream.join

    def open_then_join(side: SideStream) -> None:
        gate.open.set()
        join(side)
        stops.append(side.is_complete)

    monkeypatch.setattr(SideStream, "join", open_then_join)
    monkeypatch.setattr(StateStream, "take", lambda stream, wanted, filled: None)
    fit(path, MemoryEfficientRestore())
    assert stops == [False]


class Forking(TinyModule):
    """Forks while the states are on their way."""

    def __init__(self, gate: Gated) -> None:
        super().__init__(adamw)
        self.gate = [gate]
        self.status = -1

    def configure_optimizers(self) -> Any:
        threading.Timer(0.0, self.gate[0].open.set).start()
        child = os.fork()
        if child == 0:
            try:
                os._exit(len(SideStream._running))
            finally:
                os._exit(99)
        self.status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return super().configure_optimizers()


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork.*:DeprecationWarning")
def test_a_fork_waits_for_the_stream(path: Path, streams: Streams, monkeypatch: pytest.MonkeyPatch) -> None:
    module = Forking(Gated(monkeypatch))
    fit(path, MemoryEfficientRestore(), module=module)
    assert module.status == 0
    assert streams.given == NUM_STATES


@pytest.mark.parametrize("restore", [["weights"], ["weights", "loops", "callbacks"]])
def test_states_that_are_not_restored_have_no_stream(restore: Any, path: Path, streams: Streams) -> None:
    fit(path, MemoryEfficientRestore(restore=restore))
    assert not streams.begun


def test_an_evaluation_has_no_stream(path: Path, streams: Streams) -> None:
    module = TinyModule(adamw)
    trainer = make_trainer(path.parent, [MemoryEfficientRestore()])
    trainer.predict(module, module.train_dataloader(), ckpt_path=path, **TRUSTED)
    assert not streams.begun


def test_odd_layouts_are_left_to_the_ordinary_way(path: Path) -> None:
    class Odd(TinyModule):
        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["optimizer_states"] = {"neither": ["a", "list"]}

    trainer = make_trainer(path.parent, [MemoryEfficientRestore()], max_epochs=1)
    with pytest.raises((TypeError, KeyError, AttributeError, ValueError)):
        trainer.fit(Odd(adamw), ckpt_path=path, **TRUSTED)
