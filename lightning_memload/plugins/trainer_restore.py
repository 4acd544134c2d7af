"""The restoring half of ``MemoryEfficientRestore``: connects one restore at a time with the hooks of a Trainer."""

from __future__ import annotations

import weakref
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from lightning_utilities.core.rank_zero import rank_zero_info

from lightning_memload.plugins.checkpoint_io import StreamingCheckpointIO
from lightning_memload.plugins.damaged import name_intact_sibling
from lightning_memload.plugins.exposed import ExposedParameters
from lightning_memload.plugins.figure_log import log_picture
from lightning_memload.plugins.mixed_imports import name_mixed_imports
from lightning_memload.plugins.request import RestoreOptions
from lightning_memload.plugins.run import RestoreRun
from lightning_memload.plugins.save_log import step_of_loggers
from lightning_memload.plugins.seams import (
    around_checkpoint,
    around_load,
    before_move,
    begin_averages,
    loads_by_itself,
    reads_shards,
    skip_next_move_to_cpu,
    when_set_up,
)
from lightning_memload.plugins.telling import meta_error, report_match
from lightning_memload.report import Detail, RestoreReport
from lightning_memload.restore import WeightsSource, follow_recipes, meta_names, names_of_data

if TYPE_CHECKING:
    import lightning.pytorch as pl

__all__ = ["TrainerRestore"]


class TrainerRestore:
    """The restores of one callback, one for each run of a Trainer.

    Args:
        options: The arguments of the callback.
        weights_from: The weights that ``fit`` starts from without ``ckpt_path``, ``None`` for none.
        detail: How many figures of each restore to log. ``None``: none, and no table.

    Attributes:
        report: The figures of the last restore, ``None`` before the first.
    """

    def __init__(self, options: RestoreOptions, weights_from: WeightsSource | None, *, detail: Detail | None) -> None:
        self.report: RestoreReport | None = None
        self._options = options
        self._weights_from = weights_from
        self._detail = detail
        self._has_weights: weakref.ref[pl.LightningModule] | None = None
        self._exposed: ExposedParameters | None = None
        self._run: RestoreRun | None = None
        self._hooks = ExitStack()

    def __getstate__(self) -> dict[str, Any]:
        """A copy belongs to another Trainer, so it has none of this one's runs and modules."""
        return {**vars(self), "_has_weights": None, "_exposed": None, "_run": None, "_hooks": ExitStack()}

    def begin(
        self, trainer: pl.Trainer, module: pl.LightningModule, stage: str, io: StreamingCheckpointIO | None
    ) -> None:
        """Prepares the restore of a run, before anything is read.

        Args:
            trainer: The Trainer.
            module: Its module.
            stage: The stage, as Lightning names it.
            io: The CheckpointIO that loads. ``None`` if another one or the strategy loads.
        """
        strategy, hook = trainer.strategy, self._hooks.callback
        shards = io is None and reads_shards(strategy)
        run = self._run = RestoreRun(self._options, trainer, module, stage, streams=io is not None, shards=shards)
        if io is not None:
            hook(io.observe(run))
            hook(io.allow(run.allowance))
            hook(around_load(strategy, run.load_model))
        if shards:
            hook(around_checkpoint(strategy, run.load_shards))
        if not loads_by_itself(strategy):
            hook(before_move(strategy, lambda: self._end_weights(run, trainer, module)))
        hook(when_set_up(strategy, run.meet_companions, lambda: self._begin_stage(run, trainer, module)))

    def begin_optimizers(self, trainer: pl.Trainer) -> None:
        """Prepares the restore of the optimizer states. The optimizers exist now."""
        if self._run is not None:
            self._run.begin_optimizers(trainer.optimizers)

    def begin_training(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Ends the restore and reports it, unless states of optimizers may arrive while training has begun."""
        if self._run is not None and self._run.begin_overlap():
            self._hooks.close()
        else:
            self.finish(trainer, module)

    def end_batch(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Reports a restore whose last states have arrived since training began."""
        if self._run is not None and self._run.has_arrived:
            self.finish(trainer, module)

    def finish(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Ends the restore and reports it, if there is one. A second call does nothing."""
        run = self._take_run()
        done = run.finish() if run is not None else None
        if done is None:
            return
        report = self.report = done.report
        if done.exposed_files is not None:
            self._exposed = ExposedParameters(done.exposed_files, trainer.lightning_module)
        report_match(report, module)
        if self._detail is None:
            return
        rank_zero_info(f"Restored {report.path} for {report.stage}\n{report.table()}")
        step = report.global_step if report.stage != "fit" else step_of_loggers(trainer, trainer.global_step)
        for logger in trainer.loggers:
            logger.log_metrics(report.scalars(self._detail), step=step)
        log_picture(trainer, report, self._detail, step)

    def fail(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        """Ends the restore after an exception. The error of a damaged checkpoint names an intact one."""
        restoring = self._run is not None and self._run.path == str(trainer.ckpt_path)
        self.abort(exception)
        skip_next_move_to_cpu(module)
        name_mixed_imports(exception, trainer, module)
        if restoring:
            advise = not (self._options.replaces_damaged or loads_by_itself(trainer.strategy))
            name_intact_sibling(exception, str(trainer.ckpt_path), trainer, advise_option=advise)

    def abort(self, exception: BaseException | None = None) -> None:
        """Ends a restore that did not come to its end, if there is one. The other ranks are told of the exception."""
        run = self._take_run()
        if run is not None:
            run.abort(exception)

    def warn_of_changed_files(self) -> None:
        """Warns if a file whose pages are parameters was changed in place."""
        if self._exposed is not None and not self._exposed.warn_if_changed():
            self._exposed = None

    # --------------------------------------------------------------------------------------------------------------

    def _end_weights(self, run: RestoreRun, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Ends the phase of the weights, before the module moves to its device and may be copied."""
        # Not in setup: only now it is known whether there is a checkpoint, and what configure_model builds.
        run.on_no_load()
        self._load_weights(run, trainer, module)
        # Without a checkpoint only values that a constructor has loaded are filled in, and no random weights.
        names = names_of_data(module) if run.path is None else None
        follow_recipes(module, names, trainer.strategy.root_device)
        parameters, buffers = meta_names(module)
        if parameters or buffers:
            raise meta_error(module, run.path, parameters, buffers)
        parts = self._options.parts
        if run.path is not None and parts is not None and "callbacks" not in parts:
            begin_averages(trainer, module)
        run.end_weights()

    def _begin_stage(self, run: RestoreRun, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Ends the restore, also of a strategy that loads checkpoints itself, whether or not there is a checkpoint."""
        self._load_weights(run, trainer, module)
        self.begin_training(trainer, module)

    def _load_weights(self, run: RestoreRun, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Loads ``weights_from``, unless the module already has these weights or ``ckpt_path`` is restored."""
        source = self._weights_from
        known = self._has_weights is not None and self._has_weights() is module
        if source is None or known or trainer.state.fn != "fit" or trainer.ckpt_path is not None:
            return
        if loads_by_itself(trainer.strategy):
            raise ValueError(
                "MemoryEfficientRestore(weights_from=...) cannot load into a module that "
                f"{type(trainer.strategy).__name__} shards. Load the weights in configure_model, or start from a "
                "checkpoint of that strategy."
            )
        run.load_weights(source)
        begin_averages(trainer, module)
        self._has_weights = weakref.ref(module)

    def _take_run(self) -> RestoreRun | None:
        run, self._run = self._run, None
        self._hooks.close()
        return run
