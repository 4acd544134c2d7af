"""The load of a checkpoint under ``ModelParallelStrategy``: each rank reads its own shards of weights and optimizers.

The ranks go on together: after each step they tell each other how it went, through :class:`Companions`. If a rank
cannot do it in this way, all of them call Lightning's own method, before anything is changed. If a rank fails, all of
them raise within seconds.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, TypeVar

from lightning_utilities.core.rank_zero import rank_zero_warn
from torch.optim import Optimizer

from lightning_memload.checkpoint import Checkpoint, MappedCheckpoint
from lightning_memload.distributed import Companions, LostCompanion
from lightning_memload.distributed.told_errors import describe_error, rebuild_read_error
from lightning_memload.errors import (
    CheckpointFormatError,
    ChecksumError,
    MemloadError,
    UnmappableCheckpointError,
)
from lightning_memload.formats import load_mapped
from lightning_memload.pickles import allow_globals
from lightning_memload.plugins.mode import ChosenMode
from lightning_memload.plugins.opening import Opening
from lightning_memload.plugins.phases import Loaded, Measured, Opened, Phase
from lightning_memload.plugins.request import Request
from lightning_memload.plugins.seams import forget_loaded_checkpoint
from lightning_memload.restore import (
    RestoreSession,
    ShardedOptimizer,
    ShardReader,
    ShardTarget,
    Unshardable,
    plan_sharded_weights,
    run_load_hooks,
    show_shards,
)
from lightning_memload.storage.places import is_local
from lightning_memload.transfer import TransferStats

__all__ = ["ShardedLoad"]

_MODE = ChosenMode("copy", "each rank reads its own shards")
_T = TypeVar("_T")


class ShardedLoad(Opening):
    """Loads one checkpoint, see :class:`Opening`.

    Args:
        request: The restore.
        companions: The ranks of this restore. ``None`` if there is no way to reach them.
    """

    def __init__(self, request: Request, companions: Companions | None) -> None:
        self._companions = companions
        self._session: RestoreSession | None = None
        super().__init__(request, lambda: str(request.trainer.ckpt_path))

    def load_shards(
        self, stock: Callable[[str], dict[str, Any]], path: str, weights_only: bool | None
    ) -> tuple[dict[str, Any], Phase]:
        """Loads the weights and the states of the optimizers.

        Args:
            stock: Lightning's own method.
            path: The checkpoint.
            weights_only: As in ``torch.load``.

        Returns:
            The checkpoint without the weights, and the next phase.

        Raises:
            MemloadError: The checkpoint is damaged, or another rank has failed. Raised on all ranks.
            KeyError: A weight is missing. The message is Lightning's.
        """
        request = self._request
        try:
            if self._world_size > 1 and (self._companions is None or not self._companions.can_agree):
                raise Unshardable("not every rank has a MemoryEfficientRestore callback")
            with self._resources.pop_all() as stack:
                checkpoint, reader, weights, optimizers = self._plan(path, weights_only, stack)
                # From here on something is changed.
                self._read(reader, lambda: weights)
                self._together(lambda: self._run_hooks(checkpoint, weights), lambda _: None)
                request.meter.begin("optimizers", self.stats)
                self._read(reader, lambda: self._allocate(optimizers))
                self._together(lambda: _load_states(optimizers), lambda _: None)
                self._warn(reader)
                checkpoint.pop("state_dict", None)
                if self._opened_session.checkpoint.index.format == "dcp":
                    checkpoint.pop("optimizer_states", None)  # Lightning returns its meta.pt alone.
                step = checkpoint.get("global_step")
                step = step if isinstance(step, int) else None
                opened = Opened(request, self._path, self._opened_session, _MODE, step, self._until_training)
                return checkpoint, Loaded(opened, stack.pop_all(), None)
        except Unshardable as reason:
            return self._leave_to_stock(stock, path, str(reason).rstrip("."))

    # --------------------------------------------------------------------------------------------------------------

    def _plan(
        self, path: str, weights_only: bool | None, stack: ExitStack
    ) -> tuple[dict[str, Any], ShardReader, list[ShardTarget], list[ShardedOptimizer]]:
        """Opens the checkpoint and plans what is read, the same on all ranks.

        Raises:
            Unshardable: On all ranks, if one of them must load in another way.
        """
        request = self._request

        def plan() -> tuple[dict[str, Any], RestoreSession, list[ShardTarget], list[ShardedOptimizer], str]:
            checkpoint, mapped = self._open(path, weights_only)
            self._reduce(checkpoint, mapped)
            stack.callback(forget_loaded_checkpoint, request.trainer)
            session = self._open_shards(mapped, stack)
            request.meter.begin("weights", session.stats)
            weights, optimizers = self._plan_weights(checkpoint), self._plan_optimizers(checkpoint)
            return checkpoint, session, weights, optimizers, _digest(mapped.index, weights, optimizers)

        (checkpoint, session, weights, optimizers, own), digests = self._together(plan, lambda planned: planned[-1])
        if set(digests.values()) != {own}:
            raise Unshardable("the ranks have different files, modules or optimizers")
        self._session = session
        trainer = request.trainer
        return checkpoint, ShardReader(session, trainer.global_rank, trainer.world_size), weights, optimizers

    def _open(self, path: str, weights_only: bool | None) -> tuple[Any, MappedCheckpoint]:
        if not is_local(str(path)):
            raise Unshardable("it is not a local path")
        allowance = self._request.allowance()
        try:
            with allow_globals(allowance.safe_globals):
                checkpoint, mapped = load_mapped(path, weights_only=weights_only, erases=allowance.erases)
        except (UnmappableCheckpointError, FileNotFoundError) as reason:
            raise Unshardable(str(reason)) from reason
        except CheckpointFormatError as reason:
            if not os.path.exists(os.path.join(path, ".metadata")):
                raise
            # A distributed checkpoint. Each node may have the shards of its own ranks alone, which is enough for torch.
            raise Unshardable(str(reason)) from reason
        return checkpoint, mapped

    def _open_shards(self, mapped: MappedCheckpoint, stack: ExitStack) -> RestoreSession:
        companions, bar = self._companions, self._open_bar(mapped, self._world_size)

        def advance(nbytes: int) -> None:
            if companions is not None:
                companions.sign()
            if bar is not None:
                bar.advance(nbytes)

        return self._make_session(mapped, stack, on_progress=advance)

    def _plan_weights(self, checkpoint: Mapping[str, Any]) -> list[ShardTarget]:
        request, parts = self._request, self._request.options.parts
        if parts is not None and "weights" not in parts and request.stage == "fit":
            return []
        if not isinstance(checkpoint.get("state_dict"), Mapping):
            raise Unshardable("it has no weights")
        show_shards(request.module)
        return plan_sharded_weights(request.module, checkpoint["state_dict"], strict=request.module.strict_loading)

    def _plan_optimizers(self, checkpoint: Mapping[str, Any]) -> list[ShardedOptimizer]:
        request, parts = self._request, self._request.options.parts
        if parts is not None and "optimizer" not in parts and request.stage == "fit":
            return []
        optimizers, saved = request.trainer.strategy.optimizers, checkpoint.get("optimizer_states", [])
        if len(saved) < len(optimizers):
            raise Unshardable(f"it has the states of {len(saved)} optimizers, and there are {len(optimizers)}")
        plans = []
        for number, (optimizer, states) in enumerate(zip(optimizers, saved, strict=False)):
            name = f"optimizer_states[{number}]"
            if not isinstance(optimizer, Optimizer):
                raise Unshardable(f"{name} is for a {type(optimizer).__name__}")
            strict = request.module.strict_loading
            plans.append(ShardedOptimizer(optimizer, states, request.module, name=name, strict=strict))
        return plans

    def _run_hooks(self, checkpoint: Mapping[str, Any], weights: Sequence[ShardTarget]) -> None:
        if weights:
            run_load_hooks(self._request.module, checkpoint["state_dict"])

    def _allocate(self, optimizers: Sequence[ShardedOptimizer]) -> list[ShardTarget]:
        needed: dict[Any, int] = {}
        for optimizer in optimizers:
            for device, nbytes in optimizer.needed_bytes.items():
                needed[device] = needed.get(device, 0) + nbytes
        self._opened_session.require(needed)
        return [target for optimizer in optimizers for target in optimizer.allocate()]

    def _read(self, reader: ShardReader, targets: Callable[[], Sequence[ShardTarget]]) -> None:
        """Reads on all ranks, and compares the checksums together."""
        _, told = self._together(lambda: reader.read(targets()), lambda checksums: checksums)
        reader.compare(told)

    def _together(self, work: Callable[[], _T], message: Callable[[_T], Any]) -> tuple[_T, dict[int, Any]]:
        """Does the work of this rank, and waits for that of the others.

        Returns:
            What the work has returned, and the messages of all ranks about it.

        Raises:
            Unshardable: On all ranks, if one of them has raised it.
            MemloadError: Another rank has failed.
            Exception: The error of the work of this rank.
        """
        failure: Exception | None = None
        try:
            result = work()
            told = {"done": message(result)}
        except Unshardable as reason:
            told = {"refusal": str(reason)}
        except Exception as error:
            failure, told = error, {"failure": describe_error(error)}
        rank, world_size = self._request.trainer.global_rank, self._world_size
        try:
            heard = self._companions.agree(told) if self._companions is not None else {rank: told}
        except LostCompanion as lost:
            if failure is not None:
                raise failure from lost
            raise MemloadError(f"The restore of {self._path} ended on rank {rank} of {world_size}: {lost}.") from lost
        if failure is not None:
            if len(failure.args) > 0 and isinstance(failure, MemloadError):
                failure.args = (f"{failure.args[0]} Found by rank {rank} of {world_size}.", *failure.args[1:])
            raise failure
        for other, words in heard.items():
            if "failure" in words:
                raise _error_of(words["failure"], f"Found by rank {other} of {world_size}.", self._path)
        refusals = [words["refusal"] for words in heard.values() if "refusal" in words]
        if refusals:
            raise Unshardable(refusals[0])
        return result, {other: words["done"] for other, words in heard.items()}

    def _leave_to_stock(
        self, stock: Callable[[str], dict[str, Any]], path: str, reason: str
    ) -> tuple[dict[str, Any], Phase]:
        request = self._request
        self._resources.close()
        ignored = " restore=... is ignored." if request.options.parts is not None else ""
        rank_zero_warn(
            f"{type(request.trainer.strategy).__name__} loads {path} itself, so MemoryEfficientRestore cannot limit "
            f"the memory of this restore: {reason}. It only measures and reports it.{ignored}"
        )
        request.meter.start()
        return stock(path), Measured(request)

    @property
    def _world_size(self) -> int:
        return self._request.trainer.world_size

    def _warn(self, reader: ShardReader) -> None:
        options = self._request.options
        asked = {
            "mode='assign'": options.mode == "assign",
            "overlap=True": options.overlaps,
            "on_corrupt='previous'": options.replaces_damaged,
        }
        for option, is_set in asked.items():
            if is_set:
                rank_zero_warn(f"MemoryEfficientRestore({option}) is ignored: each rank reads its own shards.")
        if reader.unverified_bytes:
            rank_zero_warn(f"{self._path}: the checksums of {reader.unverified_bytes} bytes were not compared.")

    @property
    def _opened_session(self) -> RestoreSession:
        assert self._session is not None
        return self._session

    @property
    def stats(self) -> TransferStats:
        """The figures of the streaming since the beginning of the restore."""
        return super().stats if self._session is None else self._session.stats


def _load_states(optimizers: Sequence[ShardedOptimizer]) -> None:
    for optimizer in optimizers:
        optimizer.load()


def _digest(index: Checkpoint, weights: Sequence[ShardTarget], optimizers: Sequence[ShardedOptimizer]) -> str:
    """What must be equal on all ranks: the contents of the file, as far as it records them, and the plan."""
    digest = hashlib.sha256()
    for file in index.files:
        digest.update(f"{file.nbytes} {file.start}\n".encode())
    for tensor in index:
        crc32s = [(storage.offset, storage.nbytes, storage.crc32) for storage in tensor.storages]
        digest.update(f"{tensor.name} {tensor.dtype} {tensor.shape} {tensor.stride} {crc32s}\n".encode())
    for target in weights:
        digest.update(f"{target.name} {target.layout}\n".encode())
    for optimizer in optimizers:
        digest.update("\n".join(optimizer.layout).encode())
    return digest.hexdigest()


def _error_of(told: Mapping[str, Any], where: str, path: str) -> Exception:
    """The error of another rank."""
    text, error = f"{told['message']} {where}", rebuild_read_error(told, where)
    if isinstance(error, ChecksumError):
        return error
    if told["kind"] == CheckpointFormatError.__name__:
        return CheckpointFormatError(text, path=path)
    if told["kind"] == KeyError.__name__:
        return KeyError(told["message"])
    return MemloadError(f"{told['kind']}: {text}")
