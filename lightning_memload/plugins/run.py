"""One restore inside one Trainer run: from the request to load the checkpoint to the start of training or evaluation.

The run listens to the CheckpointIO, lends torch's ``load_state_dict`` our streaming while it lasts, and measures each
phase. It ends in exactly one of :meth:`RestoreRun.finish` and :meth:`RestoreRun.abort`, both of which remove every hook
and let go of the file.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from tqdm.auto import tqdm

from lightning_memload.checkpoint import FileSet, MappedCheckpoint, SafeGlobal
from lightning_memload.distributed import Companions
from lightning_memload.errors import CheckpointFormatError
from lightning_memload.memory import MemoryMonitor
from lightning_memload.plugins.checkpoint_io import Allowance
from lightning_memload.plugins.compat import classes
from lightning_memload.plugins.damaged import choose_intact
from lightning_memload.plugins.parts import hooks_load, leave_out_refused, take_parts
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
    meta_names,
    module_keys,
    refused_by_torch,
    rename_compiled,
    require_match,
)
from lightning_memload.transfer import LazyRing, TransferStats, start_ring

if TYPE_CHECKING:
    import lightning.pytorch as pl

__all__ = ["Mode", "RestoreOptions", "RestoreRun"]

Mode = Literal["auto", "assign", "copy"]

# Restores shorter than this show no bar.
_BAR_DELAY_SECONDS = 1.0
_TRUE_PRECISIONS = (
    "lightning.pytorch.plugins.precision.HalfPrecision",
    "lightning.pytorch.plugins.precision.DoublePrecision",
)
_TRUE_PRECISION_DTYPES = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}
_ADVICE = (
    "Build the module with the hyperparameters that it was saved with. To take a part of the weights, or to take them "
    "under other names, use MemoryEfficientRestore(weights_from=WeightsSource(...)) in place of ckpt_path."
)
# Worth a garbage collection before it is copied out of the file for good.
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
        options: How.
        trainer: The Trainer.
        pl_module: Its module.
        stage: What the run is for, as Lightning names it.
        streams: Whether the checkpoint comes through our CheckpointIO. If not, the run only measures, from now on.
    """

    def __init__(
        self, options: RestoreOptions, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str, *, streams: bool
    ) -> None:
        self._options = options
        self._trainer = trainer
        self._module = pl_module
        # Lightning passes an enum whose str() is its Python name.
        self._stage = str(getattr(stage, "value", stage))
        self._device = trainer.strategy.root_device
        self.path: str | None = None
        self._global_step: int | None = None
        self._mode, self._mode_reason = "default", "another way of loading, only measured"
        self._checkpoint: Any = None
        self._session: RestoreSession | None = None
        self._weights: WeightsRestore | None = None
        self._optimizers: OptimizerRestore | None = None
        self._bar: tqdm[Any] | None = None
        self._total = MemoryMonitor(self._device)
        self._phases: list[PhaseReport] = []
        self._phase: tuple[str, MemoryMonitor] | None = None
        self._counted = TransferStats()
        self._ring: LazyRing | None = None
        self._collects = False
        self._chooses = options.replaces_damaged and streams and all_ranks_load(trainer.strategy)
        self._companions = Companions.announce(agrees=self._chooses) if trainer.world_size > 1 else None
        # Files whose pages became parameters and that nothing watches.
        self.exposed_files: FileSet | None = None
        self._match: WeightsMatch | None = None
        if not streams:
            self._total.start()

    def meet_companions(self) -> None:
        """Counts the ranks that take part in this restore. All of them have announced themselves."""
        if self._companions is not None:
            self._companions.meet()

    # What the CheckpointIO tells us ---------------------------------------------------------------------------------

    def on_load_start(self, path: str) -> str:
        """Starts the clock, and chooses another checkpoint if this one is damaged and that is wanted."""
        if self.path is not None or path != str(self._trainer.ckpt_path):
            return path  # a user's hook loads another checkpoint by itself
        self._begin(path)
        if self._options.replaces_damaged:
            self.path = None  # Until one is chosen: an error of the choice says all that is to be said.
            self.path = self._choose(path)
        return self.path or path

    def on_no_load(self) -> None:
        """Tells ranks that choose another checkpoint for all that this one restores none, unless it did."""
        if self._chooses and self._companions is not None and self._companions.can_agree:
            self._choose(None)

    def _choose(self, path: str | None) -> str | None:
        self._chooses = False
        return choose_intact(path, self._trainer, self._companions)

    def allowance(self, path: str) -> Allowance:
        """What is refused is left out where weights alone are restored, and no hook of a user sees the rest."""
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
        self._total.start()
        self._begin_phase("open")
        # Thousands of small objects that all live on make the collector walk the whole heap, several times 0.2 to
        # 0.4 s, and find nothing.
        self._collects = gc.isenabled()
        gc.disable()
        self._ring = start_ring(
            self._device, self._options.host_budget_bytes, self._options.num_threads, self._trainer.num_devices
        )

    def on_load_end(self, path: str, checkpoint: Any, mapped: MappedCheckpoint | None) -> bool:
        """Installs the streaming under the module. The end of the run lets go of the file."""
        if self.path != path or self._session is not None:
            return False
        self._begin_phase("weights")
        warn_of_hyperparameters(path, checkpoint, self._module)
        refusal = mapped.refusal if mapped is not None else None
        if refusal is not None:
            leave_out_refused(checkpoint, refusal, self._trainer)
        try:
            take_parts(checkpoint, self._options.parts, path=path, trainer=self._trainer, module=self._module)
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
            self._mode, self._mode_reason = "default", "loaded the ordinary way"
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
        session = self._session = RestoreSession(
            mapped,
            device=self._device,
            ring=self._ring,
            verify=self._options.verify,
            check_fit=self._options.check_fit,
            # Where several ranks of one host read the same file, one would throw away what the others need.
            drop_behind=self._trainer.num_devices == 1,
            verify_pages=self._options.verify,
            on_progress=self._make_bar(mapped),
            on_pinned=lambda nbytes: self._total.tick(pinned_bytes=nbytes),
        )
        self._mode, self._mode_reason = self._choose_mode(session)
        if self._mode == "assign":
            session.keep_cached()
        return session

    def load_model(self, load: Callable[..., None], checkpoint: Mapping[str, Any], strict: bool) -> None:
        """Loads the weights as Lightning does. If they do not fit, a short error takes the place of torch's long one.

        Args:
            load: Lightning's way.
            checkpoint: What it takes them from.
            strict: Whether names must match.

        Raises:
            IncompatibleWeightsError: They do not fit. A ``RuntimeError``, as torch raises.
        """
        state_dict = checkpoint.get("state_dict")
        if self._weights is None or self.path is None or not isinstance(state_dict, Mapping):
            load(checkpoint, strict=strict)
            return
        named = dict(state_dict)
        rename_compiled(named, module_keys(self._module))  # as the load itself is going to
        require_match(self._module, named, strict=strict, path=self.path, advice=_ADVICE)
        try:
            load(checkpoint, strict=strict)
        except RuntimeError as error:
            match = self._weights.match if strict else None
            refused = refused_by_torch(self._module, error, match, path=self.path, advice=_ADVICE)
            if refused is None:
                raise
            raise refused from error

    # What the Callback tells us -------------------------------------------------------------------------------------

    def end_weights(self) -> None:
        """Removes the streaming from under the module, whose values are there."""
        if self._weights is not None:
            self._weights.remove()

    def begin_optimizers(self, optimizers: Sequence[Any]) -> None:
        """Installs the streaming under the optimizers."""
        if self._phase is None:
            return
        self._begin_phase("optimizers")
        if self._session is None:
            return
        parameters = dict(self._module.named_parameters(remove_duplicate=False))
        self._optimizers = OptimizerRestore(optimizers, self._session, parameters=parameters, loaded=self._checkpoint)

    def finish(self) -> RestoreReport | None:
        """Ends the restore.

        With several processes it waits some seconds at most for the figures of the other ranks that take part.

        Returns:
            The report, ``None`` if nothing was restored.
        """
        restored = self.path is not None or (self._total.is_running and self._trainer.ckpt_path)
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
        stats = session.stats if session is not None else TransferStats()
        if self._mode == "assign" and session is not None and not session.bytes_assigned:
            self._mode, self._mode_reason = "copy", "no parameter could be the file's pages"
        report = RestoreReport(
            path=str(self.path or self._trainer.ckpt_path),
            stage=self._stage,
            mode=self._mode,
            mode_reason=self._mode_reason,
            device=str(self._device),
            global_step=self._trainer.global_step if self._stage == "fit" else self._global_step,
            phases=tuple(self._phases),
            total=PhaseReport("total", self._total.peaks.seconds, stats.bytes_read, stats.seconds, self._total.peaks),
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
        """Ends a restore that failed or was never asked for.

        The mapping is left to the tensors on top of it: an exception still refers to them, and copying them out now
        could take the memory that just ran out.
        """
        with ExitStack() as stack:
            if self._companions is not None:
                stack.callback(self._companions.leave)
            stack.callback(self._stop_measuring)
            if self._session is not None:
                stack.callback(self._session.close, detach=False)
            if self._checkpoint is not None:
                # Lightning (2.6) keeps the checkpoint of a failed restore until its next run, and with it the mapping.
                self._trainer._checkpoint_connector._loaded_checkpoint = {}
                self._checkpoint = None
            self._end_streaming()

    # --------------------------------------------------------------------------------------------------------------

    def _choose_mode(self, session: RestoreSession) -> tuple[Mode, str]:
        wanted = self._options.mode
        on_cpu = self._device.type == "cpu"
        if on_cpu and session.checkpoint.is_chunked:
            if wanted == "assign":
                rank_zero_warn(
                    "MemoryEfficientRestore(mode='assign') needs tensors that lie in a file as they are, and "
                    f"{self.path} holds them in parts. The weights are copied."
                )
            return "copy", "the checkpoint holds its tensors in parts"
        if wanted == "assign" and not on_cpu:
            rank_zero_warn(
                f"MemoryEfficientRestore(mode='assign') needs a CPU target: parameters on {self._device} cannot be a "
                "file's pages. The weights are copied."
            )
            return "copy", f"parameters live on {self._device}"
        if wanted == "assign":
            refusal = session.watch_pages()
            if refusal is None:
                return wanted, "as configured"
            self.exposed_files = session.checkpoint.source
            return wanted, f"as configured, but nothing tells when the file is changed in place: {refusal}"
        if wanted == "copy":
            return wanted, "as configured"
        if not on_cpu:
            return "copy", f"parameters live on {self._device}"
        if self._stage == "fit":
            return "copy", "training writes to the weights"
        if not meta_names(self._module)[0]:
            return "copy", "the parameters have memory"
        refusal = session.watch_pages()
        if refusal is not None:
            return "copy", f"nothing would tell when the file is changed in place: {refusal}"
        return "assign", "evaluation on the CPU only reads the weights"

    def _true_precision(self) -> torch.dtype | None:
        """The dtype that the precision plugin is going to convert the module to, if converting is all that it does."""
        plugin = self._trainer.precision_plugin
        if isinstance(plugin, classes(*_TRUE_PRECISIONS)):
            return _TRUE_PRECISION_DTYPES.get(str(plugin.precision))
        return None

    def _optimizer_bytes(self) -> dict[torch.device, int]:
        if self._stage != "fit" or self._session is None or not isinstance(self._checkpoint, dict):
            return {}
        return {self._device: mapped_bytes(self._checkpoint.get("optimizer_states"), self._session)}

    def _make_bar(self, mapped: MappedCheckpoint) -> Any:
        shown = self._trainer.progress_bar_callback
        if (
            not self._options.progress_bar
            or shown is None
            or getattr(shown, "is_disabled", False)
            or not self._trainer.is_global_zero
        ):
            return None
        parts = ("state_dict", "optimizer_states") if self._stage == "fit" else ("state_dict",)
        # A file of weights alone has no such parts.
        restored = [tensor for tensor in mapped.index if tensor.path[0] in parts] or mapped.index
        storages = {storage.key: storage.nbytes for tensor in restored for storage in tensor.storages}
        bar = self._bar = tqdm(
            desc="Restoring checkpoint",
            total=sum(storages.values()),
            unit="B",
            unit_scale=True,
            unit_divisor=1024,
            delay=_BAR_DELAY_SECONDS,
            leave=False,
            dynamic_ncols=True,
        )
        # What lies between two records is read as well, and tqdm draws no bar beyond its total.
        return lambda nbytes: bar.update(min(nbytes, bar.total - bar.n))

    def _begin_phase(self, name: str) -> None:
        self._end_phase()
        monitor = MemoryMonitor(self._device)
        monitor.start()
        self._phase = (name, monitor)

    def _end_phase(self) -> None:
        if self._phase is None:
            return
        name, monitor = self._phase
        self._phase = None
        monitor.stop()
        stats = self._session.stats if self._session is not None else TransferStats()
        self._phases.append(
            PhaseReport(
                name,
                monitor.peaks.seconds,
                stats.bytes_read - self._counted.bytes_read,
                stats.seconds - self._counted.seconds,
                monitor.peaks,
            )
        )
        self._counted = stats

    def _stop_measuring(self) -> None:
        self._end_phase()
        if self._total.is_running:
            self._total.stop()

    def _end_streaming(self) -> None:
        if self._collects:
            gc.enable()
            self._collects = False
        # If one of them is interrupted the others end all the same. The last one comes first.
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
