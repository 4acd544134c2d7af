"""One restore in one Trainer run: from the request to load the checkpoint to the start of training or evaluation.

The run observes the CheckpointIO, streams the values during torch's ``load_state_dict``, and measures each phase. It
ends with exactly one of :meth:`RestoreRun.finish` and :meth:`RestoreRun.abort`. Both remove every hook and release the
file.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from lightning_memload.checkpoint import MappedCheckpoint
from lightning_memload.distributed import Companions
from lightning_memload.errors import CheckpointFormatError
from lightning_memload.pickles import SafeGlobal
from lightning_memload.plugins.checkpoint_io import Allowance
from lightning_memload.plugins.compat import classes
from lightning_memload.plugins.damaged import choose_intact
from lightning_memload.plugins.mode import Mode, choose_mode
from lightning_memload.plugins.parts import hooks_load, keep_parts, remove_refused
from lightning_memload.plugins.phases import PhaseMeter
from lightning_memload.plugins.progress import RestoreBar
from lightning_memload.plugins.rank_maxima import reduce_maxima
from lightning_memload.plugins.seams import all_ranks_load
from lightning_memload.plugins.telling import warn_of_hyperparameters
from lightning_memload.report import MEMORY_FIGURES, PhaseReport, RestoreReport
from lightning_memload.restore import (
    OptimizerRestore,
    RestoreSession,
    WeightsMatch,
    WeightsRestore,
    WeightsSource,
    add_compiled_versions,
    mapped_bytes,
    module_keys,
    refused_by_torch,
    rename_compiled,
    require_match,
)
from lightning_memload.storage import FileSet
from lightning_memload.transfer import LazyRing, TransferStats, start_ring

if TYPE_CHECKING:
    import lightning.pytorch as pl

__all__ = ["RestoreOptions", "RestoreRun"]

_TRUE_PRECISIONS = (
    "lightning.pytorch.plugins.precision.HalfPrecision",
    "lightning.pytorch.plugins.precision.DoublePrecision",
)
_TRUE_PRECISION_DTYPES = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}
_ADVICE = (
    "Build the module with the hyperparameters that it was saved with. To load only a part of the weights, or to load "
    "them under other names, use MemoryEfficientRestore(weights_from=WeightsSource(...)) instead of ckpt_path."
)
# If tensors of at least this size still lie in the file, a garbage collection comes before they are copied out of it.
_COLLECT_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class RestoreOptions:
    """The arguments of ``MemoryEfficientRestore``."""

    mode: Mode
    host_budget_bytes: int
    num_threads: int | None
    verify: bool
    check_fit: bool
    progress_bar: bool
    parts: frozenset[str] | None = None
    replaces_damaged: bool = False
    safe_globals: tuple[SafeGlobal, ...] = ()


class RestoreRun:
    """Restores one checkpoint in one run of a Trainer, and measures it.

    Args:
        options: The arguments of the callback.
        trainer: The Trainer.
        pl_module: Its module.
        stage: The stage, as Lightning names it.
        streams: Whether a ``StreamingCheckpointIO`` loads the checkpoint. If not, the run only measures, from now on.

    Attributes:
        path: The checkpoint that is restored, ``None`` if there is none.
        exposed_files: Files whose pages became parameters, and which Linux does not watch for changes.
    """

    def __init__(
        self, options: RestoreOptions, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str, *, streams: bool
    ) -> None:
        self._options = options
        self._trainer = trainer
        self._module = pl_module
        # Lightning passes an enum, and its str() is the name of the member in Python.
        self._stage = str(getattr(stage, "value", stage))
        self._device = trainer.strategy.root_device
        self.path: str | None = None
        self._global_step: int | None = None
        self._mode, self._mode_reason = "default", "not loaded by StreamingCheckpointIO, only measured"
        self._checkpoint: Any = None
        self._session: RestoreSession | None = None
        self._weights: WeightsRestore | None = None
        self._optimizers: OptimizerRestore | None = None
        self._bar: RestoreBar | None = None
        self._meter = PhaseMeter(self._device)
        self._ring: LazyRing | None = None
        self._collects = False
        self._chooses = options.replaces_damaged and streams and all_ranks_load(trainer.strategy)
        self._companions = Companions.announce(agrees=self._chooses) if trainer.world_size > 1 else None
        self.exposed_files: FileSet | None = None
        self._match: WeightsMatch | None = None
        if not streams:
            self._meter.total.start()

    def meet_companions(self) -> None:
        """Counts the ranks that take part in this restore. All of them must have announced themselves."""
        if self._companions is not None:
            self._companions.meet()

    # Called by the CheckpointIO -------------------------------------------------------------------------------------

    def on_load_start(self, path: str) -> str:
        """Starts measuring. With ``on_corrupt="previous"``, returns an intact checkpoint if this one is damaged."""
        if self.path is not None or path != str(self._trainer.ckpt_path):
            return path  # A user's hook loads another checkpoint.
        self._begin(path)
        if self._options.replaces_damaged:
            self.path = None  # Set once one is chosen: an error of the choice needs no addition by name_intact_sibling.
            self.path = self._choose(path)
        return self.path or path

    def on_no_load(self) -> None:
        """Tells the other ranks that this rank restores no checkpoint, if they have to choose one together."""
        if self._chooses and self._companions is not None and self._companions.can_agree:
            self._choose(None)

    def _choose(self, path: str | None) -> str | None:
        self._chooses = False
        return choose_intact(path, self._trainer, self._companions)

    def allowance(self, path: str) -> Allowance:
        """Allows to skip refused objects if only weights are restored and no hook of a user receives the rest."""
        if self.path != path:
            return Allowance()
        weights_alone = self._stage != "fit" or self._options.parts == frozenset(("weights",))
        erases = weights_alone and not hooks_load(self._trainer, self._module)
        return Allowance(self._options.safe_globals, erases)

    def load_weights(self, source: WeightsSource) -> None:
        """Streams the weights of a checkpoint into the module, without a resume.

        Raises:
            MemloadError: As ``WeightsSource`` does.
        """
        self._begin(os.fspath(source.path))
        state_dict, mapped = source.open()
        self._begin_phase("weights")
        session = self._open_session(mapped)
        _, self._match = source.stream(
            state_dict, self._module, session, dtype=self._true_precision(), assign=self._mode == "assign"
        )
        self._stop_measuring()

    def _begin(self, path: str) -> None:
        self.path = path
        self._meter.total.start()
        self._begin_phase("open")
        # A checkpoint creates thousands of small long-lived objects. Each of several collections would scan the whole
        # heap for 0.2 to 0.4 s and find no garbage.
        self._collects = gc.isenabled()
        gc.disable()
        self._ring = start_ring(
            self._device, self._options.host_budget_bytes, self._options.num_threads, self._trainer.num_devices
        )

    def on_load_end(self, path: str, checkpoint: Any, mapped: MappedCheckpoint | None) -> bool:
        """Installs the streaming into the module. The end of the run releases the file."""
        if self.path != path or self._session is not None:
            return False
        self._begin_phase("weights")
        warn_of_hyperparameters(path, checkpoint, self._module)
        refusal = mapped.refusal if mapped is not None else None
        if refusal is not None:
            remove_refused(checkpoint, refusal, self._trainer)
        try:
            keep_parts(checkpoint, self._options.parts, path=path, trainer=self._trainer, module=self._module)
        except CheckpointFormatError:
            if refusal is not None:
                raise refusal from None
            raise
        if isinstance(checkpoint, dict):
            paths = [name for name, _ in self._module.named_modules(remove_duplicate=False)]
            add_compiled_versions(checkpoint.get("state_dict"), paths)
        step = checkpoint.get("global_step") if isinstance(checkpoint, dict) else None
        self._global_step = step if isinstance(step, int) else None
        self._checkpoint = checkpoint
        session = self._open_session(mapped or MappedCheckpoint.unmapped(path))
        if mapped is None:
            self._mode, self._mode_reason = "default", "loaded by torch.load"
        self._weights = WeightsRestore(
            self._module,
            session,
            dtype=self._true_precision(),
            assign=self._mode == "assign",
            keep_memory=self._options.mode == "auto",
            strict=self._module.strict_loading,
            later_bytes=self._optimizer_bytes,
        )
        return True

    def _open_session(self, mapped: MappedCheckpoint) -> RestoreSession:
        assert self._ring is not None
        bar = self._bar = self._make_bar(mapped)
        session = self._session = RestoreSession(
            mapped,
            device=self._device,
            ring=self._ring,
            verify=self._options.verify,
            check_fit=self._options.check_fit,
            # If several ranks of one host read the same file, one would drop cached pages that the others need.
            drop_behind=self._trainer.num_devices == 1,
            verify_pages=self._options.verify,
            on_progress=bar.advance if bar is not None else None,
            on_pinned=lambda nbytes: self._meter.total.tick(pinned_bytes=nbytes),
        )
        wanted = self._options.mode
        mode = choose_mode(wanted, session, path=self.path, device=self._device, stage=self._stage, module=self._module)
        self._mode, self._mode_reason, self.exposed_files = mode.name, mode.reason, mode.exposed_files
        if self._mode == "assign":
            session.keep_cached()
        return session

    def load_model(self, load: Callable[..., None], checkpoint: Mapping[str, Any], strict: bool) -> None:
        """Loads the weights as Lightning does. If they do not fit, a short error replaces torch's long one.

        Args:
            load: Lightning's method.
            checkpoint: The checkpoint that Lightning passes to it.
            strict: Whether names must match.

        Raises:
            IncompatibleWeightsError: The weights do not fit the module. It is a ``RuntimeError``, as in torch.
        """
        state_dict = checkpoint.get("state_dict")
        if self._weights is None or self.path is None or not isinstance(state_dict, Mapping):
            load(checkpoint, strict=strict)
            return
        named = dict(state_dict)
        rename_compiled(named, module_keys(self._module))  # Loading renames them in the same way.
        require_match(self._module, named, strict=strict, path=self.path, advice=_ADVICE)
        try:
            load(checkpoint, strict=strict)
        except RuntimeError as error:
            match = self._weights.match if strict else None
            refused = refused_by_torch(self._module, error, match, path=self.path, advice=_ADVICE)
            if refused is None:
                raise
            raise refused from error

    # Called by the Callback -----------------------------------------------------------------------------------------

    def end_weights(self) -> None:
        """Removes the streaming from the module, once its values are loaded."""
        if self._weights is not None:
            self._weights.remove()

    def begin_optimizers(self, optimizers: Sequence[Any]) -> None:
        """Installs the streaming into the optimizers."""
        if not self._meter.is_in_phase:
            return
        self._begin_phase("optimizers")
        if self._session is None:
            return
        parameters = dict(self._module.named_parameters(remove_duplicate=False))
        self._optimizers = OptimizerRestore(optimizers, self._session, parameters=parameters, loaded=self._checkpoint)

    def finish(self) -> RestoreReport | None:
        """Ends the restore.

        With several processes it waits at most some seconds for the figures of the other ranks that take part.

        Returns:
            The report, ``None`` if nothing was restored.
        """
        restored = self.path is not None or (self._meter.total.is_running and self._trainer.ckpt_path)
        if not restored:
            self.abort()
            return None
        self._end_streaming()
        self._checkpoint = None
        session, kept = self._session, 0
        if session is not None:
            if session.checkpoint.referenced_bytes > _COLLECT_BYTES:
                gc.collect()
            kept = session.close()
        self._stop_measuring()
        stats, peaks = self._stats(), self._meter.total.peaks
        if self._mode == "assign" and session is not None and not session.bytes_assigned:
            self._mode, self._mode_reason = "copy", "no parameter could be pages of the file"
        report = RestoreReport(
            path=str(self.path or self._trainer.ckpt_path),
            stage=self._stage,
            mode=self._mode,
            mode_reason=self._mode_reason,
            device=str(self._device),
            global_step=self._trainer.global_step if self._stage == "fit" else self._global_step,
            phases=tuple(self._meter.reports),
            total=PhaseReport("total", peaks.seconds, stats.bytes_read, stats.seconds, peaks),
            bytes_verified=stats.bytes_verified,
            bytes_assigned=session.bytes_assigned if session else 0,
            bytes_copied_ordinarily=session.bytes_copied_ordinarily if session else 0,
            match=self._weights.match if self._weights else self._match,
            bytes_kept=kept,
            staging_bytes=stats.staging_bytes,
            num_threads=stats.num_threads,
            rank=self._trainer.global_rank,
            world_size=self._trainer.world_size,
        )
        if self._companions is not None:
            maxima, ranks = reduce_maxima(report.figures(), list(MEMORY_FIGURES), report.rank, self._companions)
            report = replace(report, maxima=maxima, maxima_ranks=ranks)
            self._companions.leave()
        return report

    def abort(self) -> None:
        """Ends a restore that failed, or that was never requested.

        The file stays mapped as long as tensors in it exist: an exception may refer to them, and copying them out of
        the file could need memory that has just run out.
        """
        with ExitStack() as stack:
            if self._companions is not None:
                stack.callback(self._companions.leave)
            stack.callback(self._stop_measuring)
            if self._session is not None:
                stack.callback(self._session.close, detach=False)
            if self._checkpoint is not None:
                # Lightning (2.6) keeps the checkpoint of a failed restore, and so the mapping, until its next run.
                self._trainer._checkpoint_connector._loaded_checkpoint = {}
                self._checkpoint = None
            self._end_streaming()

    # --------------------------------------------------------------------------------------------------------------

    def _true_precision(self) -> torch.dtype | None:
        """The dtype to which the precision plugin converts the module, ``None`` if the plugin does anything else."""
        plugin = self._trainer.precision_plugin
        if isinstance(plugin, classes(*_TRUE_PRECISIONS)):
            return _TRUE_PRECISION_DTYPES.get(str(plugin.precision))
        return None

    def _optimizer_bytes(self) -> dict[torch.device, int]:
        if self._stage != "fit" or self._session is None or not isinstance(self._checkpoint, dict):
            return {}
        return {self._device: mapped_bytes(self._checkpoint.get("optimizer_states"), self._session)}

    def _make_bar(self, mapped: MappedCheckpoint) -> RestoreBar | None:
        shown = self._trainer.progress_bar_callback
        is_shown = shown is not None and not getattr(shown, "is_disabled", False)
        if self._options.progress_bar and is_shown and self._trainer.is_global_zero:
            return RestoreBar(mapped, self._stage)
        return None

    def _begin_phase(self, name: str) -> None:
        self._meter.begin(name, self._stats())

    def _stop_measuring(self) -> None:
        self._meter.stop(self._stats())

    def _stats(self) -> TransferStats:
        return self._session.stats if self._session is not None else TransferStats()

    def _end_streaming(self) -> None:
        if self._collects:
            gc.enable()
            self._collects = False
        # If one of these calls is interrupted, the others are still made. They run in reverse order.
        with ExitStack() as stack:
            if self._bar is not None:
                stack.callback(self._bar.close)
            if self._optimizers is not None:
                stack.callback(self._optimizers.remove)
            stack.callback(self.end_weights)
            if self._ring is not None:
                stack.callback(self._ring.close)
        self._optimizers = None
        self._bar = None
