"""One restore in one Trainer run: from the request to load the checkpoint to the start of training or evaluation.

``RestoreRun`` receives the calls of the CheckpointIO, the strategy and the Callback, and moves from phase to phase
(:mod:`phases`). It ends with :meth:`RestoreRun.finish` or :meth:`RestoreRun.abort`: then every hook is removed and the
file is released.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lightning_memload.checkpoint import MappedCheckpoint
from lightning_memload.distributed import Companions
from lightning_memload.plugins.checkpoint_io import Allowance
from lightning_memload.plugins.damaged import choose_intact
from lightning_memload.plugins.meter import PhaseMeter
from lightning_memload.plugins.opening import Opening
from lightning_memload.plugins.phases import (
    Done,
    Failed,
    Measured,
    Optimizers,
    Outcome,
    Overlapping,
    Phase,
    Waiting,
    Weights,
)
from lightning_memload.plugins.rank_maxima import reduce_maxima
from lightning_memload.plugins.reading import ReadingChoice
from lightning_memload.plugins.request import Request, RestoreOptions
from lightning_memload.plugins.seams import all_ranks_load
from lightning_memload.plugins.sharding import ShardedLoad
from lightning_memload.report import MEMORY_FIGURES, PhaseReport, RestoreReport
from lightning_memload.restore import WeightsSource
from lightning_memload.storage.places import is_local

if TYPE_CHECKING:
    import lightning.pytorch as pl

__all__ = ["RestoreRun"]


class RestoreRun:
    """Restores one checkpoint in one run of a Trainer, and measures it.

    Args:
        options: The arguments of the callback.
        trainer: The Trainer.
        pl_module: Its module.
        stage: The stage, as Lightning names it.
        streams: Whether a ``StreamingCheckpointIO`` loads the checkpoint. If not, the run only measures, from now on.
        shards: Whether the strategy loads the checkpoint with :meth:`load_shards`.

    Attributes:
        phase: The present phase.
    """

    def __init__(
        self,
        options: RestoreOptions,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        stage: str,
        *,
        streams: bool,
        shards: bool = False,
    ) -> None:
        device = trainer.strategy.root_device
        # Lightning passes an enum, and its str() is the name of the member in Python.
        name = str(getattr(stage, "value", stage))
        request = self._request = Request(options, trainer, pl_module, name, device, PhaseMeter(device))
        self._chooses = options.replaces_damaged and streams and all_ranks_load(trainer.strategy)
        obstacle = None if streams and all_ranks_load(trainer.strategy) else "the strategy or a plugin loads by itself"
        several = trainer.world_size > 1
        shares = options.read == "stripes" and obstacle is None
        agrees = self._chooses or shards
        self._companions = Companions.announce(agrees=agrees, shares=shares) if several else None
        self._reading = ReadingChoice(options.read, self._companions, obstacle if several else "one process")
        self.phase: Phase = Waiting() if streams or shards else Measured(request)
        if not streams:
            request.meter.start()

    @property
    def path(self) -> str | None:
        """The checkpoint that is restored, ``None`` if there is none."""
        return self.phase.path

    def meet_companions(self) -> None:
        """Counts the ranks that take part in this restore. All of them must have announced themselves."""
        if self._companions is not None:
            self._companions.meet()

    # Called by the CheckpointIO and the strategy --------------------------------------------------------------------

    def on_load_start(self, path: str) -> str:
        """Begins the restore. With ``on_corrupt="previous"``, returns an intact checkpoint if this one is damaged."""
        if not isinstance(self.phase, Waiting) or path != str(self._request.trainer.ckpt_path):
            return path  # A user's hook loads another checkpoint.
        find = (lambda: self._choose(path) or path) if self._request.options.replaces_damaged else lambda: path
        # Until a checkpoint is chosen the run has no path: an error of the choice needs no addition about intact ones.
        opening = Opening(self._request, find, is_remote=not is_local(path))
        self.phase = opening
        return opening.path

    def allowance(self, path: str) -> Allowance:
        """The exceptions from ``weights_only`` for a path that is loaded."""
        return self._request.allowance() if path == self.path else Allowance()

    def on_load_end(self, path: str, checkpoint: Any, mapped: MappedCheckpoint | None) -> bool:
        """Installs the streaming into the module. The end of the run releases the file."""
        phase = self.phase
        if not isinstance(phase, Opening) or phase.path != path:
            return False
        self.phase = phase.begin_weights(checkpoint, mapped, self._reading)
        return True

    def load_model(self, load: Callable[..., None], checkpoint: Mapping[str, Any], strict: bool) -> None:
        """Loads the weights as Lightning does, see :meth:`Weights.load_model`."""
        if isinstance(self.phase, Weights):
            self.phase.load_model(load, checkpoint, strict)
        else:
            load(checkpoint, strict=strict)

    def load_shards(
        self, load: Callable[[str], dict[str, Any]], path: str, weights_only: bool | None
    ) -> dict[str, Any]:
        """Loads a checkpoint into a sharded module, or calls ``load`` if that is not possible, see :mod:`sharding`."""
        if not isinstance(self.phase, Waiting) or str(path) != str(self._request.trainer.ckpt_path):
            return load(path)
        loading = ShardedLoad(self._request, self._companions)
        self.phase = loading
        checkpoint, self.phase = loading.load_shards(load, path, weights_only)
        return checkpoint

    # Called by the Callback -----------------------------------------------------------------------------------------

    def on_no_load(self) -> None:
        """Tells the other ranks that this rank restores no checkpoint, if they wait for it."""
        if self._chooses and self._companions is not None and self._companions.can_agree:
            self._choose(None)
        self._reading.decline()

    def load_weights(self, source: WeightsSource) -> None:
        """Streams the weights of a checkpoint into the module, without a resume.

        Raises:
            MemloadError: As ``WeightsSource`` does.
        """
        path = os.fspath(source.path)
        opening = Opening(self._request, lambda: path, is_remote=not is_local(path))
        self.phase = opening
        self.phase = opening.load(source)

    def end_weights(self) -> None:
        """Removes the streaming from the module, once its values are loaded."""
        if isinstance(self.phase, Weights):
            if self._reading.striping is not None:
                self._reading.striping.confirm("the weights are loaded")  # A hook may have failed on one rank.
            self.phase.end_streaming()

    def begin_optimizers(self, optimizers: Sequence[Any]) -> None:
        """Installs the streaming into the optimizers."""
        if isinstance(self.phase, Weights):
            self.phase = self.phase.begin_optimizers(optimizers)

    def begin_overlap(self) -> bool:
        """Begins the training while states are on their way. Returns whether some are."""
        if isinstance(self.phase, Optimizers):
            self.phase = self.phase.begin_overlap() or self.phase
        return isinstance(self.phase, Overlapping)

    @property
    def has_arrived(self) -> bool:
        """Whether the states that were on their way have arrived, and a step was made with them."""
        return isinstance(self.phase, Overlapping) and self.phase.has_arrived

    def finish(self) -> Done | None:
        """Ends the restore. Everything is released, also if this fails.

        With several processes it waits at most some seconds for the figures of the other ranks that take part.

        Returns:
            The end of the restore, ``None`` if nothing was restored.
        """
        try:
            outcome = self.phase.finish()
            if outcome is None:
                return None
            self._request.meter.stop(outcome.stats)
            report = self._report(outcome)
            if self._companions is not None:
                maxima, ranks = reduce_maxima(report.figures(), list(MEMORY_FIGURES), report.rank, self._companions)
                report = replace(report, maxima=maxima, maxima_ranks=ranks)
            done = Done(report, outcome.mode.exposed_files)
            self.phase = done
            return done
        finally:
            self.abort()

    def abort(self, exception: BaseException | None = None) -> None:
        """Ends a restore that failed, or that was never requested. A second call does nothing.

        Args:
            exception: The error that ends the run, for the other ranks. ``None`` if there is none.
        """
        phase = self.phase
        with ExitStack() as stack:
            if self._companions is not None:
                failure = None if exception is None else f"{type(exception).__name__}: {exception}"
                stack.callback(self._companions.leave, failure)
            stack.callback(self._request.meter.stop, phase.stats)
            stack.callback(phase.abort)
            if not isinstance(phase, Done):
                self.phase = Failed()

    # --------------------------------------------------------------------------------------------------------------

    def _choose(self, path: str | None) -> str | None:
        self._chooses = False
        return choose_intact(path, self._request.trainer, self._companions)

    def _report(self, outcome: Outcome) -> RestoreReport:
        request, stats = self._request, outcome.stats
        trainer, peaks = request.trainer, request.meter.total.peaks
        first_step = trainer.global_step if outcome.first_step is None else outcome.first_step
        reading, striping = self._reading.chosen, self._reading.striping
        return RestoreReport(
            path=outcome.path,
            stage=request.stage,
            mode=outcome.mode.name,
            mode_reason=outcome.mode.reason,
            device=str(request.device),
            global_step=first_step if request.stage == "fit" else outcome.global_step,
            phases=tuple(request.meter.reports),
            total=PhaseReport("total", peaks.seconds, stats.bytes_read, stats.seconds, peaks),
            bytes_verified=stats.bytes_verified,
            bytes_assigned=outcome.bytes_assigned,
            bytes_copied_ordinarily=outcome.bytes_copied_ordinarily,
            match=outcome.match,
            bytes_kept=outcome.bytes_kept,
            waited_seconds=outcome.waited_seconds,
            staging_bytes=stats.staging_bytes,
            num_threads=stats.num_threads,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            read=reading.name,
            read_reason=reading.reason,
            bytes_received=stats.bytes_received,
            bytes_read_by_rank=dict(striping.bytes_read) if striping is not None else {},
            series=request.meter.series(),
            budget_bytes=request.options.host_budget_bytes,
        )
