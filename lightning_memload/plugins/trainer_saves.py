"""The saving half of ``MemoryEfficientRestore``: connects the saves of one run with the hooks of a Trainer.

It does not keep the Trainer or its module alive after the run.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

from lightning_memload.distributed import WriterRank
from lightning_memload.plugins.checkpoint_io import StreamingCheckpointIO
from lightning_memload.plugins.compat import classes
from lightning_memload.plugins.onlookers import (
    only_lightning_reads,
    only_steps_change,
    warn_of_loggers_without_directories,
)
from lightning_memload.plugins.pending import Gate
from lightning_memload.plugins.save_log import SaveLog
from lightning_memload.report import Detail
from lightning_memload.save import tensors_of_optimizers

if TYPE_CHECKING:
    import lightning.pytorch as pl

__all__ = ["TrainerSaves"]


class TrainerSaves:
    """The saves of one run of a Trainer. If the CheckpointIO writes late, a barrier of all ranks must follow.

    Args:
        trainer: The Trainer.
        io: The CheckpointIO that saves.
        detail: How many figures of saves to log. ``None``: none, and no lines.
    """

    def __init__(self, trainer: pl.Trainer, io: StreamingCheckpointIO, *, detail: Detail | None) -> None:
        self._io = io
        self._writer: WriterRank | None = None
        if io.writes_late:
            self._writer = WriterRank(trainer.world_size, is_here=trainer.is_global_zero)
            self._writer.arrive()
        if io.format != "torch":
            warn_of_loggers_without_directories(trainer.loggers)
        self._log = SaveLog(trainer, detail) if detail is not None else None
        self._observers = ExitStack()
        if self._log is not None:
            self._observers.callback(io.observe_saves(self._log.add))
        self._steps = ExitStack()

    def begin_steps(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Begins a training: from here on saves may be asynchronous."""
        io = self._io
        if not io.asynchronous:
            return
        if not io.writes_late:
            io.begin_steps()
            return
        if io.asynchronous is True or not only_steps_change(trainer):
            io.begin_steps(lambda: self._only_lightning_reads(trainer))
            return
        io.begin_steps(
            lambda: self._only_lightning_reads(trainer),
            lambda: tensors_of_optimizers(trainer.optimizers, module.modules()),
        )
        gate = Gate(io.wait_for_tensors)
        hook = module.register_load_state_dict_pre_hook(gate)  # type: ignore[no-untyped-call]
        self._steps.callback(hook.remove)

    def end_batch(self) -> None:
        """Logs the saves that have ended, and warns of saves that failed since their tensors changed."""
        self._flush()
        self._io.tell_what_changed()

    def wait_for_tensors(self) -> None:
        """Waits until no save needs the tensors: callbacks may now swap in averaged weights."""
        self._io.wait_for_tensors()

    def end_steps(self) -> None:
        """Waits until all checkpoints are written, on every rank: other callbacks may now change the weights."""
        self._end_steps()
        if self._writer is not None:
            self._writer.wait()
        self._flush()

    def leave(self) -> None:
        """Ends the training, and no longer makes other ranks wait. A second call does nothing."""
        self._end_steps()
        if self._writer is not None:
            self._writer.leave()

    def teardown(self, trainer: pl.Trainer) -> None:
        """Ends the CheckpointIO, which raises the error of a save that failed in the background."""
        # Lightning's AsyncCheckpointIO does not call teardown of the IO that it wraps.
        outer = trainer.strategy.checkpoint_io
        if isinstance(outer, classes("lightning.pytorch.plugins.io.AsyncCheckpointIO")):
            outer.teardown()
        self._io.teardown()

    def close(self) -> None:
        """Logs the saves that have ended. Later saves get lines only, since the loggers are about to end."""
        if self._log is not None:
            self._log.close()

    def forget(self) -> None:
        """Ends the lines for saves: another run begins."""
        self._observers.close()

    # --------------------------------------------------------------------------------------------------------------

    def _end_steps(self) -> None:
        self._steps.close()
        self._io.end_steps()

    def _flush(self) -> None:
        if self._log is not None:
            self._log.flush()

    def _only_lightning_reads(self, trainer: pl.Trainer) -> bool:
        """Whether no other code, on any rank, could read the checkpoint of the current save before it is written."""
        if self._writer is None or not self._writer.knows_all_ranks() or not only_lightning_reads(trainer):
            return False
        self._writer.begin()
        return True
