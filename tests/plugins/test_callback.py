"""The callback around a restore: entry points, loggers, modes and warnings, and no effect without a checkpoint."""

from __future__ import annotations

import copy
import csv
import hashlib
import logging
import pickle
import re
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
from tests.lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch.utils.data import DataLoader, TensorDataset

import tests.lightning as L
from lightning_memload import (
    ChecksumError,
    InsufficientMemoryError,
    MemoryEfficientRestore,
    StreamingCheckpointIO,
    meta_init,
    open_checkpoint,
)
from lightning_memload.plugins import seams
from tests.fresh_process import run_fresh
from tests.plugins.harness import FEATURES, TRUSTED, Case, TinyModule, adamw, make_trainer, resume, write_checkpoint
from tests.plugins.restored import assert_clean, flip_byte


class Evaluated(TinyModule):
    """Can be validated, tested and asked for predictions."""

    def __init__(self) -> None:
        super().__init__(adamw)
        self.outputs: list[torch.Tensor] = []

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.outputs.append(self(batch[0]).clone())
        self.log("loss", self.loss(*batch))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def predict_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.outputs.append(self(batch[0]).clone())
        return self.outputs[-1]


# What lies between tensors this small is read along. torch 2.6 puts optimizer states between the weights.
SLACK_BYTES = 2048


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_checkpoint(Case(Evaluated), tmp_path)


def loader() -> DataLoader[Any]:
    inputs = torch.randn(8, FEATURES, generator=torch.Generator().manual_seed(3))
    return DataLoader(TensorDataset(inputs, inputs), batch_size=4)


def evaluate(stage: str, path: Path | str | None, folder: Path, *callbacks: L.Callback, **kwargs: Any) -> Evaluated:
    torch.manual_seed(20)
    module = Evaluated()
    trainer = make_trainer(folder, callbacks, **kwargs)
    getattr(trainer, stage)(module, loader(), ckpt_path=path, **TRUSTED)
    return module


def bytes_of(path: Path, part: str) -> int:
    return sum(tensor.storage.nbytes for tensor in open_checkpoint(path) if tensor.path[0] == part)


# Nothing where nothing is due ---------------------------------------------------------------------------------------


def test_does_nothing_without_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StreamingCheckpointIO, "load_checkpoint", lambda *_, **__: pytest.fail("read something"))
    restore = MemoryEfficientRestore()
    logger = CSVLogger(tmp_path)
    module = Evaluated()
    trainer = make_trainer(tmp_path, [restore], logger=logger, max_epochs=1, log_every_n_steps=1)
    with caplog.at_level(logging.INFO):
        trainer.fit(module)
        trainer.validate(module, loader())
        trainer.test(module, loader())
        trainer.predict(module, loader())
    assert restore.report is None
    assert "Restored" not in caplog.text
    assert not [name for row in rows_of(logger) for name in row if name.startswith("memload")]
    assert_clean(trainer, module)


def test_leaves_nothing_after_fit(tmp_path: Path, path: Path) -> None:
    restore = MemoryEfficientRestore()
    module = Evaluated()
    trainer = make_trainer(tmp_path, [restore], max_epochs=1)
    trainer.fit(module, ckpt_path=path, **TRUSTED)
    assert restore.report is not None
    assert_clean(trainer, module)


# Entry points -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["copy", "assign"])
@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_evaluates_as_stock(stage: str, mode: Any, tmp_path: Path, path: Path) -> None:
    stock = evaluate(stage, path, tmp_path)
    restore = MemoryEfficientRestore(mode=mode)
    ours = evaluate(stage, path, tmp_path, restore)
    assert len(stock.outputs) == 2
    for expected, actual in zip(stock.outputs, ours.outputs, strict=True):
        assert torch.equal(expected, actual)
    report = restore.report
    assert report is not None
    assert (report.stage, report.mode, report.path) == (stage, mode, str(path))
    assert [phase.name for phase in report.phases] == ["open", "weights"]
    # No optimizer bytes; the few between two records are read on the way.
    weights = bytes_of(path, "state_dict")
    if mode == "copy":
        assert weights <= report.bytes_verified <= report.total.bytes_read < weights + SLACK_BYTES
        assert report.bytes_assigned == 0
    else:
        # What is assigned is read to compare its checksums.
        assert report.bytes_verified == weights <= report.total.bytes_read < weights + SLACK_BYTES
        assert report.bytes_assigned >= weights
    assert report.global_step == 5


def test_assigned_bytes_are_counted_once(tmp_path: Path, path: Path) -> None:
    restore = MemoryEfficientRestore(mode="assign")
    evaluate("validate", path, tmp_path, restore)
    assert restore.report is not None
    assert restore.report.bytes_assigned == bytes_of(path, "state_dict")


def test_fit_reads_each_byte_once(tmp_path: Path, path: Path) -> None:
    restore = MemoryEfficientRestore()
    resume(Case(Evaluated), path, tmp_path, restore)
    report = restore.report
    assert report is not None
    assert [phase.name for phase in report.phases] == ["open", "weights", "optimizers"]
    read = {phase.name: phase.bytes_read for phase in report.phases}
    weights, optimizers = bytes_of(path, "state_dict"), bytes_of(path, "optimizer_states")
    assert read["open"] == 0
    assert weights <= read["weights"] < weights + SLACK_BYTES
    assert optimizers <= read["optimizers"] < optimizers + SLACK_BYTES
    assert report.total.bytes_read == sum(read.values())
    assert weights + optimizers <= report.bytes_verified <= report.total.bytes_read
    assert report.bytes_copied_ordinarily == 0
    assert (report.global_step, report.stage, report.device) == (5, "fit", "cpu")


@pytest.mark.parametrize("ckpt_path", ["best", "last", "file"])
def test_fit_then_evaluate_in_one_trainer(ckpt_path: str, tmp_path: Path) -> None:
    restore = MemoryEfficientRestore()
    saving = ModelCheckpoint(tmp_path / "saved", save_last=True, monitor="loss")
    module = Evaluated()
    trainer = make_trainer(tmp_path, [restore, saving], enable_checkpointing=True, max_epochs=2)
    trainer.fit(module, val_dataloaders=loader())
    assert restore.report is None
    expected = saving.best_model_path if ckpt_path != "last" else saving.last_model_path
    trained = {name: value.clone() for name, value in module.state_dict().items()}
    for stage in ("validate", "test", "predict"):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.fill_(9)
        chosen = saving.best_model_path if ckpt_path == "file" else ckpt_path
        getattr(trainer, stage)(module, loader(), ckpt_path=chosen, **TRUSTED)
        report = restore.report
        assert report is not None
        assert (report.stage, report.path) == (stage, expected)
        on_disk = torch.load(expected, weights_only=False)["state_dict"]
        for name, value in module.state_dict().items():
            assert torch.equal(value, on_disk[name])
        assert trained.keys() == on_disk.keys()
    assert_clean(trainer, module)


def test_resumes_hpc_checkpoint(tmp_path: Path, path: Path) -> None:
    hpc = tmp_path / "hpc_ckpt_3.ckpt"
    path.rename(hpc)
    restore = MemoryEfficientRestore()
    trainer = make_trainer(tmp_path, [restore], max_epochs=1)
    trainer.fit(Evaluated(), ckpt_path="hpc", **TRUSTED)
    assert restore.report is not None
    assert restore.report.path == str(hpc)


def test_fits_twice_in_one_process(tmp_path: Path, path: Path) -> None:
    restore = MemoryEfficientRestore()
    reports = []
    trainer = make_trainer(tmp_path, [restore], max_epochs=1)
    for _ in range(2):
        module = Evaluated()
        trainer.fit(module, ckpt_path=path, **TRUSTED)
        reports.append(restore.report)
        assert_clean(trainer, module)
    another = make_trainer(tmp_path, [restore], max_epochs=1)
    another.fit(Evaluated(), ckpt_path=path, **TRUSTED)
    reports.append(restore.report)
    assert len({id(report) for report in reports}) == 3
    assert len({report.total.bytes_read for report in reports if report is not None}) == 1


def test_report_of_an_earlier_restore_stays_when_nothing_is_restored(tmp_path: Path, path: Path) -> None:
    restore = MemoryEfficientRestore()
    trainer = make_trainer(tmp_path, [restore], max_epochs=1)
    module = Evaluated()
    trainer.validate(module, loader(), ckpt_path=path, **TRUSTED)
    report = restore.report
    trainer.validate(module, loader())
    assert restore.report is report


def test_restores_after_training_has_ended(tmp_path: Path) -> None:
    """A checkpoint of the last epoch leaves nothing to train: no start hook runs, but everything is restored."""
    saving = ModelCheckpoint(tmp_path / "saved")
    make_trainer(tmp_path, [saving], enable_checkpointing=True, max_epochs=1).fit(Evaluated())
    restore = MemoryEfficientRestore()
    module = Evaluated()
    trainer = make_trainer(tmp_path, [restore], max_epochs=1)
    trainer.fit(module, ckpt_path=saving.best_model_path, **TRUSTED)
    assert restore.report is not None
    assert restore.report.global_step == 8
    assert_clean(trainer, module)


def test_second_checkpoint_in_a_hook(tmp_path: Path, path: Path) -> None:
    """A user's ``on_load_checkpoint`` may load another file through the same IO."""

    class Teacher(Evaluated):
        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            other = self.trainer.strategy.load_checkpoint(self.other, **TRUSTED)
            checkpoint["state_dict"]["first.bias"] = other["state_dict"]["first.bias"] + 1

        other = path

    case = Case(Teacher)
    second = tmp_path / "second.ckpt"
    second.write_bytes(path.read_bytes())
    Teacher.other = second
    stock, _ = resume(case, path, tmp_path, None)
    restore = MemoryEfficientRestore()
    ours, _ = resume(case, path, tmp_path, restore)
    assert [loss.item() for loss in ours.losses] == [loss.item() for loss in stock.losses]
    assert restore.report is not None
    assert [phase.name for phase in restore.report.phases] == ["open", "weights", "optimizers"]
    assert restore.report.path == str(path)


# Loggers and output -------------------------------------------------------------------------------------------------


def rows_of(logger: CSVLogger) -> list[dict[str, str]]:
    file = Path(logger.log_dir) / "metrics.csv"
    with file.open() as lines:
        return [{k: v for k, v in row.items() if v} for row in csv.DictReader(lines)]


@pytest.mark.parametrize(("log", "detail"), [(True, "summary"), ("all", "all")])
def test_logs_to_every_logger_at_the_restored_step(tmp_path: Path, path: Path, log: Any, detail: Any) -> None:
    from tensorboard.backend.event_processing import event_accumulator  # type: ignore[import-untyped]

    loggers = [CSVLogger(tmp_path / "csv"), TensorBoardLogger(tmp_path / "tb"), CSVLogger(tmp_path / "other")]
    restore = MemoryEfficientRestore(log=log)
    trainer = make_trainer(tmp_path, [restore, L.Callback()], logger=loggers, max_epochs=2, log_every_n_steps=1)
    trainer.fit(Evaluated(), ckpt_path=path, **TRUSTED)
    assert restore.report is not None
    expected = restore.report.scalars(detail)
    for logger in (loggers[0], loggers[2]):
        assert isinstance(logger, CSVLogger)
        (row,) = [row for row in rows_of(logger) if "memload/seconds" in row]
        assert row["step"] == "4"  # Lightning counts batches that have ended: the fifth had not when it was saved
        logged = {name: float(value) for name, value in row.items() if name.startswith("memload/")}
        assert logged == pytest.approx(expected)
    events = event_accumulator.EventAccumulator(str(loggers[1].log_dir)).Reload()
    tags = {tag for tag in events.Tags()["scalars"] if tag.startswith("memload/")}
    assert tags == expected.keys()
    for tag in tags:
        (event,) = events.Scalars(tag)
        assert event.step == 4
        assert event.value == pytest.approx(expected[tag])


def test_evaluation_logs_at_the_step_of_the_checkpoint(tmp_path: Path, path: Path) -> None:
    logger = CSVLogger(tmp_path)
    evaluate("validate", path, tmp_path, MemoryEfficientRestore(), logger=logger)
    (row,) = [row for row in rows_of(logger) if "memload/seconds" in row]
    assert row["step"] == "5"


def test_prints_one_table(tmp_path: Path, path: Path, caplog: pytest.LogCaptureFixture) -> None:
    restore = MemoryEfficientRestore()
    with caplog.at_level(logging.INFO):
        resume(Case(Evaluated), path, tmp_path, restore)
    assert restore.report is not None
    (message,) = [record.getMessage() for record in caplog.records if "Restored " + str(path) in record.getMessage()]
    assert message == f"Restored {path} for fit\n{restore.report.table()}"


def test_log_false_is_silent_but_reports(tmp_path: Path, path: Path, caplog: pytest.LogCaptureFixture) -> None:
    restore = MemoryEfficientRestore(log=False)
    logger = CSVLogger(tmp_path)
    with caplog.at_level(logging.INFO):
        evaluate("validate", path, tmp_path, restore, logger=logger)
    assert restore.report is not None
    assert "host anonymous" not in caplog.text
    assert not [name for row in rows_of(logger) for name in row if name.startswith("memload")]


def _slow_bar(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Makes every restore long enough for a bar; returns the bars."""
    from lightning_memload.plugins import progress

    bars: list[Any] = []
    real = progress.tqdm

    def tqdm(**kwargs: Any) -> Any:
        bars.append(real(**{**kwargs, "delay": 0, "mininterval": 0}))
        return bars[-1]

    monkeypatch.setattr(progress, "tqdm", tqdm)
    return bars


def test_bar_of_a_slow_restore(
    tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bars = _slow_bar(monkeypatch)
    evaluate("validate", path, tmp_path, MemoryEfficientRestore(mode="copy"), enable_progress_bar=True)
    (bar,) = bars
    assert bar.n == bar.total == bytes_of(path, "state_dict") / 2**30
    printed = capsys.readouterr().err
    assert bar.disable or ("Restoring checkpoint" in printed and " GiB [" in printed)


def test_no_bar_for_a_quick_restore(tmp_path: Path, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate("validate", path, tmp_path, MemoryEfficientRestore(mode="copy"), enable_progress_bar=True)
    assert "Restoring checkpoint" not in capsys.readouterr().err


@pytest.mark.parametrize("way", ["trainer", "argument", "disabled"])
def test_no_bar_where_the_trainer_shows_none(
    way: str, tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bars = _slow_bar(monkeypatch)
    callbacks: list[L.Callback] = [MemoryEfficientRestore(mode="copy", progress_bar=way != "argument")]
    if way == "disabled":
        callbacks.append(TQDMProgressBar(refresh_rate=0))
    evaluate("validate", path, tmp_path, *callbacks, enable_progress_bar=way != "trainer")
    assert not bars


# Modes and options --------------------------------------------------------------------------------------------------


def test_auto_assigns_for_evaluation_and_copies_for_training(tmp_path: Path, path: Path) -> None:
    restore = MemoryEfficientRestore()
    with meta_init():
        module = Evaluated()
    make_trainer(tmp_path, [restore]).validate(module, loader(), ckpt_path=path, **TRUSTED)
    assert restore.report is not None
    assert restore.report.mode == "assign"
    assert "only reads" in restore.report.mode_reason
    # What else refers to a parameter's memory has to see the values.
    evaluate("validate", path, tmp_path, restore)
    assert restore.report.mode == "copy"
    assert "have memory" in restore.report.mode_reason
    resume(Case(Evaluated), path, tmp_path, restore)
    assert restore.report.mode == "copy"
    assert "writes" in restore.report.mode_reason


def test_assigned_parameters_are_pages_of_the_file(tmp_path: Path, path: Path) -> None:
    module = evaluate("validate", path, tmp_path, MemoryEfficientRestore(mode="assign"))
    ranges = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(str(path)):
            start, end = line.split()[0].split("-")
            ranges.append((int(start, 16), int(end, 16)))
    assert ranges
    for parameter in module.parameters():
        assert any(start <= parameter.data_ptr() < end for start, end in ranges)


def test_assign_never_writes_to_the_file(tmp_path: Path, path: Path) -> None:
    before = hashlib.sha256(path.read_bytes()).hexdigest()
    module, _ = resume(Case(Evaluated), path, tmp_path, MemoryEfficientRestore(mode="assign"))
    on_disk = torch.load(path, weights_only=False)["state_dict"]
    assert any(not torch.equal(value, on_disk[name]) for name, value in module.state_dict().items())
    assert hashlib.sha256(path.read_bytes()).hexdigest() == before


@pytest.mark.parametrize("name", ["state_dict.second.weight", "optimizer_states[0].state[3].exp_avg_sq"])
def test_verify_finds_a_flipped_byte(name: str, tmp_path: Path, path: Path) -> None:
    names = {tensor.name for tensor in open_checkpoint(path)}
    assert name in names, names
    flip_byte(path, name)
    module = Evaluated()
    trainer = make_trainer(tmp_path, [MemoryEfficientRestore()])
    with pytest.raises(ChecksumError, match=re.escape(name)) as caught:
        trainer.fit(module, ckpt_path=path, **TRUSTED)
    assert caught.value.path == str(path)
    assert not module.losses
    assert_clean(trainer, module)


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_evaluation_of_a_damaged_file_ends_before_it_begins(stage: str, tmp_path: Path, path: Path) -> None:
    flip_byte(path, "state_dict.second.weight")
    with meta_init():
        module = Evaluated()
    trainer = make_trainer(tmp_path, [MemoryEfficientRestore()])
    with pytest.raises(ChecksumError, match=re.escape("state_dict.second.weight")):
        getattr(trainer, stage)(module, loader(), ckpt_path=path, **TRUSTED)
    assert not module.outputs
    assert all(parameter.is_meta for parameter in module.parameters())
    assert_clean(trainer, module)


def test_verify_false_reads_no_page_of_what_is_assigned(tmp_path: Path, path: Path) -> None:
    flip_byte(path, "state_dict.second.weight")
    restore = MemoryEfficientRestore(mode="assign", verify=False)
    evaluate("validate", path, tmp_path, restore)
    assert restore.report is not None
    assert restore.report.mode == "assign"
    assert restore.report.total.bytes_read == restore.report.bytes_verified == 0


def test_verify_false_does_not_look(tmp_path: Path, path: Path) -> None:
    flip_byte(path, "state_dict.second.weight")
    restore = MemoryEfficientRestore(verify=False)
    resume(Case(Evaluated), path, tmp_path, restore)
    assert restore.report is not None
    assert restore.report.bytes_verified == 0


def test_refuses_what_cannot_fit(tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_memload.restore.free_memory.free_device_bytes", lambda device: 100)
    module = Evaluated()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    trainer = make_trainer(tmp_path, [MemoryEfficientRestore()])
    with pytest.raises(InsufficientMemoryError, match=r"iB of host memory, but only \d+ bytes are free") as caught:
        trainer.fit(module, ckpt_path=path, **TRUSTED)
    # The weights have their memory already.
    assert caught.value.needed_bytes == bytes_of(path, "optimizer_states")
    assert (caught.value.free_bytes, caught.value.device) == (100, "cpu")
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name])
    assert_clean(trainer, module)


def test_check_fit_false_tries(tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_memload.restore.free_memory.free_device_bytes", lambda device: 100)
    restore = MemoryEfficientRestore(check_fit=False)
    resume(Case(Evaluated), path, tmp_path, restore)
    assert restore.report is not None


def test_warns_where_it_is_tight(tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = bytes_of(path, "optimizer_states")
    monkeypatch.setattr("lightning_memload.restore.free_memory.free_device_bytes", lambda device: int(needed * 1.05))
    with pytest.warns(UserWarning, match="little is left for training"):
        resume(Case(Evaluated), path, tmp_path, MemoryEfficientRestore())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "stream"}, r"mode must be one of 'auto', 'assign', 'copy', got 'stream'\."),
        ({"host_budget_mib": 0}, r"host_budget_mib must be at least 1 \(MiB\), got 0\."),
        ({"num_threads": 0}, r"num_threads must be at least 1, or None to choose, got 0\."),
    ],
)
def test_refuses_arguments_out_of_range(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MemoryEfficientRestore(**arguments)


def test_num_threads_is_passed_on(tmp_path: Path, path: Path) -> None:
    restore = MemoryEfficientRestore(mode="copy", num_threads=1, host_budget_mib=1)
    evaluate("validate", path, tmp_path, restore)
    assert restore.report is not None
    assert restore.report.num_threads == 1
    assert restore.report.staging_bytes <= 2**20


@pytest.mark.parametrize("way", [copy.deepcopy, lambda restore: pickle.loads(pickle.dumps(restore))])
def test_callback_of_a_trainer_can_be_copied(way: Any, tmp_path: Path, path: Path) -> None:
    restore = MemoryEfficientRestore()
    evaluate("validate", path, tmp_path, restore)
    another = way(restore)
    assert another.report == restore.report
    evaluate("validate", path, tmp_path, another)
    assert another.report != restore.report


COPYING = """
import copy
import pathlib
import pickle
import tempfile
import warnings

import tests.lightning as L

from lightning_memload import MemoryEfficientRestore
from tests.plugins.harness import TRUSTED, Case, TinyModule, adamw, make_trainer, write_checkpoint

warnings.simplefilter("ignore")


class Copying(L.Callback):
    def __init__(self):
        self.made = {}

    def setup(self, trainer, pl_module, stage):
        self.made["setup"] = copy.deepcopy(pl_module)
        assert self.made["setup"].to("cpu") is self.made["setup"]

    def on_load_checkpoint(self, trainer, pl_module, checkpoint):
        if ARGS["when"] == "load":
            self.made["load"] = copy.deepcopy(pl_module)

    def on_fit_start(self, trainer, pl_module):
        self.made["fit"] = copy.deepcopy(pl_module)


with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    path = write_checkpoint(Case(lambda: TinyModule(adamw)), folder)
    copying = Copying()
    make_trainer(folder, [MemoryEfficientRestore(), copying], max_epochs=1).fit(TinyModule(adamw), ckpt_path=path)
    for made in copying.made.values():
        assert not {"to", "cpu"} & made.__dict__.keys()
        made.load_state_dict(made.state_dict())
        copy.deepcopy(made)
        pickle.dumps(made)
    RESULT = sorted(copying.made)
"""


@pytest.mark.parametrize(
    "when",
    [
        "fit",
        "load",
    ],
)
@pytest.mark.first("when")
def test_copy_of_the_module_made_while_restoring_is_whole(when: str) -> None:
    """Callbacks like moving averages copy the module: a copy has no hooks of this package."""
    assert "setup" in run_fresh(COPYING, when=when).result


def test_self_loading_strategies_are_measured_and_left_alone(
    tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FSDP and its like need GPUs; a stand-in takes their place here."""
    trainer = make_trainer(tmp_path, [restore := MemoryEfficientRestore()])
    monkeypatch.setattr(seams, "_SELF_LOADING", ("lightning.pytorch.strategies.SingleDeviceStrategy",))
    with pytest.warns(UserWarning, match="SingleDeviceStrategy loads checkpoints itself") as caught:
        trainer.validate(Evaluated(), loader(), ckpt_path=path, **TRUSTED)
    assert len([w for w in caught if "loads checkpoints itself" in str(w.message)]) == 1
    assert restore.report is not None
    assert (restore.report.mode, restore.report.path) == ("default", str(path))
    assert restore.report.total.bytes_read == 0
    assert restore.report.total.seconds > 0


def test_weights_that_a_self_loading_strategy_would_leave_out_are_refused(
    tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(tmp_path, [MemoryEfficientRestore(weights_from=path)], max_steps=1)
    monkeypatch.setattr(seams, "_SELF_LOADING", ("lightning.pytorch.strategies.SingleDeviceStrategy",))
    with (
        pytest.warns(UserWarning, match="loads checkpoints itself"),
        pytest.raises(
            ValueError, match=r"weights_from=\.\.\.\) cannot load into a module that SingleDeviceStrategy shards"
        ),
    ):
        trainer.fit(Evaluated(), **TRUSTED)
    assert trainer.global_step == 0


def test_no_warning_on_the_plain_way(tmp_path: Path, path: Path) -> None:
    started = time.perf_counter()
    restore = MemoryEfficientRestore()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        resume(Case(Evaluated), path, tmp_path, restore)
    ours = [w for w in caught if "lightning_memload" in Path(w.filename).parts or "MemoryEfficientRestore" in str(w)]
    assert not ours
    assert restore.report is not None
    assert 0 < restore.report.total.seconds < time.perf_counter() - started
