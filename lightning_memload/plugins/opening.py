"""The first phase of a restore that reads: opens the checkpoint, for ``ckpt_path`` and for ``weights_from``."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch

from lightning_memload.checkpoint import MappedCheckpoint
from lightning_memload.collector import paused_collector
from lightning_memload.plugins.mode import ChosenMode, choose_mode
from lightning_memload.plugins.parts import keep_parts
from lightning_memload.plugins.phases import Loaded, Opened, Outcome, Phase, Weights
from lightning_memload.plugins.progress import RestoreBar
from lightning_memload.plugins.reading import ReadingChoice
from lightning_memload.plugins.request import Request
from lightning_memload.plugins.seams import forget_loaded_checkpoint
from lightning_memload.plugins.telling import warn_of_hyperparameters
from lightning_memload.restore import RestoreSession, WeightsRestore, WeightsSource, add_compiled_versions, mapped_bytes
from lightning_memload.transfer import start_ring

__all__ = ["Opening"]


class Opening(Phase):
    """The checkpoint is being opened. Owns the paused garbage collector, and the ring, which is made in the background.

    Args:
        request: The restore.
        find: Returns the path of the checkpoint. Called when the ring is being made.
        is_remote: Whether the checkpoint is not on a local disk.
    """

    def __init__(self, request: Request, find: Callable[[], str], *, is_remote: bool = False) -> None:
        self._request = request
        request.meter.start()
        request.meter.begin("open", self.stats)
        options, trainer = request.options, request.trainer
        with ExitStack() as stack:
            # A checkpoint creates thousands of small long-lived objects. Each of several collections would scan the
            # whole heap for 0.2 to 0.4 s and find no garbage.
            self._until_training = stack.enter_context(ExitStack())
            self._until_training.enter_context(paused_collector())
            self._ring = start_ring(
                request.device,
                options.host_budget_bytes,
                options.num_threads,
                trainer.num_devices,
                is_remote=is_remote,
            )
            stack.callback(self._ring.close)
            self._path = find()
            self._resources = stack.pop_all()

    @property
    def path(self) -> str:
        """The checkpoint."""
        return self._path

    def begin_weights(self, checkpoint: Any, mapped: MappedCheckpoint | None, reading: ReadingChoice) -> Weights:
        """Reduces a loaded checkpoint to what is restored, and installs the streaming into the module.

        Args:
            checkpoint: The loaded checkpoint. It is changed in place.
            mapped: Its mapping, ``None`` if Lightning's own plugin loaded it.
            reading: Chooses whether the ranks share what they read.

        Raises:
            CheckpointFormatError: It is not a checkpoint, or a part to restore is missing.
            UnsafeGlobalsError: ``weights_only`` refused objects that are needed.
            MemloadError: Ranks that share what they read have different checkpoints, or another rank has failed.
        """
        request = self._request
        request.meter.begin("weights", self.stats)
        with self._resources.pop_all() as stack:
            self._reduce(checkpoint, mapped)
            stack.callback(forget_loaded_checkpoint, request.trainer)
            session, mode = self._open_session(mapped or MappedCheckpoint.unmapped(self._path), stack)
            if mapped is None:
                mode = ChosenMode("default", "loaded by torch.load")
            options = request.options
            obstacle = f"mode {mode.name} ({mode.reason})" if mode.name != "copy" else None
            reading.choose(session, options.host_budget_bytes, obstacle, overlaps=options.overlaps)
            step = checkpoint.get("global_step")
            weights = WeightsRestore(
                request.module,
                session,
                dtype=request.true_precision(),
                assign=mode.name == "assign",
                keep_memory=request.options.mode == "auto",
                strict=request.module.strict_loading,
                later_bytes=partial(_optimizer_bytes, request, checkpoint, session),
            )
            stack.callback(weights.remove)
            step = step if isinstance(step, int) else None
            opened = Opened(request, self._path, session, mode, step, self._until_training)
            return Weights(opened, stack.pop_all(), checkpoint, weights)

    def load(self, source: WeightsSource) -> Loaded:
        """Streams the weights of a checkpoint into the module, without a resume.

        Raises:
            MemloadError: As ``WeightsSource`` does.
        """
        request = self._request
        with self._resources.pop_all() as stack:
            state_dict, mapped = source.open()
            request.meter.begin("weights", self.stats)
            session, mode = self._open_session(mapped, stack)
            assign = mode.name == "assign"
            _, match = source.stream(state_dict, request.module, session, dtype=request.true_precision(), assign=assign)
            request.meter.stop(session.stats)
            return Loaded(Opened(request, self._path, session, mode, None), stack.pop_all(), match)

    def _reduce(self, checkpoint: Any, mapped: MappedCheckpoint | None) -> None:
        module, refusal = self._request.module, mapped.refusal if mapped is not None else None
        warn_of_hyperparameters(self._path, checkpoint, module)
        parts, trainer = self._request.options.parts, self._request.trainer
        keep_parts(checkpoint, parts, refusal, path=self._path, trainer=trainer, module=module)
        paths = [name for name, _ in module.named_modules(remove_duplicate=False)]
        add_compiled_versions(checkpoint.get("state_dict"), paths)

    def _open_session(self, mapped: MappedCheckpoint, stack: ExitStack) -> tuple[RestoreSession, ChosenMode]:
        request, options = self._request, self._request.options
        bar = self._open_bar(mapped)
        # If several ranks of one host read the same file, one would drop cached pages that the others need.
        drop_behind = request.trainer.num_devices == 1
        on_progress = bar.advance if bar is not None else None
        session = self._make_session(mapped, stack, on_progress=on_progress, drop_behind=drop_behind)
        mode = choose_mode(
            options.mode, session, path=self._path, device=request.device, stage=request.stage, module=request.module
        )
        if mode.name == "assign":
            session.keep_cached()
        return session, mode

    def _open_bar(self, mapped: MappedCheckpoint, num_readers: int = 1) -> RestoreBar | None:
        bar = self._request.make_bar(mapped, num_readers)
        if bar is not None:
            self._until_training.callback(bar.close)
        return bar

    def _make_session(
        self,
        mapped: MappedCheckpoint,
        stack: ExitStack,
        *,
        on_progress: Callable[[int], None] | None,
        drop_behind: bool = False,
    ) -> RestoreSession:
        request, options = self._request, self._request.options
        session = RestoreSession(
            mapped,
            device=request.device,
            ring=self._ring,
            verify=options.verify,
            check_fit=options.check_fit,
            drop_behind=drop_behind,
            verify_pages=options.verify,
            on_progress=on_progress,
            on_pinned=lambda nbytes: request.meter.total.tick(pinned_bytes=nbytes),
        )
        stack.callback(session.close, detach=False)
        return session

    def finish(self) -> Outcome:
        """Ends the phase if the file could not be opened here and was loaded in another way."""
        self._resources.close()
        return Outcome(self._path)

    def abort(self) -> None:
        """Ends the phase after a failure."""
        self._resources.close()


def _optimizer_bytes(request: Request, checkpoint: dict[str, Any], session: RestoreSession) -> dict[torch.device, int]:
    """The memory that the states of the optimizers will take, for the check that a restore fits."""
    if request.stage != "fit":
        return {}
    return {request.device: mapped_bytes(checkpoint.get("optimizer_states"), session)}
