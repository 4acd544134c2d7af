"""A checkpoint that another program changes in place after the restore: a run goes on as a stock one does."""

from __future__ import annotations

import copy
import mmap
import os
import pickle
import shutil
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from tests.lightning.pytorch.plugins.io import AsyncCheckpointIO

import tests.lightning as L
from lightning_memload import CheckpointReadError, MemoryEfficientRestore, StreamingCheckpointIO, meta_init
from lightning_memload.checkpoint import MappedCheckpoint
from lightning_memload.storage import lease
from tests.fresh_process import run_fresh
from tests.plugins.harness import (
    FEATURES,
    TRUSTED,
    Case,
    TinyModule,
    adamw,
    assert_same,
    contents,
    make_trainer,
    write_checkpoint,
)
from tests.plugins.modules import Evaluated, values
from tests.storage.watching import traces, watches_end

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="mappings and leases need Linux")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_checkpoint(Case(lambda: Evaluated(adamw)), tmp_path)


def weights_in(path: Path) -> dict[str, torch.Tensor]:
    return dict(torch.load(path, weights_only=False)["state_dict"])


def write_weights(path: Path) -> Path:
    torch.save(torch.nn.Linear(FEATURES, 3).state_dict(), path)
    return path


class TestEvaluation:
    @pytest.mark.parametrize("mode", ["auto", "assign"])
    def test_goes_on(self, mode: Any, tmp_path: Path, path: Path) -> None:
        saved = weights_in(path)
        restore = MemoryEfficientRestore(mode=mode)
        with meta_init():
            module = Evaluated(adamw)
        trainer = make_trainer(tmp_path, [restore])
        trainer.validate(module, ckpt_path=path, **TRUSTED)
        assert restore.report is not None
        assert restore.report.mode == "assign"
        before = trainer.callback_metrics["loss"]
        with pytest.warns(UserWarning, match=r"case\.ckpt is being rewritten in place"), watches_end():
            path.write_bytes(b"other")
        assert traces(path) == (False, False)
        assert_same(saved, values(module), "weights")
        trainer.validate(module)
        assert torch.equal(trainer.callback_metrics["loss"], before)
        trainer.test(module)
        assert torch.equal(trainer.callback_metrics["loss"], before)
        assert_same(saved, values(copy.deepcopy(module)), "copy")
        trainer.save_checkpoint(path)
        assert_same(saved, weights_in(path), "saved")

    def test_while_it_runs(self, tmp_path: Path, path: Path) -> None:
        saved = weights_in(path)

        class Rewrites(Evaluated):
            def on_validation_batch_start(self, *_: Any) -> None:
                if path.stat().st_size:
                    os.truncate(path, 0)

        with meta_init():
            module = Rewrites(adamw)
        with pytest.warns(UserWarning, match="rewritten in place"), watches_end():
            make_trainer(tmp_path, [MemoryEfficientRestore()]).validate(module, ckpt_path=path, **TRUSTED)
        assert_same(saved, values(module), "weights")

    def test_auto_copies_where_nothing_tells(self, tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(lease, "_file_system_of", lambda descriptor: "nfs4")
        restore = MemoryEfficientRestore()
        with meta_init():
            module = Evaluated(adamw)
        make_trainer(tmp_path, [restore]).validate(module, ckpt_path=path, **TRUSTED)
        assert restore.report is not None
        assert restore.report.mode == "copy"
        assert "on nfs4, writes of other programs may go unnoticed" in restore.report.mode_reason
        assert traces(path) == (False, False)

    @pytest.mark.parametrize("when", ["within", "between"])
    def test_a_change_that_nothing_tells_of_is_noticed(
        self, when: str, tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(lease, "_file_system_of", lambda descriptor: "nfs4")
        data = path.read_bytes()

        def rewrite() -> None:
            path.write_bytes(data)
            os.utime(path, (1, 1))

        class Rewrites(Evaluated):
            def on_validation_end(self) -> None:
                if when == "within":
                    rewrite()

        restore = MemoryEfficientRestore(mode="assign")
        with meta_init():
            module = Rewrites(adamw)
        trainer = make_trainer(tmp_path, [restore])
        message = r"case\.ckpt was changed in place while parameters are pages of it"
        if when == "within":
            with pytest.warns(UserWarning, match=message):
                trainer.validate(module, ckpt_path=path, **TRUSTED)
        else:
            trainer.validate(module, ckpt_path=path, **TRUSTED)
            copy.deepcopy(restore)
            rewrite()
            with pytest.warns(UserWarning, match=message):
                trainer.test(module)
        assert restore.report is not None
        assert "in-place changes of the file cannot be detected: on nfs4" in restore.report.mode_reason
        trainer.test(module)  # once is enough

    def test_a_replacement_is_no_change(self, tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(lease, "_file_system_of", lambda descriptor: "nfs4")
        with meta_init():
            module = Evaluated(adamw)
        trainer = make_trainer(tmp_path, [MemoryEfficientRestore(mode="assign")])
        trainer.validate(module, ckpt_path=path, **TRUSTED)
        path.with_name("new").write_bytes(b"new")
        path.with_name("new").replace(path)
        trainer.test(module)


class TestPluginAlone:
    """Lightning tells a CheckpointIO of no end of a restore."""

    def fit(self, path: Path, plugins: list[Any], kind: type[TinyModule] = TinyModule) -> dict[str, Any]:
        torch.manual_seed(3)
        module = self.module = kind(adamw)
        trainer = make_trainer(path.parent, plugins=plugins, max_epochs=3)
        trainer.fit(module, ckpt_path=path, **TRUSTED)
        return {"contents": contents(trainer, module), "losses": module.losses}

    @pytest.mark.parametrize("wrapped", [False, True])
    def test_nothing_is_left_when_training_starts(self, wrapped: bool, path: Path) -> None:
        expected = self.fit(path, [])
        copied = shutil.copy(path, path.with_name("copy"))

        class Looks(TinyModule):
            def on_train_start(self) -> None:
                assert traces(path) == (False, False)
                # Before the optimizer uses what Lightning handed to it by reference.
                shutil.copyfile(copied, path)
                os.truncate(path, 0)

        io = StreamingCheckpointIO()
        assert_same(expected, self.fit(path, [AsyncCheckpointIO(io) if wrapped else io], Looks), "resumed")

    @pytest.mark.parametrize("entry", ["validate", "predict"])
    def test_evaluation_too(self, entry: str, path: Path, tmp_path: Path) -> None:
        class Looks(Evaluated):
            def on_validation_start(self) -> None:
                assert traces(path) == (False, False)

            on_predict_start = on_validation_start

            def predict_dataloader(self) -> Any:
                return self.train_dataloader()

        module = Looks(adamw)
        trainer = make_trainer(tmp_path, plugins=[StreamingCheckpointIO()])
        getattr(trainer, entry)(module, ckpt_path=path, **TRUSTED)
        assert_same(weights_in(path), values(module), "weights")

    def test_what_a_hook_keeps_is_ordinary_memory(self, path: Path) -> None:
        class Keeps(TinyModule):
            def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
                self.kept = checkpoint["state_dict"]
                self.states = checkpoint["optimizer_states"]

            def on_train_start(self) -> None:
                assert traces(path) == (False, False)
                path.write_bytes(b"other")

        saved = torch.load(path, weights_only=False)
        self.fit(path, [StreamingCheckpointIO()], Keeps)
        module: Any = self.module
        assert_same(dict(saved["state_dict"]), dict(module.kept), "kept")
        assert module.states[0].keys() == saved["optimizer_states"][0].keys()

    def test_a_hook_that_keeps_all_of_it(self, path: Path) -> None:
        """It stays in the file until a program changes the file."""

        class Keeps(TinyModule):
            def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
                self.kept = checkpoint

            def on_train_start(self) -> None:
                assert traces(path) == (True, True)
                path.write_bytes(b"other")
                assert traces(path)[0] is False

        expected = self.fit(path, [])
        saved = torch.load(path, weights_only=False)
        with pytest.warns(UserWarning, match="rewritten in place"), watches_end():
            assert_same(expected, self.fit(path, [StreamingCheckpointIO()], Keeps), "resumed")
        assert_same(dict(saved["state_dict"]), dict(self.module.kept["state_dict"]), "kept")

    def test_the_file_is_rewritten_while_lightning_restores(self, path: Path) -> None:
        expected = self.fit(path, [])

        class Rewrites(TinyModule):
            def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
                path.write_bytes(b"other")

        with pytest.warns(UserWarning, match="rewritten in place"), watches_end():
            assert_same(expected, self.fit(path, [StreamingCheckpointIO()], Rewrites), "resumed")


class TestLoadedByTheUser:
    def test_is_what_stock_loads(self, path: Path) -> None:
        stock = TorchCheckpointIO().load_checkpoint(path, **TRUSTED)
        ours = StreamingCheckpointIO().load_checkpoint(path, weights_only=False)
        assert isinstance(ours, dict)
        assert list(ours) == list(stock)
        for copied in (ours, copy.copy(ours), copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), dict(ours)):
            assert_same(dict(stock["state_dict"]), dict(copied["state_dict"]), "weights")
            assert list(copied) == list(stock)
        weights = StreamingCheckpointIO().load_checkpoint(write_weights(path.with_name("weights")))
        torch.save(weights, path.with_name("again"))
        again = torch.load(path.with_name("again"), weights_only=True)
        assert type(again) is type(copy.copy(ours)) is type(ours.copy()) is OrderedDict
        assert again._metadata == weights._metadata

    def test_only_what_is_kept_is_read(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        detached: list[int] = []
        detach = MappedCheckpoint.detach
        monkeypatch.setattr(
            MappedCheckpoint, "detach", lambda self, **kwargs: detached.append(detach(self, **kwargs)) or detached[-1]
        )
        torch.save({"kept": torch.ones(4096), "dropped": torch.ones(1 << 20)}, path)
        loaded = StreamingCheckpointIO().load_checkpoint(path)
        kept = loaded["kept"]
        del loaded
        assert kept.sum() == 4096
        assert len(detached) == 1
        assert kept.nbytes <= detached[0] <= kept.nbytes + 2 * mmap.PAGESIZE

    def test_keeps_it(self, path: Path) -> None:
        saved = torch.load(path, weights_only=False)
        kept = StreamingCheckpointIO().load_checkpoint(path, weights_only=False)
        assert traces(path) == (True, True)
        with pytest.warns(UserWarning, match="rewritten in place"), watches_end():
            os.truncate(path, 0)
        assert_same(dict(saved["state_dict"]), dict(kept["state_dict"]), "weights")

    def test_keeps_a_part_of_it(self, path: Path) -> None:
        saved = weights_in(path)
        kept = StreamingCheckpointIO().load_checkpoint(path, weights_only=False)["state_dict"]
        assert traces(path) == (False, False)
        path.write_bytes(b"other")
        assert_same(dict(saved), dict(kept), "weights")

    @pytest.mark.parametrize("kind", [list, tuple])
    def test_something_that_tells_of_no_end(self, kind: Any, tmp_path: Path) -> None:
        torch.save(kind([torch.ones(3000), torch.zeros(2)]), tmp_path / "file")
        loaded: Any = StreamingCheckpointIO().load_checkpoint(tmp_path / "file", weights_only=False)
        assert type(loaded) is kind
        assert traces(tmp_path / "file") == (False, False)
        assert loaded[0].sum() == 3000

    def test_a_state_dict_stays_what_it_is(self, tmp_path: Path) -> None:
        loaded: Any = StreamingCheckpointIO().load_checkpoint(write_weights(tmp_path / "file"))
        assert loaded._metadata[""] == {"version": 1}

    def test_a_file_that_was_cut_short_unseen(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Nothing can raise when the checkpoint goes, so a warning tells."""
        monkeypatch.setattr(lease, "_file_system_of", lambda descriptor: "nfs4")
        loaded = StreamingCheckpointIO().load_checkpoint(path, weights_only=False)
        kept = loaded["state_dict"]
        os.truncate(path, 0)
        with pytest.warns(UserWarning, match=r"ends at byte \d+.*in use may be wrong"):
            del loaded
        assert traces(path) == (False, False)
        assert kept


@pytest.mark.lightning_only
def test_a_stock_save_across_file_systems(tmp_path: Path) -> None:
    """Lightning moves its temporary file over the checkpoint; from another file system that writes it in place."""
    if not os.path.isdir("/dev/shm") or os.stat("/dev/shm").st_dev == os.stat(tmp_path).st_dev:
        pytest.skip("there is one file system only")
    program = """
import os, tempfile, warnings
tempfile.tempdir = ARGS["temporary"]
import torch, lightning as L
from lightning_memload import MemoryEfficientRestore, StreamingCheckpointIO, meta_init
from tests.plugins.harness import TRUSTED, assert_same, make_trainer
from tests.plugins.harness import adamw
from tests.plugins.modules import Evaluated, values
from tests.storage.watching import join_watches
from pathlib import Path
path, folder = ARGS["path"], Path(ARGS["temporary"])
class Other(Evaluated):
    def __init__(self, width):
        super().__init__(adamw)
        self.first, self.second = torch.nn.Linear(6, width), torch.nn.Linear(width, 6)
def save(seed, width):
    torch.manual_seed(seed)
    trainer = make_trainer(folder, max_steps=2)
    trainer.fit(Other(width))
    trainer.save_checkpoint(path)
RESULT = []
for plugin, width in ((False, 300), (False, 2), (True, 2)):
    save(1, 300)
    inode = os.stat(path).st_ino
    saved = torch.load(path, weights_only=False)
    if plugin:
        kept = StreamingCheckpointIO().load_checkpoint(path, weights_only=False)
        now = lambda: dict(kept["state_dict"])
    else:
        with meta_init():
            module = Other(300)
        make_trainer(folder, [MemoryEfficientRestore()]).validate(module, ckpt_path=path, **TRUSTED)
        now = lambda: values(module)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        save(2, width)
        join_watches()
    assert_same(dict(saved["state_dict"]), dict(now()), "weights")
    told = sum("rewritten in place" in str(warning.message) for warning in caught)
    RESULT.append([os.stat(path).st_ino == inode, told])
"""
    assert FEATURES == 6
    answer = run_fresh(program, path=tmp_path / "last.ckpt", temporary="/dev/shm")
    assert answer.result == [[True, 1]] * 3


def test_other_errors_stay(path: Path) -> None:
    """In copy mode nothing watches: a file that is cut short during the restore ends in an error, as before."""

    class Cuts(TinyModule):
        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            os.truncate(path, 0)

    with pytest.raises(CheckpointReadError, match="truncated"):
        make_trainer(path.parent, [MemoryEfficientRestore()]).fit(Cuts(adamw), ckpt_path=path, **TRUSTED)
    assert L.pytorch.__version__
