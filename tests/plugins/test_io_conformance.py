"""Every way of a Trainer to save or load: once with Lightning's own plugin, once with ours, and the results are equal.

Not the files are compared but what a user sees: what lies in the folder and what is in it, what the module, the
optimizers, loops and callbacks hold afterwards, and the losses, metrics and predictions.
"""

from __future__ import annotations

import contextlib
import os
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from tests.lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from tests.lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from tests.lightning.pytorch.callbacks import Checkpoint, LearningRateFinder, ModelCheckpoint, OnExceptionCheckpoint
from tests.lightning.pytorch.plugins.io import AsyncCheckpointIO
from tests.lightning.pytorch.strategies import SingleDeviceStrategy
from tests.lightning.pytorch.tuner import Tuner
from torch.utils.data import DataLoader, TensorDataset

import tests.lightning as L
from lightning_memload import MemoryEfficientRestore, StreamingCheckpointIO, load_from_checkpoint
from lightning_memload.formats import load_mapped
from lightning_memload.plugins.checkpoint_io import SaveFormat
from tests.plugins.harness import FEATURES, TRUSTED, WRAPS, TinyModule, adamw, assert_same, contents, make_trainer

_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
FORMATS: tuple[Any, ...] = get_args(SaveFormat)


@dataclass(frozen=True)
class Way:
    """A way in which checkpoints are saved and loaded.

    Attributes:
        label: The name in the ids of tests.
        make_io: Makes the plugin. ``None``: the Trainer makes its own.
        make_callback: Makes the callback that installs the plugin. ``None``: no callback.
        is_file: Whether what is saved is a file that ``torch.load`` reads.
        in_background: Whether Lightning itself saves in a thread.
    """

    label: str
    make_io: Callable[[], CheckpointIO] | None = None
    make_callback: Callable[[], MemoryEfficientRestore] | None = None
    is_file: bool = True
    in_background: bool = False


def make_way(format: Any, kind: str) -> Way:
    is_file = format == "torch"
    if kind == "plugin":
        return Way(f"{format}-{kind}", lambda: StreamingCheckpointIO(format=format), None, is_file)
    if kind == "asynchronous":
        return Way(f"{format}-{kind}", lambda: StreamingCheckpointIO(format=format, asynchronous=True), None, is_file)
    if kind == "wrapped":
        return Way(
            f"{format}-{kind}", lambda: AsyncCheckpointIO(StreamingCheckpointIO(format=format)), None, is_file, True
        )
    return Way(
        f"{format}-{kind}", None, lambda: MemoryEfficientRestore(save_format=format, asynchronous_save=True), is_file
    )


STOCK = Way("stock")
KINDS = ["plugin", "asynchronous", *(["wrapped"] if WRAPS else []), "callback"]


class Module(TinyModule):
    """Also validates, tests, has a rate and a batch size to be tuned, and state of its own."""

    def __init__(self, lr: float = 0.01, batch_size: int = 4, dropout: float = 0.1) -> None:
        super().__init__(adamw)
        self.save_hyperparameters("dropout")
        self.lr, self.batch_size = lr, batch_size
        self.drop.p = dropout
        self.num_saved = self.num_loaded = 0

    def note(self, name: str, value: torch.Tensor) -> None:
        if not self.trainer.barebones:
            self.log(name, value)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.note("loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.note("val_loss", self.loss(*batch))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.note("test_loss", self.loss(*batch))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

    def train_dataloader(self) -> Any:
        dataset = super().train_dataloader().dataset
        return DataLoader(dataset, batch_size=self.batch_size)

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.num_saved += 1
        checkpoint["own"] = {"table": torch.arange(3), "number": self.num_saved}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.num_loaded += 1
        assert checkpoint["own"]["table"].tolist() == [0, 1, 2]


class Counting(L.LightningDataModule):
    """With a state."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def train_dataloader(self) -> Any:
        self.count += 1
        return Module().train_dataloader()

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "tensor": torch.tensor([self.count])}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.count = state_dict["count"] + int(state_dict["tensor"])


class Positioned(DataLoader[Any]):
    """A loader that knows where it is."""

    position = 0

    def __iter__(self) -> Any:
        start = self.position
        for number, batch in enumerate(super().__iter__()):
            if number >= start:
                self.position = number + 1
                yield batch
        self.position = 0

    def state_dict(self) -> dict[str, Any]:
        return {"position": torch.tensor(self.position)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.position = int(state_dict["position"])


class Interrupt(Exception):
    """Ends a run."""


class After(L.Callback):
    """Does something after a batch."""

    def __init__(self, num_batches: int, action: Callable[[L.Trainer], object]) -> None:
        self.num_batches = num_batches
        self.action = action

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.num_batches -= 1
        if self.num_batches == 0:
            self.action(trainer)


def interrupt(trainer: L.Trainer) -> None:
    raise Interrupt


class Session:
    """The actions of a user in one folder, with one way to save."""

    def __init__(self, way: Way, folder: Path) -> None:
        self.way = way
        self.folder = folder

    def trainer(self, *callbacks: L.Callback, **options: Any) -> L.Trainer:
        ours = [self.way.make_callback()] if self.way.make_callback is not None else []
        plugins = [self.way.make_io()] if self.way.make_io is not None else []
        options = {"max_epochs": 1, "plugins": plugins, "limit_train_batches": 4, **options}
        options.setdefault("enable_checkpointing", any(isinstance(item, Checkpoint) for item in callbacks))
        return make_trainer(self.folder, [*ours, *callbacks], limit_val_batches=2, limit_test_batches=2, **options)

    def module(self) -> Module:
        torch.manual_seed(1)
        return Module()

    def settle(self, trainer: L.Trainer) -> None:
        """Waits for the save in progress."""
        trainer.strategy.checkpoint_io.teardown()

    def checkpoint(self) -> Path:
        """The checkpoint of a run that was ended within an epoch."""
        path = self.folder / "checkpoint.ckpt"
        trainer = self.trainer(After(3, lambda trainer: trainer.save_checkpoint(path)), After(3, interrupt))
        with contextlib.suppress(Interrupt):
            trainer.fit(self.module())
        self.settle(trainer)
        assert path.is_file() is self.way.is_file
        return path

    def saved(self) -> dict[str, Any]:
        """Everything in the folder that is a checkpoint, and its contents; links, and where they lead."""
        found: dict[str, Any] = {}
        for folder, directories, files in os.walk(self.folder):
            checkpoints = [name for name in (*directories, *files) if name.endswith(".ckpt")]
            directories[:] = [name for name in directories if name not in checkpoints]
            for name in checkpoints:
                path = Path(folder, name)
                content: Any = os.readlink(path) if path.is_symlink() else read(path)
                found[str(path.relative_to(self.folder))] = content
            left = {name for name in files if name.startswith(".memload")}
            assert not left
        return dict(sorted(found.items()))

    def seen(self, trainer: L.Trainer, module: Module) -> dict[str, Any]:
        """The files and values that a user can see after a run."""
        return {
            "saved": self.saved(),
            "held": contents(trainer, module),
            "losses": module.losses,
            "hooks": (module.num_saved, module.num_loaded),
            "metrics": dict(trainer.callback_metrics),
            "ckpt_path": str(trainer.ckpt_path),
        }


def read(path: Path) -> Any:
    if path.is_file():
        return torch.load(path, weights_only=False)
    return load_mapped(path, weights_only=False)[0]


def comparable(value: Any, folder: Path) -> Any:
    """The same without what differs between two folders, and without tensors that lie in a file."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {comparable(key, folder): comparable(item, folder) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(comparable(item, folder) for item in value)
    if isinstance(value, Path):
        value = str(value)
    return _UUID.sub("UUID", value.replace(str(folder), "FOLDER")) if isinstance(value, str) else value


# The entry points: each does something with a session and returns what came of it -------------------------------------


def keeps_the_best(session: Session) -> Any:
    saver = ModelCheckpoint(
        session.folder / "run", monitor="loss", save_top_k=2, save_last=True, every_n_train_steps=1, filename="{step}"
    )
    trainer, module = session.trainer(saver), session.module()
    trainer.fit(module)
    assert len(os.listdir(session.folder / "run")) == 3  # others were removed
    return session.seen(trainer, module), saver.best_k_models, saver.best_model_path, saver.last_model_path


def keeps_a_link(session: Session) -> Any:
    for _ in range(2):
        saver = ModelCheckpoint(session.folder / "run", save_last="link", save_top_k=1, monitor="loss")
        trainer, module = session.trainer(saver), session.module()
        trainer.fit(module)
    assert (session.folder / "run" / "last.ckpt").is_symlink()
    return session.seen(trainer, module)


def keeps_weights_only(session: Session) -> Any:
    saver = ModelCheckpoint(session.folder, save_weights_only=True, save_last=True, every_n_epochs=1, save_top_k=-1)
    trainer, module = session.trainer(saver, max_epochs=2), session.module()
    trainer.fit(module)
    return session.seen(trainer, module)


def saves_by_default(session: Session) -> Any:
    trainer, module = session.trainer(enable_checkpointing=True), session.module()
    trainer.fit(module)
    return session.seen(trainer, module)


def saves_by_hand(session: Session) -> Any:
    trainer, module, data = session.trainer(), session.module(), Counting()
    trainer.fit(module, datamodule=data)
    for name, weights_only in (("all", False), ("weights", True), ("default", None)):
        trainer.save_checkpoint(session.folder / "new" / f"{name}.ckpt", weights_only=weights_only)
    trainer.save_checkpoint(str(session.folder / "text.ckpt"))
    session.settle(trainer)
    return session.seen(trainer, module)


def replaces_and_removes(session: Session) -> Any:
    trainer, module = session.trainer(), session.module()
    trainer.fit(module)
    for name in ("a", "b"):
        for _ in range(2):
            trainer.save_checkpoint(session.folder / f"{name}.ckpt")
    session.settle(trainer)
    trainer.strategy.remove_checkpoint(session.folder / "b.ckpt")
    trainer.strategy.remove_checkpoint(session.folder / "missing.ckpt")
    session.settle(trainer)
    assert [name for name in os.listdir(session.folder) if name.endswith(".ckpt")] == ["a.ckpt"]
    return session.seen(trainer, module)


def resumes_a_path(session: Session) -> Any:
    path = session.checkpoint()
    trainer, module = session.trainer(max_epochs=2), session.module()
    trainer.fit(module, ckpt_path=path, **TRUSTED)
    assert module.num_loaded == 1
    return session.seen(trainer, module)


def resumes_a_url(session: Session) -> Any:
    path = session.checkpoint()
    trainer, module = session.trainer(max_epochs=2), session.module()
    trainer.fit(module, ckpt_path=f"file://{path}", **TRUSTED)
    return session.seen(trainer, module)


def resumes_data(session: Session) -> Any:
    path = session.folder / "checkpoint.ckpt"
    trainer = session.trainer(After(3, lambda trainer: trainer.save_checkpoint(path)), After(3, interrupt))
    with contextlib.suppress(Interrupt):
        trainer.fit(session.module(), datamodule=Counting())
    session.settle(trainer)
    trainer, module, data = session.trainer(max_epochs=2), session.module(), Counting()
    trainer.fit(module, datamodule=data, ckpt_path=path, **TRUSTED)
    assert data.count > 2
    return session.seen(trainer, module), data.count


def resumes_several_loaders(session: Session) -> Any:
    class Several(Module):
        def train_dataloader(self) -> Any:
            dataset = TensorDataset(torch.arange(64.0).view(-1, 1))
            return {"one": Positioned(dataset, batch_size=4), "other": [Positioned(dataset, batch_size=8)]}

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            seen.append((batch["one"][0].tolist(), batch["other"][0][0].tolist()))
            return super().training_step((torch.ones(4, FEATURES), torch.zeros(4, FEATURES)), batch_idx)

    seen: list[Any] = []
    path = session.folder / "checkpoint.ckpt"
    torch.manual_seed(1)
    trainer = session.trainer(After(2, lambda trainer: trainer.save_checkpoint(path)), After(2, interrupt))
    with contextlib.suppress(Interrupt):
        trainer.fit(Several())
    session.settle(trainer)
    torch.manual_seed(1)
    trainer, module = session.trainer(), Several()
    trainer.fit(module, ckpt_path=path, **TRUSTED)
    return session.seen(trainer, module), seen


def resumes_last(session: Session) -> Any:
    for epochs in (1, 2):
        saver = ModelCheckpoint(session.folder, save_last=True)
        trainer, module = session.trainer(saver, max_epochs=epochs), session.module()
        with pytest.warns(UserWarning, match="no last checkpoint") if epochs == 1 else contextlib.nullcontext():
            trainer.fit(module, ckpt_path="last", **TRUSTED)
    assert len(module.losses) == 4
    return session.seen(trainer, module)


def resumes_best(session: Session) -> Any:
    saver = ModelCheckpoint(session.folder, monitor="loss", every_n_train_steps=1, filename="{step}", save_top_k=-1)
    trainer, module = session.trainer(saver), session.module()
    trainer.fit(module)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, ckpt_path="best", **TRUSTED)
    return session.seen(trainer, module)


def resumes_for_a_queue(session: Session) -> Any:
    """As a job that SLURM takes from its machine, twice."""
    for epochs in (1, 2):
        trainer, module = session.trainer(max_epochs=epochs), session.module()
        trainer.fit(module, **({"ckpt_path": "hpc", **TRUSTED} if epochs == 2 else {}))
        trainer.save_checkpoint(trainer._checkpoint_connector.hpc_save_path(session.folder))
        session.settle(trainer)
    assert sorted(name for name in os.listdir(session.folder) if "hpc" in name) == [
        "hpc_ckpt_1.ckpt",
        "hpc_ckpt_2.ckpt",
    ]
    return session.seen(trainer, module)


def evaluates(session: Session) -> Any:
    saver = ModelCheckpoint(
        session.folder, monitor="loss", every_n_train_steps=1, save_last=True, filename="{step}", save_top_k=-1
    )
    trainer, module = session.trainer(saver), session.module()
    trainer.fit(module)
    results: list[Any] = []
    for path in (session.folder / "last.ckpt", "best", "last"):
        for stage in (trainer.validate, trainer.test, trainer.predict):
            with torch.no_grad():
                module.first.weight.fill_(3.0)
            results.append(stage(module, ckpt_path=path, **TRUSTED))
            results.append(module.first.weight.clone())
    assert len({str(result) for result in results[1::6]}) == 2  # the best is not the last
    return session.seen(trainer, module), results


def survives_an_exception(session: Session) -> Any:
    def callback() -> Any:
        return OnExceptionCheckpoint(session.folder)

    warnings.simplefilter("ignore")  # that there is no last checkpoint, and that it is taken
    trainer, module = session.trainer(callback(), After(3, interrupt)), session.module()
    with pytest.raises(Interrupt):
        trainer.fit(module)
    first = session.seen(trainer, module)
    assert list(first["saved"]) == ["on_exception.ckpt"]
    # The next run finds it by itself, and removes it when it ends well.
    trainer, module = session.trainer(callback(), max_epochs=2), session.module()
    trainer.fit(module, **TRUSTED)
    assert len(module.losses) == 5
    session.settle(trainer)
    second = session.seen(trainer, module)
    assert not second["saved"]
    return first, second


def finds_a_rate(session: Session) -> Any:
    trainer, module = session.trainer(), session.module()
    found = Tuner(trainer).lr_find(module, num_training=12, early_stop_threshold=None)
    assert found is not None
    trainer.fit(module)
    return session.seen(trainer, module), found.results, module.lr


def finds_a_rate_first(session: Session) -> Any:
    finder = LearningRateFinder(num_training_steps=12, early_stop_threshold=None)
    trainer, module = session.trainer(finder), session.module()
    trainer.fit(module)
    return session.seen(trainer, module), module.lr


def finds_a_batch_size(session: Session) -> Any:
    trainer, module = session.trainer(), session.module()
    Tuner(trainer).scale_batch_size(module, mode="power", steps_per_trial=1, max_trials=2, init_val=2)
    trainer.fit(module)
    return session.seen(trainer, module), module.batch_size


def tries_two_batches(session: Session) -> Any:
    path = session.checkpoint()
    trainer, module = session.trainer(fast_dev_run=2), session.module()
    trainer.fit(module, ckpt_path=path, **TRUSTED)
    results = trainer.validate(module, ckpt_path=path, **TRUSTED)
    return session.seen(trainer, module), results


def runs_bare(session: Session) -> Any:
    path = session.checkpoint()
    bare: dict[str, Any] = {"barebones": True, "logger": None, "enable_checkpointing": None}
    bare |= {"enable_progress_bar": None, "enable_model_summary": None, "num_sanity_val_steps": None}
    trainer, module = session.trainer(max_epochs=2, **bare), session.module()
    trainer.fit(module, ckpt_path=path, **TRUSTED)
    trainer.save_checkpoint(session.folder / "bare.ckpt")
    session.settle(trainer)
    return session.seen(trainer, module)


def loads_the_class(session: Session) -> Any:
    path = session.checkpoint()
    if not session.way.is_file:
        # Lightning's own loads files only.
        with pytest.raises(IsADirectoryError):
            Module.load_from_checkpoint(path)
        return dict(load_from_checkpoint(Module, path, device="cpu", dropout=0.5).state_dict())
    module = Module.load_from_checkpoint(path, dropout=0.5, **TRUSTED)
    assert module.drop.p == 0.5
    return dict(module.state_dict())


def is_given_to_the_strategy(session: Session) -> Any:
    io = session.way.make_io() if session.way.make_io is not None else None
    strategy = SingleDeviceStrategy(device="cpu", checkpoint_io=io)
    trainer, module = session.trainer(strategy=strategy, plugins=None), session.module()
    trainer.fit(module)
    assert io is None or trainer.strategy.checkpoint_io is io
    trainer.save_checkpoint(session.folder / "last.ckpt")
    session.settle(trainer)
    module = session.module()
    results = trainer.validate(module, ckpt_path=session.folder / "last.ckpt", **TRUSTED)
    return session.seen(trainer, module), results


def is_given_late(session: Session) -> Any:
    trainer, module = session.trainer(plugins=None), session.module()
    if session.way.make_io is not None:
        trainer.strategy.checkpoint_io = session.way.make_io()
    trainer.fit(module)
    trainer.save_checkpoint(session.folder / "last.ckpt")
    session.settle(trainer)
    return session.seen(trainer, module)


# Lightning's AsyncCheckpointIO removes, links and loads at once, although what was saved before may still wait for its
# thread: a matter of luck, with its own plugin inside as with ours.
MATTERS_OF_LUCK = {keeps_the_best, keeps_a_link, finds_a_rate, finds_a_rate_first, finds_a_batch_size}

ENTRY_POINTS: list[Callable[[Session], Any]] = [
    keeps_the_best,
    keeps_a_link,
    keeps_weights_only,
    saves_by_default,
    saves_by_hand,
    replaces_and_removes,
    resumes_a_path,
    resumes_a_url,
    resumes_data,
    resumes_several_loaders,
    resumes_last,
    resumes_best,
    resumes_for_a_queue,
    evaluates,
    survives_an_exception,
    finds_a_rate,
    finds_a_rate_first,
    finds_a_batch_size,
    tries_two_batches,
    runs_bare,
    loads_the_class,
    is_given_to_the_strategy,
    is_given_late,
]


def run(entry_point: Callable[[Session], Any], way: Way, folder: Path) -> Any:
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    return comparable(entry_point(Session(way, folder)), folder)


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Callable[[Session], Any]], Any]:
    """The result of an entry point with stock Lightning."""
    known: dict[Any, Any] = {}

    def result(entry_point: Callable[[Session], Any]) -> Any:
        if entry_point not in known:
            known[entry_point] = run(entry_point, STOCK, tmp_path_factory.mktemp("stock") / "folder")
        return known[entry_point]

    return result


# The format is chosen where bytes are written and read, the kind where the Trainer calls: neither asks for the other.
@pytest.mark.axes("format", "kind")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("entry_point", ENTRY_POINTS, ids=lambda entry_point: entry_point.__name__)
def test_as_stock(entry_point: Callable[[Session], Any], format: Any, kind: str, stock: Any, tmp_path: Path) -> None:
    way = make_way(format, kind)
    if way.in_background and entry_point in MATTERS_OF_LUCK:
        pytest.skip("Lightning's own plugin removes and links at once what its thread may not have saved yet")
    assert_same(stock(entry_point), run(entry_point, way, tmp_path / "folder"), entry_point.__name__)


class Careless(TorchCheckpointIO):
    """Loses one bit of one weight."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        weights = {name: value.clone() for name, value in checkpoint["state_dict"].items()}
        weights["second.bias"].view(torch.int32)[-1] ^= 1
        super().save_checkpoint({**checkpoint, "state_dict": weights}, path, storage_options)


@pytest.mark.parametrize("entry_point", ENTRY_POINTS, ids=lambda entry_point: entry_point.__name__)
def test_a_bit_that_is_lost_is_noticed(entry_point: Callable[[Session], Any], stock: Any, tmp_path: Path) -> None:
    """Or the tests above would prove nothing."""
    careless = run(entry_point, Way("careless", Careless), tmp_path / "folder")
    with pytest.raises(AssertionError, match=entry_point.__name__):
        assert_same(stock(entry_point), careless, entry_point.__name__)
