"""The phases of one restore. Each phase is complete: it has no field that another phase fills in.

``Waiting -> Opening -> Weights -> Optimizers``, and ``Loaded`` in place of the last two for ``weights_from``. ``Done``
and ``Failed`` are the two ends of each path. A phase from ``Opening`` on owns an ``ExitStack`` of all that it holds,
and hands it to the next phase. If that step fails, the stack is unwound at once. A phase ends in one of two ways:

* ``finish`` releases the stack. Tensors of the checkpoint that other objects still refer to become ordinary memory.
* ``abort`` releases the stack. The file stays mapped as long as tensors in it exist: an exception may refer to them,
  and copying them out of the file could need memory that has just run out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from lightning_memload.plugins.mode import ChosenMode
from lightning_memload.plugins.request import Request
from lightning_memload.plugins.seams import (
    after_optimizers_load,
    forget_loaded_checkpoint,
    keep_strategy_on_device,
    loads_optimizers_as_stock,
    within_optimizers_load,
)
from lightning_memload.report import RestoreReport
from lightning_memload.restore import (
    OptimizerRestore,
    Overlap,
    RestoreSession,
    StateStream,
    WeightsMatch,
    WeightsRestore,
    module_keys,
    rename_compiled,
    short_errors,
)
from lightning_memload.storage import FileSet
from lightning_memload.transfer import TransferStats

if TYPE_CHECKING:
    from lightning.pytorch.strategies import Strategy

__all__ = [
    "Done",
    "Failed",
    "Loaded",
    "Measured",
    "Opened",
    "Optimizers",
    "Outcome",
    "Overlapping",
    "Phase",
    "Waiting",
    "Weights",
]

_ADVICE = (
    "Build the module with the hyperparameters that it was saved with. To load only a part of the weights, or to load "
    "them under other names, use MemoryEfficientRestore(weights_from=WeightsSource(...)) instead of ckpt_path."
)
_ONLY_MEASURED = ChosenMode("default", "not loaded by StreamingCheckpointIO, only measured")


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of a restore, for its report.

    Attributes:
        path: The checkpoint.
        mode: How its weights were restored.
        stats: The figures of the streaming.
        global_step: The step of the checkpoint, ``None`` if it has none.
        match: How the names of its weights match those of the module, ``None`` if all match.
        bytes_assigned: See ``RestoreReport``.
        bytes_copied_ordinarily: See ``RestoreReport``.
        bytes_kept: See ``RestoreReport``.
        first_step: The step in which training began, ``None`` if the restore ended before.
        waited_seconds: See ``RestoreReport``.
    """

    path: str
    mode: ChosenMode = _ONLY_MEASURED
    stats: TransferStats = field(default_factory=TransferStats)
    global_step: int | None = None
    match: WeightsMatch | None = None
    bytes_assigned: int = 0
    bytes_copied_ordinarily: int = 0
    bytes_kept: int = 0
    first_step: int | None = None
    waited_seconds: float | None = None


class Phase:
    """A phase that has no checkpoint and owns nothing."""

    @property
    def path(self) -> str | None:
        """The checkpoint that is restored, ``None`` if there is none."""
        return None

    @property
    def stats(self) -> TransferStats:
        """The figures of the streaming since the beginning of the restore."""
        return TransferStats()

    def finish(self) -> Outcome | None:
        """Ends the phase after success. Returns ``None`` if nothing was restored."""
        return None

    def abort(self) -> None:
        """Ends the phase after a failure, also after a :meth:`finish` that failed. A second call does nothing."""


class Waiting(Phase):
    """Nothing has been loaded."""


@dataclass(frozen=True)
class Measured(Phase):
    """Another CheckpointIO, or the strategy, loads the checkpoint: the restore is only measured."""

    request: Request

    def finish(self) -> Outcome | None:
        """Ends the phase. Returns ``None`` if the Trainer has no checkpoint."""
        path = self.request.trainer.ckpt_path
        return Outcome(str(path)) if path else None


@dataclass(frozen=True)
class Done(Phase):
    """The restore has ended.

    Attributes:
        report: Its figures.
        exposed_files: Files whose pages are parameters now, and which Linux does not watch for changes. ``None`` if
            there are none.
    """

    report: RestoreReport
    exposed_files: FileSet | None


class Failed(Phase):
    """The restore has failed, or there was none."""


@dataclass(frozen=True, slots=True)
class Opened:
    """An open checkpoint, as the phases after :class:`Opening` know it.

    Attributes:
        request: The restore.
        path: The checkpoint.
        session: Streams from it.
        mode: How the weights are restored.
        global_step: See :class:`Outcome`.
        until_training: What ends when training starts, even if states have not arrived: the pause of the collector,
            and the bar.
    """

    request: Request
    path: str
    session: RestoreSession
    mode: ChosenMode
    global_step: int | None
    until_training: ExitStack = field(default_factory=ExitStack)


class _Streaming(Phase):
    """The checkpoint is open. Owns the mapping, the ring, the paused collector, the bar and the hooks that stream."""

    def __init__(self, opened: Opened, resources: ExitStack) -> None:
        self._opened = opened
        self._session = opened.session
        self._resources = resources

    @property
    def path(self) -> str:
        return self._opened.path

    @property
    def stats(self) -> TransferStats:
        return self._session.stats

    def abort(self) -> None:
        with ExitStack() as stack:
            # The stack may be empty because its release was interrupted.
            stack.callback(self._session.close, detach=False)
            self._resources.close()

    def _finish(self, match: WeightsMatch | None, kept: int = 0) -> Outcome:
        # This removes the hooks, which refer to tensors of the checkpoint. The file stays mapped.
        self._resources.close()
        session, mode = self._session, self._opened.mode
        kept += session.release()
        if mode.name == "assign" and not session.bytes_assigned:
            mode = ChosenMode("copy", "no parameter could be pages of the file")
        return Outcome(
            self.path,
            mode,
            session.stats,
            self._opened.global_step,
            match,
            session.bytes_assigned,
            session.bytes_copied_ordinarily,
            kept,
        )


class Weights(_Streaming):
    """The values of the weights go from the file into the module, while Lightning loads them.

    Args:
        opened: The open checkpoint.
        resources: All that the phase owns.
        checkpoint: The loaded checkpoint.
        weights: The hooks in the module.
    """

    def __init__(
        self, opened: Opened, resources: ExitStack, checkpoint: dict[str, Any], weights: WeightsRestore
    ) -> None:
        super().__init__(opened, resources)
        self._checkpoint = checkpoint
        self._weights = weights
        self._states: StateStream | None = None

    def load_model(self, load: Callable[..., None], checkpoint: Mapping[str, Any], strict: bool) -> None:
        """Loads the weights as Lightning does. If they do not fit, a short error replaces torch's long one.

        The states of the optimizers follow in the background.

        Args:
            load: Lightning's method.
            checkpoint: The checkpoint that Lightning passes to it.
            strict: Whether names must match.

        Raises:
            IncompatibleWeightsError: The weights do not fit the module. It is a ``RuntimeError``, as in torch.
        """
        with self._session.shared_phase():
            self._load_model(load, checkpoint, strict)
        request, is_shared = self._opened.request, self._session.is_shared  # Another thread cannot share.
        if (
            request.stage != "fit"
            or is_shared
            or self._states
            or not request.trainer.strategy.lightning_restore_optimizer
        ):
            return
        self._states = StateStream.begin(
            self._session, checkpoint.get("optimizer_states"), request.dtypes_of_parameters()
        )
        if self._states is not None:
            self._resources.callback(self._states.close)
            request.meter.begin("optimizers", self.stats)

    def _load_model(self, load: Callable[..., None], checkpoint: Mapping[str, Any], strict: bool) -> None:
        module, state_dict = self._opened.request.module, checkpoint.get("state_dict")
        if not isinstance(state_dict, Mapping):
            load(checkpoint, strict=strict)
            return
        named = dict(state_dict)
        rename_compiled(named, module_keys(module))  # Loading renames them in the same way.
        match = (lambda: self._weights.match) if strict else (lambda: None)
        with short_errors(module, named, strict=strict, path=self.path, advice=_ADVICE, match=match):
            load(checkpoint, strict=strict)

    def end_streaming(self) -> None:
        """Removes the hooks from the module, once its values are loaded. A second call does nothing."""
        self._weights.remove()

    def begin_optimizers(self, optimizers: Sequence[Any]) -> Optimizers:
        """Installs the streaming into the optimizers."""
        request = self._opened.request
        if self._states is None:
            request.meter.begin("optimizers", self.stats)
        parameters = dict(request.module.named_parameters(remove_duplicate=False))
        session, states, strategy = self._session, self._states, request.trainer.strategy
        with self._resources.pop_all() as stack:
            overlap = None
            if session.is_shared:
                stack.callback(within_optimizers_load(strategy, session.shared_phase))
            elif request.options.overlaps and loads_optimizers_as_stock(strategy):
                overlap = Overlap(session, states, optimizers)
                stack.callback(_end_overlap, overlap, strategy)
                stack.callback(after_optimizers_load(strategy, overlap.guard))
            restore = OptimizerRestore(
                optimizers,
                session,
                parameters=parameters,
                loaded=self._checkpoint,
                stream=states,
                overlap=overlap,
            )
            stack.callback(restore.remove)
            self._opened.until_training.callback(restore.remove)
            self._opened.until_training.callback(self.end_streaming)
            return Optimizers(self._opened, stack.pop_all(), self._weights.match, overlap)

    def finish(self) -> Outcome:
        """Ends the phase of an evaluation."""
        self._checkpoint = {}
        return self._finish(self._weights.match)

    def abort(self) -> None:
        """Ends the phase after a failure."""
        self._checkpoint = {}
        super().abort()


class _AfterWeights(_Streaming):
    """The weights are in the module.

    Args:
        opened: The open checkpoint.
        resources: All that the phase owns.
        match: See :class:`Outcome`.
    """

    def __init__(self, opened: Opened, resources: ExitStack, match: WeightsMatch | None) -> None:
        super().__init__(opened, resources)
        self._match = match

    def finish(self) -> Outcome:
        return self._finish(self._match)


class Optimizers(_AfterWeights):
    """The states of the optimizers go from the file to their device, while Lightning loads them.

    Args:
        opened: The open checkpoint.
        resources: All that the phase owns.
        match: See :class:`Outcome`.
        overlap: The states that may arrive after the start of the training, ``None`` if none may.
    """

    def __init__(
        self, opened: Opened, resources: ExitStack, match: WeightsMatch | None, overlap: Overlap | None
    ) -> None:
        super().__init__(opened, resources, match)
        self._overlap = overlap

    def begin_overlap(self) -> Overlapping | None:
        """Begins the training before all states have arrived. ``None``: there is nothing to wait for."""
        overlap = self._overlap
        if overlap is None or not overlap.is_needed:
            return None
        with self._resources.pop_all() as stack:
            self._opened.until_training.close()
            forget_loaded_checkpoint(self._opened.request.trainer)
            self._opened.request.meter.begin_beside("overlap", self.stats)
            overlap.begin()
            return Overlapping(self._opened, stack.pop_all(), self._match, overlap)


class Overlapping(_AfterWeights):
    """Training has begun, and states of the optimizers are on their way.

    Args:
        opened: The open checkpoint.
        resources: All that the phase owns.
        match: See :class:`Outcome`.
        overlap: The states.
    """

    def __init__(self, opened: Opened, resources: ExitStack, match: WeightsMatch | None, overlap: Overlap) -> None:
        super().__init__(opened, resources, match)
        self._overlap = overlap
        self._first_step = opened.request.trainer.global_step

    @property
    def has_arrived(self) -> bool:
        """Whether all states have arrived, and a step was made with them on every rank."""
        return not self._overlap.is_needed and self._opened.request.trainer.global_step != self._first_step

    def finish(self) -> Outcome:
        """Waits for the states and ends the phase."""
        self._overlap.wait()
        outcome = self._finish(self._match, self._overlap.bytes_kept)
        return replace(outcome, first_step=self._first_step, waited_seconds=self._overlap.waited_seconds)


class Loaded(_AfterWeights):
    """The weights of ``weights_from`` are in the module. Nothing more is streamed or measured."""


def _end_overlap(overlap: Overlap, strategy: Strategy) -> None:
    """Waits for states. If some are missing, every look at them raises, so Lightning's teardown must not move them."""
    overlap.abandon()
    if overlap.has_failed:
        keep_strategy_on_device(strategy)
