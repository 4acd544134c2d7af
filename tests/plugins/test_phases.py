"""The phases of a restore: who moves it on, and what is released when a phase fails."""

from __future__ import annotations

import copy
import gc
import shutil
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.lightning.pytorch.plugins.io import TorchCheckpointIO

import tests.lightning as L
from lightning_memload import (
    ChecksumError,
    IncompatibleWeightsError,
    IncompleteCheckpointError,
    MemoryEfficientRestore,
    StreamingCheckpointIO,
    WeightsSource,
)
from lightning_memload.distributed import Companions
from lightning_memload.errors import CheckpointFormatError
from lightning_memload.plugins.opening import Opening
from lightning_memload.plugins.phases import Done, Failed, Loaded, Measured, Optimizers, Phase, Waiting, Weights
from lightning_memload.plugins.request import RestoreOptions
from lightning_memload.plugins.run import RestoreRun
from lightning_memload.restore import RestoreSession
from lightning_memload.transfer import LazyRing, start_ring
from tests.plugins.harness import TRUSTED, Case, TinyModule, adamw, make_trainer, write_checkpoint
from tests.plugins.restored import assert_clean, flip_byte, held

OPTIONS = RestoreOptions("copy", 1 << 20, 1, verify=True, check_fit=True, progress_bar=False)


class Store:
    """A key-value store of one process."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}

    def add(self, key: str, value: int) -> int:
        self.values[key] = self.values.get(key, 0) + value
        return int(self.values[key])

    def set(self, key: str, value: str) -> None:
        self.values[key] = value

    def get(self, key: str) -> bytes:
        return str(self.values[key]).encode()

    def check(self, keys: list[str]) -> bool:
        return all(key in self.values for key in keys)


@dataclass
class Scene:
    """A Trainer that fits a module, and one restore whose phases a test moves on as Lightning does."""

    path: Path
    options: RestoreOptions = OPTIONS
    streams: bool = True
    resumes: bool = True
    io: StreamingCheckpointIO = field(default_factory=StreamingCheckpointIO)
    store: Store = field(default_factory=Store)

    def __post_init__(self) -> None:
        self.module = TinyModule(adamw)
        self.trainer = make_trainer(self.path.parent)
        self.trainer.state.fn = "fit"
        self.trainer.strategy.connect(self.module)
        self.trainer.strategy.optimizers = [adamw(self.module.parameters())]
        if self.resumes:
            self.trainer._checkpoint_connector._ckpt_path = str(self.path)
        self.run = RestoreRun(self.options, self.trainer, self.module, "fit", streams=self.streams)
        self.run._companions = Companions(self.store, 0, 1, agrees=False)
        self.run.meet_companions()
        self.forget = [self.io.observe(self.run), self.io.allow(self.run.allowance)]

    def load(self) -> dict[str, Any]:
        loaded = self.io.load_checkpoint(self.path, weights_only=False)
        self.trainer._checkpoint_connector._loaded_checkpoint = loaded
        return loaded

    def load_model(self, checkpoint: dict[str, Any]) -> None:
        self.run.load_model(self.trainer.strategy.load_model_state_dict, checkpoint, strict=True)
        self.run.end_weights()

    def load_optimizers(self, checkpoint: dict[str, Any]) -> None:
        self.run.begin_optimizers(self.trainer.optimizers)
        self.trainer.strategy.load_optimizer_state_dict(checkpoint)

    def restore(self) -> None:
        checkpoint = self.load()
        self.load_model(checkpoint)
        self.load_optimizers(checkpoint)

    @property
    def phase(self) -> type[Phase]:
        return type(self.run.phase)

    def has_left(self) -> bool:
        return any("/left/" in key for key in self.store.values)

    def assert_released(self) -> None:
        """Nothing of the restore is left, but for tensors that the caller holds."""
        for forget in self.forget:
            forget()
        assert gc.isenabled()
        assert self.has_left()
        assert self.trainer._checkpoint_connector._loaded_checkpoint == {}
        assert_clean(self.trainer, self.module)
        assert not self.run._request.meter.total.is_running
        assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("memload-")]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(Case(lambda: TinyModule(adamw)), tmp_path_factory.mktemp("saved"))


@pytest.fixture
def path(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(saved, tmp_path))


@pytest.fixture
def rings(monkeypatch: pytest.MonkeyPatch) -> list[LazyRing]:
    """Rings that are not closed. Each ring is made at once, though the CPU may need none."""
    made: list[LazyRing] = []
    close = LazyRing.close

    def start(*args: Any, **kwargs: Any) -> LazyRing:
        ring = start_ring(*args, **kwargs)
        ring.get()
        made.append(ring)
        return ring

    def closed(self: LazyRing) -> None:
        close(self)
        if self in made:
            made.remove(self)

    monkeypatch.setattr("lightning_memload.plugins.opening.start_ring", start)
    monkeypatch.setattr(LazyRing, "close", closed)
    return made


@pytest.fixture(autouse=True)
def collector() -> Iterator[None]:
    """A test that fails leaves the collector on for the next one."""
    yield
    gc.enable()


# Transitions ----------------------------------------------------------------------------------------------------------


def test_a_resume_goes_through_all_phases(path: Path, rings: list[LazyRing]) -> None:
    saved = torch.load(path, weights_only=False)
    scene = Scene(path)
    assert scene.phase is Waiting
    assert scene.run.path is None
    assert scene.run.on_load_start(str(path)) == str(path)
    assert (scene.phase, scene.run.path) == (Opening, str(path))
    assert not gc.isenabled()
    checkpoint, mapped = scene.io._load(path, None, False, erases=False)
    assert scene.run.on_load_end(str(path), checkpoint, mapped)
    assert scene.phase is Weights
    scene.load_model(checkpoint)
    assert scene.phase is Weights  # Validation ends here.
    assert not any(part._load_state_dict_pre_hooks for part in scene.module.modules())
    scene.load_optimizers(checkpoint)
    assert scene.phase is Optimizers
    assert rings
    done = scene.run.finish()
    assert done is scene.run.phase
    assert isinstance(done, Done)
    assert [phase.name for phase in done.report.phases] == ["open", "weights", "optimizers"]
    assert done.report.bytes_copied_ordinarily == 0
    assert done.exposed_files is None
    assert rings == []
    for name, value in scene.module.state_dict().items():
        assert torch.equal(value, saved["state_dict"][name])
    scene.trainer._checkpoint_connector._loaded_checkpoint = {}
    scene.assert_released()
    assert held(path) == []


def test_an_evaluation_ends_after_the_weights(path: Path) -> None:
    scene = Scene(path)
    scene.load_model(scene.load())
    done = scene.run.finish()
    assert done is not None
    assert [phase.name for phase in done.report.phases] == ["open", "weights"]
    scene.assert_released()


def test_weights_from_enters_the_same_opening(path: Path) -> None:
    scene = Scene(path, resumes=False)
    scene.run.load_weights(WeightsSource(path, weights_only=False))
    assert (scene.phase, scene.run.path) == (Loaded, str(path))
    scene.run.begin_optimizers(scene.trainer.optimizers)
    assert scene.phase is Loaded
    done = scene.run.finish()
    assert done is not None
    assert [phase.name for phase in done.report.phases] == ["open", "weights"]
    scene.assert_released()


@pytest.mark.parametrize("resumes", [False, True])
def test_another_io_is_only_measured(resumes: bool, path: Path) -> None:
    scene = Scene(path, streams=False, resumes=resumes)
    assert scene.phase is Measured
    scene.run.begin_optimizers(scene.trainer.optimizers)
    assert scene.phase is Measured
    done = scene.run.finish()
    assert scene.phase is (Done if resumes else Failed)
    if resumes:
        assert done is not None
        assert (done.report.path, done.report.mode, done.report.phases) == (str(path), "default", ())
    scene.assert_released()


def test_without_a_checkpoint_nothing_ends(path: Path) -> None:
    scene = Scene(path, resumes=False)
    assert scene.run.finish() is None
    assert scene.phase is Failed
    scene.assert_released()


def test_another_checkpoint_is_not_restored(path: Path) -> None:
    other = path.with_name("other.ckpt")
    other.write_bytes(path.read_bytes())
    scene = Scene(path)
    scene.io.load_checkpoint(other, weights_only=False)
    assert scene.phase is Waiting
    scene.load()
    scene.io.load_checkpoint(path, weights_only=False)  # A second load of the same file is not the restore either.
    assert scene.phase is Weights
    scene.run.abort()


def test_a_file_that_cannot_be_opened_and_is_loaded_in_another_way(path: Path) -> None:
    scene = Scene(path)
    scene.run.on_load_start(str(path))
    scene.run.begin_optimizers(scene.trainer.optimizers)
    assert scene.phase is Opening
    done = scene.run.finish()
    assert done is not None
    assert (done.report.path, done.report.mode) == (str(path), "default")
    scene.assert_released()


# Failures -------------------------------------------------------------------------------------------------------------


def _fails(*_: Any, **__: Any) -> Any:
    raise OSError("as asked")


def fail_to_choose(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    scene.run._request = _with_options(scene, replaces_damaged=True)
    monkeypatch.setattr("lightning_memload.plugins.run.choose_intact", _fails)
    scene.load()


def _with_options(scene: Scene, **changes: Any) -> Any:
    return replace(scene.run._request, options=replace(OPTIONS, **changes))


def fail_to_open(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    data = scene.path.read_bytes()
    scene.path.write_bytes(data[: len(data) // 2])
    scene.load()


def fail_to_reduce(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = torch.load(scene.path, weights_only=False)
    del saved["optimizer_states"]
    torch.save(saved, scene.path)
    scene.load()


def fail_to_choose_the_mode(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_memload.plugins.opening.choose_mode", _fails)
    scene.load()


def fail_to_install(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_memload.plugins.opening.WeightsRestore", _fails)
    scene.load()


def fail_to_fit(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = scene.load()
    checkpoint["state_dict"]["unknown"] = torch.ones(1)
    scene.load_model(checkpoint)


def fail_to_read_weights(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    flip_byte(scene.path, "state_dict.second.weight")
    scene.load_model(scene.load())


def fail_to_read_states(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    flip_byte(scene.path, "optimizer_states[0].state[3].exp_avg_sq")
    scene.restore()


def fail_to_hook_optimizers(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_memload.plugins.phases.OptimizerRestore", _fails)
    scene.restore()


def fail_to_release(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    scene.restore()
    scene.trainer._checkpoint_connector._loaded_checkpoint = {}
    monkeypatch.setattr("lightning_memload.checkpoint.MappedCheckpoint.detach", _fails)
    scene.run.finish()


def fail_to_load_weights_from(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    flip_byte(scene.path, "state_dict.second.weight")
    scene.run.load_weights(WeightsSource(scene.path, weights_only=False))


def fail_to_open_weights_from(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    scene.run.load_weights(WeightsSource(scene.path, weights_only=False, include="no such key"))


@pytest.mark.parametrize(
    ("fail", "kind", "phase", "is_known"),
    [
        (fail_to_choose, OSError, Waiting, False),
        (fail_to_open, CheckpointFormatError, Opening, True),
        (fail_to_reduce, IncompleteCheckpointError, Opening, True),
        (fail_to_choose_the_mode, OSError, Opening, True),
        (fail_to_install, OSError, Opening, True),
        (fail_to_fit, IncompatibleWeightsError, Weights, True),
        (fail_to_read_weights, ChecksumError, Weights, True),
        (fail_to_hook_optimizers, OSError, Weights, True),
        (fail_to_read_states, ChecksumError, Optimizers, True),
        (fail_to_release, OSError, Failed, False),
        (fail_to_open_weights_from, CheckpointFormatError, Opening, True),
        (fail_to_load_weights_from, ChecksumError, Opening, True),
    ],
)
def test_a_failure_releases_everything(
    fail: Callable[[Scene, pytest.MonkeyPatch], None],
    kind: type[Exception],
    phase: type[Phase],
    is_known: bool,
    path: Path,
    rings: list[LazyRing],
) -> None:
    scene = Scene(path)
    with pytest.MonkeyPatch.context() as patch:
        with pytest.raises(kind) as caught:
            fail(scene, patch)
        assert scene.phase is phase
        # The error of a damaged file names an intact one only if the run knows which file it is.
        assert (scene.run.path is not None) == is_known
    scene.run.abort()
    assert scene.phase is Failed
    assert rings == []
    scene.assert_released()
    traceback.clear_frames(caught.tb)
    del caught
    gc.collect()
    assert held(path) == []
    scene.run.abort()
    assert scene.phase is Failed


@pytest.mark.parametrize("ending", ["finish", "abort"])
@pytest.mark.parametrize("num_phases", [1, 2])
def test_a_tensor_of_the_checkpoint_outlives_the_restore(ending: str, num_phases: int, path: Path) -> None:
    expected = torch.load(path, weights_only=False)["state_dict"]["second.weight"]
    scene = Scene(path)
    checkpoint = scene.load()
    kept = checkpoint["state_dict"]["second.weight"]
    scene.load_model(checkpoint)
    if num_phases == 2:
        scene.load_optimizers(checkpoint)
    del checkpoint
    scene.trainer._checkpoint_connector._loaded_checkpoint = {}
    getattr(scene.run, ending)()
    gc.collect()
    # After a failure the tensor stays in the file: to copy it could need memory that has just run out.
    assert bool(held(path)) == (ending == "abort")
    assert torch.equal(kept, expected)
    del kept
    gc.collect()
    assert held(path) == []


@pytest.mark.parametrize("phase", [Opening, Weights, Optimizers])
def test_an_interrupted_release_is_made_again(phase: type[Phase], path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(path)
    if phase is Opening:
        scene.run.on_load_start(str(path))
    else:
        checkpoint = scene.load()
        scene.load_model(checkpoint)
        if phase is Optimizers:
            scene.load_optimizers(checkpoint)
        del checkpoint
    assert scene.phase is phase
    close, calls = RestoreSession.close, []

    def interrupted(self: RestoreSession, **kwargs: Any) -> int:
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return close(self, **kwargs)

    monkeypatch.setattr(RestoreSession, "close", interrupted)
    if phase is Opening:
        scene.run.abort()
    else:
        with pytest.raises(KeyboardInterrupt):
            scene.run.finish()
        assert len(calls) > 1
    scene.assert_released()
    gc.collect()
    assert held(path) == []


def test_the_collector_stays_off_if_the_user_has_turned_it_off(path: Path) -> None:
    gc.disable()
    try:
        scene = Scene(path)
        scene.restore()
        scene.run.finish()
        assert not gc.isenabled()
    finally:
        gc.enable()


# weights_from ---------------------------------------------------------------------------------------------------------


def test_weights_from_beside_another_io(path: Path) -> None:
    """It is measured until the weights are loaded, as beside the CheckpointIO of this package."""
    saved = torch.load(path, weights_only=False)["state_dict"]
    module = TinyModule(adamw)
    seen: dict[str, torch.Tensor] = {}

    class Look(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            seen.update({name: value.clone() for name, value in pl_module.state_dict().items()})

    restore = MemoryEfficientRestore(weights_from=WeightsSource(path, weights_only=False))
    trainer = make_trainer(path.parent, [restore, Look()], plugins=[TorchCheckpointIO()], max_epochs=1)
    with pytest.warns(UserWarning, match="which loads checkpoints itself"):
        trainer.fit(module)
    assert seen.keys() == saved.keys()
    assert all(torch.equal(value, saved[name]) for name, value in seen.items())
    assert restore.report is not None
    assert [phase.name for phase in restore.report.phases] == ["open", "weights"]


def test_a_copy_of_the_callback_in_the_middle_of_a_restore(path: Path) -> None:
    copies: list[MemoryEfficientRestore] = []
    restore = MemoryEfficientRestore()

    class Copy(L.Callback):
        def on_load_checkpoint(self, *_: Any) -> None:
            copies.append(copy.deepcopy(restore))

    trainer = make_trainer(path.parent, [restore, Copy()], max_epochs=1)
    trainer.fit(TinyModule(adamw), ckpt_path=path, **TRUSTED)
    (copied,) = copies
    assert copied.report is None
    again = TinyModule(adamw)
    make_trainer(path.parent, [copied], max_epochs=1).fit(again, ckpt_path=path, **TRUSTED)
    assert copied.report is not None
    assert restore.report is not None
    assert copied.report.path == restore.report.path
