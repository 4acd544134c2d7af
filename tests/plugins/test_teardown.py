"""``keep_on_device``: Lightning's teardown does all that it does, but moves nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import tests.lightning as L
from lightning_memload import MemoryEfficientRestore
from tests.plugins.harness import TinyModule, adamw, make_trainer
from tests.plugins.restored import assert_clean


class Moved(TinyModule):
    """Counts how often it is moved to the host."""

    def __init__(self) -> None:
        super().__init__(adamw)
        self.moves = 0

    def cpu(self) -> Any:
        self.moves += 1
        return super().cpu()


@pytest.fixture
def moved_optimizers(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of optimizers that each call moves: one in the setup of a run, one in its teardown."""
    import tests.lightning.pytorch.strategies.strategy as strategy_module

    seen: list[int] = []
    monkeypatch.setattr(strategy_module, "_optimizers_to_device", lambda given, device: seen.append(len(given)))
    return seen


@pytest.mark.parametrize("keep", [False, True])
def test_nothing_is_moved_and_everything_is_there(keep: bool, tmp_path: Path, moved_optimizers: list[int]) -> None:
    module = Moved()
    restore = MemoryEfficientRestore(keep_on_device=keep)
    trainer = make_trainer(tmp_path, [restore], max_epochs=1)
    for _ in range(2):
        module.moves = 0
        trainer.fit(module)
        assert module.moves == (0 if keep else 1)
        assert moved_optimizers[-1] == (0 if keep else 1)
        assert len(trainer.optimizers) == 1
        assert "teardown" not in trainer.strategy.__dict__
        assert_clean(trainer, module)
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    module.cpu()
    assert module.moves == (1 if keep else 2)


def test_the_rest_of_teardown_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(tmp_path, [MemoryEfficientRestore(keep_on_device=True)], max_epochs=1)
    done: list[str] = []
    monkeypatch.setattr(trainer.strategy.precision_plugin, "teardown", lambda: done.append("precision"))
    monkeypatch.setattr(trainer.strategy.accelerator, "teardown", lambda: done.append("accelerator"))
    trainer.fit(Moved())
    assert done == ["precision", "accelerator"]


def test_after_an_error(tmp_path: Path, moved_optimizers: list[int]) -> None:
    class Failing(L.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            raise RuntimeError("a user's mistake")

    module = Moved()
    trainer = make_trainer(tmp_path, [MemoryEfficientRestore(keep_on_device=True), Failing()], max_epochs=1)
    with pytest.raises(RuntimeError, match="a user's mistake"):
        trainer.fit(module)
    assert (module.moves, moved_optimizers) == (0, [1, 0])
    assert_clean(trainer, module)
