"""``overlap=True``: training begins before the optimizer states have arrived, and goes on bit for bit as with stock."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import threading
import traceback
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

import tests.lightning as L
from lightning_memload import (
    CheckpointReadError,
    ChecksumError,
    MemloadError,
    MemoryEfficientRestore,
    open_checkpoint,
)
from lightning_memload.restore import Overlap, RestoreSession
from lightning_memload.restore.overlap import _is_torchs_own
from lightning_memload.restore.placement import PlannedState
from tests.plugins.harness import (
    TRUSTED,
    Case,
    ManualModule,
    Recorded,
    TinyModule,
    adamw,
    assert_same,
    make_trainer,
    write_checkpoint,
)
from tests.plugins.restored import assert_clean, flip_byte, held
from tests.plugins.two_ranks import ranks
from tests.plugins.workers import HeldByWorker, Looks

DAMAGED = "optimizer_states[0].state[3].exp_avg_sq"


class Gate:
    """Keeps states from arriving until other code waits for them, and tells when it did.

    Attributes:
        num_losses: The number of batches of the module, at each wait that was needed.
        deferred: The optimizers whose states may arrive late.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.module: Recorded | None = None
        self.num_losses: list[int] = []
        self.deferred: list[Any] = []
        self._open = threading.Event()
        stream_beside, wait, defer = RestoreSession.stream_beside, Overlap.wait, Overlap.defer

        def gated(session: RestoreSession, *args: Any) -> Any:
            assert self._open.wait(30)
            return stream_beside(session, *args)

        def noted(overlap: Overlap) -> None:
            if overlap.is_needed and not overlap.has_failed:
                assert self.module is not None
                self.num_losses.append(len(self.module.losses))
            self._open.set()
            wait(overlap)

        def counted(overlap: Overlap, optimizer: Any, *args: Any) -> None:
            self.deferred.append(optimizer)
            defer(overlap, optimizer, *args)

        monkeypatch.setattr(RestoreSession, "stream_beside", gated)
        monkeypatch.setattr(Overlap, "wait", noted)
        monkeypatch.setattr(Overlap, "defer", counted)

    def open(self) -> None:
        """Lets the states arrive."""
        self._open.set()


@pytest.fixture(params=["late", "early"])
def gate(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Gate:
    """States whose stream begins when the optimizers load them, or right behind the weights."""
    if request.param == "early":
        monkeypatch.setattr("lightning_memload.restore.state_stream._WORTH_BYTES", 1)
        monkeypatch.setattr("lightning_memload.restore.state_stream._WORTH_BYTES_EACH", 0)
    return Gate(monkeypatch)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_checkpoint(Case(lambda: TinyModule(adamw)), tmp_path)


class Ends(L.Callback):
    """Takes down what training made of everything."""

    def __init__(self) -> None:
        self.ended: dict[str, Any] = {}

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.ended = {
            "weights": {name: p.detach().clone() for name, p in pl_module.named_parameters()},
            "optimizers": [copy.deepcopy(optimizer.state_dict()) for optimizer in trainer.optimizers],
            "schedulers": [copy.deepcopy(config.scheduler.state_dict()) for config in trainer.lr_scheduler_configs],
            "steps": trainer.global_step,
        }


def resume(
    path: Path, module: Recorded, restore: MemoryEfficientRestore | None, *callbacks: L.Callback, **kwargs: Any
) -> dict[str, Any]:
    """Resumes in the middle of an epoch, and trains to the end of the next one."""
    ends = Ends()
    ours = [restore] if restore is not None else []
    trainer = make_trainer(path.parent, [*ours, *callbacks, ends], **{"max_epochs": 2, **kwargs})
    torch.manual_seed(30)
    trainer.fit(module, ckpt_path=path, **TRUSTED)
    return {"losses": module.losses, **ends.ended}


def same(
    path: Path,
    make: Callable[[], Recorded],
    gate: Gate,
    make_callbacks: Callable[[], list[L.Callback]] = list,
    **kwargs: Any,
) -> MemoryEfficientRestore:
    """Asserts that a resume with overlap is bit for bit the stock one; returns the callback."""
    expected = resume(path, make(), None, *make_callbacks(), **kwargs)
    module = gate.module = make()
    restore = MemoryEfficientRestore(overlap=True)
    actual = resume(path, module, restore, *make_callbacks(), **kwargs)
    assert len(module.losses) > 8
    assert_same(expected, actual, "resume")
    assert not held(path)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("memload-states")]
    return restore


class Manual(ManualModule):
    """Manual optimization: two optimizers, of which the second one steps in every second batch only."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        optimizers: Any = self.optimizers()
        self.manual_backward(loss)
        for number, optimizer in enumerate(optimizers):
            if batch_idx % 2 == 1 or number == 0:
                optimizer.step()
                optimizer.zero_grad()


def scheduled(parameters: Any) -> Any:
    optimizer = torch.optim.Adam(parameters, lr=0.01, amsgrad=True)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=100)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def searching(parameters: Any) -> Any:
    return torch.optim.LBFGS(parameters, lr=0.1, max_iter=3)


CASES: dict[str, tuple[Callable[[], Recorded], dict[str, Any], int]] = {
    # The closure has run when a step looks at its states: that many losses are there.
    "adamw": (lambda: TinyModule(adamw), {}, 1),
    "accumulating": (lambda: TinyModule(adamw), {"accumulate_grad_batches": 8, "max_epochs": 3}, 4),
    "clipping": (lambda: TinyModule(adamw), {"gradient_clip_val": 0.1}, 1),
    "scheduler": (lambda: TinyModule(scheduled), {}, 1),
    "mixed": (lambda: TinyModule(adamw), {"precision": "bf16-mixed"}, 1),
    "double": (lambda: TinyModule(adamw), {"precision": "64-true"}, 1),
    "manual": (Manual, {}, 1),
    "lbfgs": (lambda: TinyModule(searching), {}, 0),
}


@pytest.mark.parametrize("name", CASES)
def test_training_is_that_of_stock(name: str, gate: Gate, tmp_path: Path) -> None:
    make, kwargs, num_losses = CASES[name]
    path = write_checkpoint(Case(make, trainer=kwargs, save_after=12 if name == "accumulating" else 5), tmp_path)
    restore = same(path, make, gate, **kwargs)
    assert gate.deferred
    assert gate.num_losses[0] == num_losses
    report = restore.report
    assert report is not None
    assert [phase.name for phase in report.phases] == ["open", "weights", "optimizers", "overlap"]
    assert report.waited_seconds is not None
    assert report.global_step == torch.load(path, weights_only=False)["global_step"]
    assert "training waited" in report.table()
    assert report.scalars()["memload/waited_seconds"] == report.waited_seconds
    assert report.total.bytes_read >= sum(phase.bytes_read for phase in report.phases[:3])
    assert report.phases[3].bytes_read > 0
    assert report.bytes_kept == report.bytes_copied_ordinarily == 0


class Early(L.Callback):
    """Looks at the states before the first step, in a way of its own."""

    def __init__(self, look: Callable[[L.Trainer], Any], moment: str) -> None:
        self.seen: Any = None
        self._look = look
        setattr(self, moment, self._see)

    def _see(self, trainer: L.Trainer, *args: Any) -> None:
        if self.seen is None:
            self.seen = copy.deepcopy(self._look(trainer))


def _first(trainer: L.Trainer) -> Any:
    optimizer = trainer.optimizers[0]
    return optimizer.state[optimizer.param_groups[0]["params"][0]]["exp_avg"]


LOOKS: dict[str, Callable[[L.Trainer], Any]] = {
    "item": _first,
    "get": lambda trainer: trainer.optimizers[0].state.get(trainer.optimizers[0].param_groups[0]["params"][1]),
    "values": lambda trainer: list(trainer.optimizers[0].state.values()),
    "iteration": lambda trainer: [trainer.optimizers[0].state[key] for key in trainer.optimizers[0].state],
    "dict": lambda trainer: list(dict(trainer.optimizers[0].state).values()),
    "unpacking": lambda trainer: [*{0: 1, **{id(k): v for k, v in trainer.optimizers[0].state.items()}}.values()][1:],
    "state_dict": lambda trainer: trainer.optimizers[0].state_dict(),
    "copy": lambda trainer: copy.deepcopy(trainer.optimizers[0]).state_dict(),
    "pickle": lambda trainer: pickle.loads(pickle.dumps(trainer.optimizers[0])).state_dict(),
    "length": lambda trainer: (len(trainer.optimizers[0].state), _first(trainer)),
    "strategy": lambda trainer: trainer.strategy.optimizer_state(trainer.optimizers[0]),
}


@pytest.mark.parametrize("moment", ["on_train_start", "on_train_batch_start"])
@pytest.mark.parametrize("look", LOOKS)
def test_whoever_looks_earlier_sees_the_values(look: str, moment: str, gate: Gate, path: Path) -> None:
    seen = []

    def callbacks() -> list[L.Callback]:
        seen.append(Early(LOOKS[look], moment))
        return [seen[-1]]

    same(path, lambda: TinyModule(adamw), gate, callbacks)
    assert_same(seen[0].seen, seen[1].seen, look)
    assert gate.num_losses[0] == 0


class Saves(L.Callback):
    """Saves before the first step."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if not self.path.exists():
            trainer.save_checkpoint(self.path)


def test_a_save_before_the_first_step_is_that_of_stock(gate: Gate, path: Path, tmp_path: Path) -> None:
    paths = iter([tmp_path / "stock-saved.ckpt", tmp_path / "our-saved.ckpt"])
    same(path, lambda: TinyModule(adamw), gate, lambda: [Saves(next(paths))])
    stock, ours = (torch.load(tmp_path / f"{name}-saved.ckpt", weights_only=False) for name in ("stock", "our"))
    assert_same(stock["optimizer_states"], ours["optimizer_states"], "saved")
    assert_same(dict(stock["state_dict"]), dict(ours["state_dict"]), "saved")


class Validated(TinyModule):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("v", self.loss(*batch))

    def val_dataloader(self) -> Any:
        return self.train_dataloader()


def test_a_validation_before_the_first_step_waits(gate: Gate, tmp_path: Path) -> None:
    kwargs: dict[str, Any] = {"accumulate_grad_batches": 8, "val_check_interval": 1, "max_epochs": 3}
    path = write_checkpoint(Case(lambda: Validated(adamw), trainer=kwargs, save_after=12), tmp_path)
    same(path, lambda: Validated(adamw), gate, **kwargs)
    assert gate.num_losses[0] == 1


class Holds(L.Callback):
    """Keeps a tensor of the loaded checkpoint, and changes it before the first step: stock's optimizer has the same."""

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self.held = checkpoint["optimizer_states"][0]["state"][0]["exp_avg"]

    def on_train_batch_start(self, *_: Any) -> None:
        self.held.mul_(2)


def test_a_state_that_other_code_holds_is_shared_with_it(gate: Gate, path: Path) -> None:
    same(path, lambda: TinyModule(adamw), gate, lambda: [Holds()])
    assert gate.num_losses[0] == 1


class Truncates(L.Callback):
    """Cuts the file when training begins."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = open_checkpoint(path)[DAMAGED].storage.offset + 4

    def on_train_batch_start(self, *_: Any) -> None:
        os.truncate(self.path, self.size)


@pytest.mark.parametrize("kind", [ChecksumError, CheckpointReadError])
def test_an_error_ends_the_run_before_the_step(kind: type[MemloadError], gate: Gate, path: Path) -> None:
    saved = torch.load(path, weights_only=False)["state_dict"]
    callbacks: list[L.Callback] = [MemoryEfficientRestore(overlap=True)]
    if kind is ChecksumError:
        flip_byte(path, DAMAGED)
    else:
        callbacks.append(Truncates(path))
    module = gate.module = TinyModule(adamw)
    trainer = make_trainer(path.parent, callbacks, max_epochs=2)
    with pytest.raises(kind, match=r"exp_avg_sq") as caught:
        trainer.fit(module, ckpt_path=path, **TRUSTED)
    assert str(caught.value.key).replace("[3]", ".3") == DAMAGED.replace("[3]", ".3")
    assert len(module.losses) == 1
    assert_same(dict(saved), {name: value.detach() for name, value in module.state_dict().items()}, "weights")
    assert_clean(trainer, module)
    # What the optimizer has is not what the file had, so it is of no use to any code.
    (optimizer,) = gate.deferred
    for use in (optimizer.state_dict, optimizer.step, lambda: optimizer.state[module.first.weight]):
        with pytest.raises(kind):
            use()
    traceback.clear_frames(caught.value.__traceback__)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("memload-states")]


class Fails(TinyModule):
    """Fails in its first batch."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        raise ZeroDivisionError


def test_after_another_error_the_states_are_right(gate: Gate, path: Path) -> None:
    module = gate.module = Fails(adamw)
    trainer = make_trainer(path.parent, [MemoryEfficientRestore(overlap=True)], max_epochs=2)
    with pytest.raises(ZeroDivisionError) as caught:
        trainer.fit(module, ckpt_path=path, **TRUSTED)
    traceback.clear_frames(caught.value.__traceback__)
    del caught
    assert_clean(trainer, module)
    saved = torch.load(path, weights_only=False)["optimizer_states"][0]["state"]
    assert_same(saved, trainer.optimizers[0].state_dict()["state"], "states")
    assert type(trainer.optimizers[0].state) is defaultdict
    gate.deferred.clear()
    gc.collect()
    assert not held(path)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("memload-states")]


def test_an_error_of_the_thread_alone_is_made_good(gate: Gate, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> Any:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(RestoreSession, "stream_beside", fail)
    same(path, lambda: TinyModule(adamw), gate)
    assert gate.deferred


@pytest.mark.filterwarnings("ignore")
def test_workers_hold_nothing_of_the_checkpoint(tmp_path: Path, gate: Gate) -> None:
    path = write_checkpoint(Case(lambda: TinyModule(adamw)), tmp_path)

    class Both(Looks):
        def configure_optimizers(self) -> Any:
            return adamw(self.parameters())

    module = gate.module = Both()
    trainer = make_trainer(tmp_path, [MemoryEfficientRestore(overlap=True)], max_epochs=3)
    data = DataLoader(HeldByWorker(path), batch_size=2, num_workers=1, multiprocessing_context="fork")
    trainer.fit(module, data, ckpt_path=path, **TRUSTED)
    assert gate.deferred
    assert module.held
    assert not any(module.held)


class Own(torch.optim.AdamW):
    """Looks at its states when it loads them."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        for values in self.state.values():
            values["sum"] = values["exp_avg"].sum()


def with_hook(parameters: Any) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(parameters, lr=0.01)

    def double(optimizer: torch.optim.Optimizer) -> None:
        for values in optimizer.state.values():
            values["exp_avg"].mul_(2)

    optimizer.register_load_state_dict_post_hook(double)
    return optimizer


@pytest.mark.parametrize(
    "name", [name for name in sorted(vars(torch.optim)) if name[0].isupper() and name != "Optimizer"]
)
def test_each_optimizer_of_torch_may_overlap(name: str) -> None:
    """Adafactor names another module than the others as its own."""
    assert _is_torchs_own(getattr(torch.optim, name)([torch.nn.Parameter(torch.ones(2, 2))], lr=0.1))


@pytest.mark.parametrize("make", [lambda p: Own(p, lr=0.01), with_hook], ids=["own-class", "own-hook"])
def test_what_reads_states_while_it_loads_does_not_overlap(
    make: Callable[[Any], Any], gate: Gate, tmp_path: Path
) -> None:
    path = write_checkpoint(Case(lambda: TinyModule(make)), tmp_path)
    gate.open()
    restore = same(path, lambda: TinyModule(make), gate)
    assert not gate.deferred
    assert restore.report is not None
    assert restore.report.waited_seconds is None


def test_without_a_step_the_run_ends_as_usual(gate: Gate, path: Path) -> None:
    gate.module = TinyModule(adamw)
    restore = MemoryEfficientRestore(overlap=True)
    trainer = make_trainer(path.parent, [restore], max_steps=5)
    trainer.fit(gate.module, ckpt_path=path, **TRUSTED)
    assert not gate.module.losses
    assert restore.report is not None
    assert not held(path)
    saved = torch.load(path, weights_only=False)["optimizer_states"][0]["state"]
    assert_same(saved, trainer.optimizers[0].state_dict()["state"], "states")


def test_memory_is_allocated_once(gate: Gate, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    allocated: list[PlannedState] = []
    allocate = PlannedState.allocate

    def counted(state: PlannedState) -> Any:
        allocated.append(state)
        return allocate(state)

    monkeypatch.setattr(PlannedState, "allocate", counted)
    same(path, lambda: TinyModule(adamw), gate, precision="64-true")
    assert len({state.name for state in allocated}) == len(allocated)


def test_fork_in_a_hook(gate: Gate, path: Path) -> None:
    class Forks(L.Callback):
        status = -1

        def on_train_batch_start(self, *_: Any) -> None:
            if self.status == -1:
                child = os.fork()
                if child == 0:
                    try:
                        os._exit(len(held(path)))
                    finally:
                        os._exit(99)
                self.status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    forks: list[Forks] = []

    def callbacks() -> list[L.Callback]:
        forks.append(Forks())
        return [forks[-1]]

    same(path, lambda: TinyModule(adamw), gate, callbacks)
    assert [fork.status for fork in forks] == [0, 0]
    assert gate.num_losses[0] == 0


@pytest.mark.long
def test_two_ranks_train_as_stock(path: Path, tmp_path: Path) -> None:
    results = []
    for name, options in {"stock": {"ours": False}, "ours": {"ours": True, "overlap": True}}.items():
        folder = tmp_path / name
        results.append(ranks(path, folder, "ddp", **options))
    for stock, ours in zip(*results, strict=True):
        assert ours["losses"] == stock["losses"]
        assert ours["weights"] == stock["weights"]
        assert not ours["held"]
        assert ours["report"]["waited_seconds"] is not None
        assert ours["report"]["maxima_ranks"] == [0, 1]
