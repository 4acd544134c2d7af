"""A damaged ``ckpt_path``: an error that names the newest intact checkpoint beside it, or a resume from that one."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.lightning.pytorch.callbacks import ModelCheckpoint
from tests.lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO

import tests.lightning as L
from lightning_memload import (
    CheckpointFormatError,
    ChecksumError,
    MemoryEfficientRestore,
    StreamingCheckpointIO,
    save_directory,
)
from tests.plugins.harness import TRUSTED, Case, TinyModule, adamw, make_trainer, write_checkpoint
from tests.plugins.restored import assert_clean, flip_byte
from tests.plugins.two_ranks import ranks


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size * 2 // 3)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def zeros(path: Path) -> None:
    """A file after a power failure on some file systems."""
    path.write_bytes(bytes(path.stat().st_size))


def flip_weight(path: Path) -> None:
    flip_byte(path, "state_dict.second.weight")


def flip_state(path: Path) -> None:
    flip_byte(path, "optimizer_states[0].state[3].exp_avg_sq")


DAMAGES = [truncate, empty, zeros, flip_weight, flip_state]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """``last.ckpt``, and two older ones at other steps."""
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for age, (name, steps) in enumerate({"last.ckpt": 6, "step=5.ckpt": 5, "step=3.ckpt": 3}.items()):
        case = Case(lambda: TinyModule(adamw), save_after=steps)
        shutil.move(write_checkpoint(case, tmp_path), folder / name)
        os.utime(folder / name, (1e9 - age, 1e9 - age))
    return folder


def fit(path: Any, *callbacks: L.Callback, **kwargs: Any) -> tuple[TinyModule, L.Trainer]:
    module = TinyModule(adamw)
    trainer = make_trainer(Path(path).parent, callbacks, max_epochs=1, **kwargs)
    torch.manual_seed(3)
    trainer.fit(module, ckpt_path=path, **TRUSTED)
    return module, trainer


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_error_names_the_newest_intact_sibling(damage: Callable[[Path], None], folder: Path) -> None:
    damage(folder / "last.ckpt")
    with pytest.raises((CheckpointFormatError, ChecksumError)) as caught:
        fit(folder / "last.ckpt", MemoryEfficientRestore())
    message = str(caught.value)
    assert message.startswith(str(folder / "last.ckpt"))
    assert f"The newest intact checkpoint in {folder} is {folder / 'step=5.ckpt'}: resume with ckpt_path=" in message
    assert "on_corrupt='previous'" in message
    assert caught.value.intact_sibling == str(folder / "step=5.ckpt")


def test_damaged_siblings_are_passed_over(folder: Path) -> None:
    flip_weight(folder / "last.ckpt")
    flip_state(folder / "step=5.ckpt")
    with pytest.raises(ChecksumError, match=r"newest intact checkpoint in .* is .*step=3\.ckpt"):
        fit(folder / "last.ckpt", MemoryEfficientRestore())
    flip_state(folder / "step=3.ckpt")
    with pytest.raises(ChecksumError, match=r"no intact checkpoint in .* \(.*step=3\.ckpt, .*step=5\.ckpt damaged as"):
        fit(folder / "last.ckpt", MemoryEfficientRestore())


def test_other_errors_are_left_alone(folder: Path) -> None:
    class Mistaken(TinyModule):
        def on_load_checkpoint(self, checkpoint: Any) -> None:
            raise KeyError("a user's mistake")

    trainer = make_trainer(folder, [MemoryEfficientRestore(on_corrupt="previous")], max_epochs=1)
    with pytest.raises(KeyError) as caught:
        trainer.fit(Mistaken(adamw), ckpt_path=folder / "last.ckpt", **TRUSTED)
    assert caught.value.args == ("a user's mistake",)


@pytest.mark.parametrize("damage", DAMAGES)
def test_previous_resumes_from_the_newest_intact_sibling(damage: Callable[[Path], None], folder: Path) -> None:
    expected, _ = fit(folder / "step=5.ckpt", MemoryEfficientRestore())
    damage(folder / "last.ckpt")
    restore = MemoryEfficientRestore(on_corrupt="previous")
    with pytest.warns(UserWarning, match=r"last\.ckpt.* is damaged.*Resuming from .*step=5\.ckpt instead") as caught:
        module, trainer = fit(folder / "last.ckpt", restore)
    assert len([item for item in caught if "Resuming" in str(item.message)]) == 1
    assert [loss.item() for loss in module.losses] == [loss.item() for loss in expected.losses]
    assert len(module.losses) == 8 - 5
    assert restore.report is not None
    assert restore.report.path == trainer.ckpt_path == str(folder / "step=5.ckpt")
    assert_clean(trainer, module)


def test_the_choice_is_for_one_run_only(folder: Path) -> None:
    restore = MemoryEfficientRestore(on_corrupt="previous")
    shutil.copy(folder / "last.ckpt", folder / ".sound")
    flip_weight(folder / "last.ckpt")
    with pytest.warns(UserWarning, match="Resuming from"):
        _, trainer = fit(folder / "last.ckpt", restore)
    shutil.move(folder / ".sound", folder / "last.ckpt")
    module = TinyModule(adamw)
    trainer.predict(module, module.train_dataloader(), ckpt_path=folder / "last.ckpt", **TRUSTED)
    assert restore.report is not None
    assert restore.report.path == str(folder / "last.ckpt")


@pytest.mark.parametrize("change", ["none", "no sibling"])
def test_without_need_or_choice_previous_changes_nothing(change: str, folder: Path) -> None:
    restore = MemoryEfficientRestore(on_corrupt="previous")
    if change == "none":
        fit(folder / "last.ckpt", restore)  # a warning would be an error
        assert restore.report is not None
        assert restore.report.path == str(folder / "last.ckpt")
        return
    flip_weight(folder / "last.ckpt")
    for name in ("step=5.ckpt", "step=3.ckpt"):
        (folder / name).unlink()
    with pytest.raises(ChecksumError, match=r"There is no intact checkpoint in .*checkpoints\.$"):
        fit(folder / "last.ckpt", restore)


def test_previous_within_a_wrapping_io(folder: Path) -> None:
    flip_weight(folder / "last.ckpt")
    restore = MemoryEfficientRestore(on_corrupt="previous")
    with pytest.warns(UserWarning, match="Resuming from"):
        fit(folder / "last.ckpt", restore, plugins=[AsyncCheckpointIO(StreamingCheckpointIO())])
    assert restore.report is not None
    assert restore.report.path == str(folder / "step=5.ckpt")


def test_previous_may_be_of_another_format(folder: Path) -> None:
    save_directory(torch.load(folder / "last.ckpt", weights_only=False), folder / "saved")
    flip_weight(folder / "last.ckpt")
    restore = MemoryEfficientRestore(on_corrupt="previous")
    with pytest.warns(UserWarning, match="Resuming from .*saved instead"):
        fit(folder / "last.ckpt", restore)


def test_ignored_where_another_plugin_loads(folder: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(folder / "last.ckpt", MemoryEfficientRestore(on_corrupt="previous"), plugins=[TorchCheckpointIO()])
    assert any("on_corrupt='previous') is ignored" in str(item.message) for item in caught)


def test_an_unknown_answer_is_refused() -> None:
    with pytest.raises(ValueError, match="on_corrupt must be one of 'raise', 'previous', got 'ignore'"):
        MemoryEfficientRestore(on_corrupt="ignore")  # type: ignore[arg-type]


@pytest.mark.parametrize("on_corrupt", ["raise", "previous"])
def test_the_word_last(on_corrupt: Any, tmp_path: Path) -> None:
    def trainer() -> L.Trainer:
        saver = ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=2, save_top_k=-1)
        restore = MemoryEfficientRestore(on_corrupt=on_corrupt)
        return make_trainer(tmp_path, [saver, restore], max_epochs=1, enable_checkpointing=True)

    trainer().fit(TinyModule(adamw))
    flip_weight(tmp_path / "last.ckpt")
    again = trainer()
    if on_corrupt == "raise":
        with pytest.raises(ChecksumError, match=r"is .*epoch=0-step=8\.ckpt: resume"):
            again.fit(TinyModule(adamw), ckpt_path="last", **TRUSTED)
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        again.fit(TinyModule(adamw), ckpt_path="last", **TRUSTED)
    assert any("epoch=0-step=8.ckpt instead" in str(item.message) for item in caught)
    assert str(again.ckpt_path).endswith("epoch=0-step=8.ckpt")


@pytest.mark.lightning_only
def test_all_ranks_take_the_same(folder: Path, tmp_path: Path) -> None:
    flip_weight(folder / "last.ckpt")
    results = ranks(folder / "last.ckpt", tmp_path / "ranks", "ddp_fork", ours=True, on_corrupt="previous")
    assert [result["report"]["path"] for result in results] == [str(folder / "step=5.ckpt")] * 2
    assert [result["report"]["global_step"] for result in results] == [5, 5]
