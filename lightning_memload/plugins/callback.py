"""The Callback that restores checkpoints at no more memory than training needs.

A thin adaptor: it installs the CheckpointIO, and passes Lightning's hooks to its two halves, ``TrainerRestore`` and
``TrainerSaves``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_memload.pickles import SafeGlobal, check_safe_globals
from lightning_memload.plugins.checkpoint_io import StreamingCheckpointIO
from lightning_memload.plugins.choices import Log, SnapshotSize, check_choice, check_snapshot, detail_of
from lightning_memload.plugins.compat import Callback
from lightning_memload.plugins.damaged import OnCorrupt
from lightning_memload.plugins.mode import Mode
from lightning_memload.plugins.parts import Part, check_parts
from lightning_memload.plugins.reading import Read
from lightning_memload.plugins.request import RestoreOptions
from lightning_memload.plugins.saving_io import Asynchronous, SaveFormat
from lightning_memload.plugins.seams import install_io, keep_strategy_on_device, reads_shards, require_one
from lightning_memload.plugins.telling import warn_of_ignored_options
from lightning_memload.plugins.trainer_restore import TrainerRestore
from lightning_memload.plugins.trainer_saves import TrainerSaves
from lightning_memload.report import RestoreReport
from lightning_memload.restore import WeightsSource
from lightning_memload.transfer import check_host_budget, check_num_threads

if TYPE_CHECKING:
    import lightning.pytorch as pl

__all__ = ["MemoryEfficientRestore"]

_MIB = 2**20


class MemoryEfficientRestore(Callback):
    """Restores checkpoints straight from the file onto the training device, with a hard limit on host memory.

    Works with every entry point that takes ``ckpt_path`` (``fit``, ``validate``, ``test``, ``predict``) and with an
    ordinary ``.ckpt``. The result is bit for bit the one of Lightning. Without a checkpoint the callback does nothing.

    A restore onto a GPU takes ``host_budget_mib`` of host memory for a model of any size. A restore onto the CPU takes
    the memory that training keeps: one copy of the optimizer states, and of weights that have no memory yet.

    Args:
        mode: ``"copy"`` streams every tensor into memory of its own. ``"assign"`` makes CPU parameters pages of the
            file, which the kernel can take back. The first write to a page makes it ordinary memory. Before another
            program changes the file in place, the parameters become ordinary memory with their present values, and a
            warning says so. Where Linux does not announce the change (network file systems, files of other users,
            directories of very many files), it is only detected afterwards, with a warning at the end of the stage or
            the start of the next one. Replacing the file by a new one is safe. ``"auto"`` assigns for evaluation on
            the CPU where Linux announces changes, and copies otherwise.
        host_budget_mib: The most host memory for staging, in MiB, per process. A hard limit. It also applies to saves
            if this callback installs the CheckpointIO.
        num_threads: Number of reading threads. ``None``: up to 12 for a GPU and 4 for the CPU, shared between the
            processes of a host.
        verify: Compare the weights and optimizer states that are read with the CRC-32 that the file records for them,
            before training or evaluation starts. No effect on formats without checksums. With ``False``, assigned
            weights are not read before their first use.
        check_fit: Compare needed and free memory of device and host before the first byte is read, and raise if the
            checkpoint does not fit.
        log: ``True`` or ``"summary"``: print a table with the time and memory of the restore, and log few figures as
            ``memload/...`` to every logger of the Trainer. Loggers that take pictures get memory over time of a restore
            of at least a second, if matplotlib is installed. ``"all"``: log all figures, and the picture of every
            restore. ``False``: silence.
        log_saves: The same for saves, which print a line and log ``memload/save_...``. Measuring a save takes about 20
            ms. ``None``: as ``log``.
        progress_bar: Show a bar for restores of more than a second, if the Trainer shows bars.
        restore: The parts of the checkpoint that ``fit`` restores: some of ``"weights"``, ``"optimizer"`` (with
            learning rate schedulers and the precision plugin's state), ``"loops"`` (epoch, step, progress) and
            ``"callbacks"``. Other parts are not read. ``None``: all, as Lightning does. ``["weights"]`` accepts any
            file of weights.
        weights_from: A checkpoint of any format that ``fit`` takes only the weights from, for finetuning: a path, or a
            :class:`WeightsSource`, which can also rename and exclude weights. Loaded once for each module. Ignored when
            ``ckpt_path`` is given, so one configuration starts a finetuning and resumes it.
        on_corrupt: What to do if the file of ``ckpt_path`` is damaged. ``"raise"``: the error names the newest intact
            checkpoint in the same directory. ``"previous"``: that checkpoint is restored instead, with a warning. The
            file is then read completely once more, to verify it before the restore. Every rank verifies its own file,
            and all ranks restore the same checkpoint or all raise. Pass it on every rank.
        keep_on_device: Leave the module and the optimizer states on their device when ``fit`` ends. Lightning moves
            them to host memory, which then needs as much memory as training took on the device.
        asynchronous_save: ``True``: a save returns when the checkpoint is written and has its name, without waiting for
            the disk. ``"until_step"``: in addition, tensors that only optimizer steps change are written in the
            background, and the next step waits for them. See ``StreamingCheckpointIO.save_checkpoint`` for the
            conditions. List this callback before callbacks that change weights when validation or training ends, so
            that it waits first. Neither copies the model.
        save_snapshot: ``"auto"``: a save of a ``ModelCheckpoint`` copies the whole state into free host memory, and is
            written from there. Training goes on after the copy, and any code may change any tensor. Until the
            checkpoint is written, its name stands for the checkpoint before it. Needs ``asynchronous_save``, which
            applies where the state does not fit into three quarters of the free memory, or where other code could read
            the checkpoint. A size in bytes or such as ``"8GiB"`` limits all snapshots together. See
            ``StreamingCheckpointIO.save_checkpoint``.
        save_format: ``"torch"``, ``"directory"`` or ``"safetensors+state"``, see ``StreamingCheckpointIO``. Applies if
            this callback installs the CheckpointIO.
        safe_globals: Classes and functions, or their dotted names, that ``weights_only`` allows when ``ckpt_path`` is
            loaded, as ``torch.serialization.safe_globals`` does. Evaluation and ``restore=["weights"]`` need none:
            refused objects outside the weights are then not loaded, unless a hook of yours receives the checkpoint.
        overlap: Begin training when the weights have arrived. The first optimizer step, and all other code that looks
            at ``optimizer.state`` earlier (``state_dict()``, a save, a hook), waits for the optimizer states. So does a
            fork, as data loader workers need. An error ends the run before the step. Applies to optimizers of
            ``torch.optim``. Until then the file must not change, and no CUDA graph can be captured. ``report`` is set
            after the first step.
        storage_options: Passed to ``StreamingCheckpointIO``, and used for ``weights_from``, see ``open_checkpoint``.
        read: How several processes read the checkpoint, if each of them loads it, as with ``ddp``. ``"each"``: each
            process reads all of it. ``"stripes"``: each reads a part, and they send the parts to each other through the
            default process group, in stripes that fit into ``host_budget_mib``, with as much memory for stripes on each
            GPU. Pass it on every rank. The processes must have the same checkpoint, or all raise. They read as with
            ``"each"`` if not all take part, do not load the same tensors, or have another backend than NCCL for GPUs
            and gloo for the CPU. If one process fails or is killed, all raise within seconds. ``overlap`` is then
            ignored. ``"auto"`` is ``"each"``: which one is faster depends on the links between the GPUs, and is not
            measured for enough of them. ``report.read`` and ``report.read_reason`` tell what was done.

    Attributes:
        report: The figures of the last restore, ``None`` before the first.

    Raises:
        ValueError: An argument is out of its range, a name in ``safe_globals`` cannot be imported, or (raised by
            ``fit`` and the other entry points) the Trainer has two of these callbacks.
        TypeError: ``safe_globals`` is not a list of classes or names, or an argument is not a number.

    Example:
        >>> trainer = L.Trainer(max_epochs=10, callbacks=[MemoryEfficientRestore()])
        >>> trainer.fit(model, ckpt_path="last.ckpt")
    """

    def __init__(
        self,
        mode: Mode = "auto",
        host_budget_mib: int = 128,
        num_threads: int | None = None,
        verify: bool = True,
        check_fit: bool = True,
        log: Log = True,
        progress_bar: bool = True,
        restore: Part | Collection[Part] | None = None,
        weights_from: str | Path | WeightsSource | None = None,
        on_corrupt: OnCorrupt = "raise",
        keep_on_device: bool = False,
        asynchronous_save: Asynchronous = False,
        save_snapshot: SnapshotSize = False,
        save_format: SaveFormat = "torch",
        safe_globals: Sequence[SafeGlobal] = (),
        overlap: bool = False,
        storage_options: Mapping[str, Any] | None = None,
        read: Read = "auto",
        log_saves: Log | None = None,
    ) -> None:
        super().__init__()
        check_choice("mode", mode, Mode)
        check_host_budget(host_budget_mib)
        check_num_threads(num_threads)
        check_choice("on_corrupt", on_corrupt, OnCorrupt)
        check_choice("read", read, Read)
        self._options = RestoreOptions(
            mode=mode,
            host_budget_bytes=host_budget_mib * _MIB,
            num_threads=num_threads,
            verify=verify,
            check_fit=check_fit,
            progress_bar=progress_bar,
            parts=check_parts(restore),
            replaces_damaged=on_corrupt == "previous",
            safe_globals=check_safe_globals(safe_globals),
            overlaps=overlap,
            read=read,
        )
        if weights_from is not None and not isinstance(weights_from, (str, Path, WeightsSource)):
            raise ValueError(f"weights_from must be a path or a WeightsSource, got {weights_from!r}.")
        source = weights_from
        if source is not None and not isinstance(source, WeightsSource):
            source = WeightsSource(source, storage_options=storage_options)
        self._storage_options = storage_options
        check_choice("save_format", save_format, SaveFormat)
        check_choice("asynchronous_save", asynchronous_save, Asynchronous)
        check_snapshot("save_snapshot", save_snapshot, "asynchronous_save", asynchronous_save)
        self._asynchronous_save: Asynchronous = asynchronous_save
        self._save_snapshot: SnapshotSize = save_snapshot
        self._save_format: SaveFormat = save_format
        self._keep_on_device = keep_on_device
        self._save_detail = detail_of("log", log) if log_saves is None else detail_of("log_saves", log_saves)
        self._restore = TrainerRestore(self._options, source, detail=detail_of("log", log))
        self._saves: TrainerSaves | None = None

    @property
    def report(self) -> RestoreReport | None:
        """The figures of the last restore, ``None`` before the first."""
        return self._restore.report

    def __getstate__(self) -> dict[str, Any]:
        """A copy belongs to another Trainer, so it has none of this one's saves."""
        return {**self.__dict__, "_saves": None}

    # Lightning's hooks ----------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Installs the CheckpointIO, before anything is read."""
        self._restore.abort()
        self._restore.warn_of_changed_files()
        require_one(trainer, type(self))
        io = install_io(trainer, self._make_io)
        options = self._options
        loading = {"safe_globals=...": bool(options.safe_globals), "on_corrupt='previous'": options.replaces_damaged}
        if reads_shards(trainer.strategy):
            loading = {}  # It warns of them itself.
        saving = {
            "asynchronous": (self._asynchronous_save, False),
            "snapshot": (self._save_snapshot, False),
            "format": (self._save_format, "torch"),
        }
        warn_of_ignored_options(io, saving=saving, loading=loading)
        if self._saves is not None:
            self._saves.forget()
        self._saves = TrainerSaves(trainer, io, detail=self._save_detail) if io is not None else None
        if self._keep_on_device:
            keep_strategy_on_device(trainer.strategy)
        self._restore.begin(trainer, pl_module, stage, io)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prepares the restore of the optimizer states. The optimizers exist now."""
        self._restore.begin_optimizers(trainer)

    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Ends the restore."""
        self._restore.begin_training(trainer, pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Ends the restore, unless it overlaps with training. From here on saves may be asynchronous."""
        self._restore.begin_training(trainer, pl_module)
        if self._saves is not None:
            self._saves.begin_steps(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs the saves that have ended, and warns of saves that failed. Reports a restore that has just ended."""
        self._restore.end_batch(trainer, pl_module)
        if self._saves is not None:
            self._saves.end_batch()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Waits until all checkpoints are written, on every rank: other callbacks may now change the weights."""
        self._restore.finish(trainer, pl_module)
        if self._saves is not None:
            self._saves.end_steps()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Ends the restore, and waits until no save needs the weights: callbacks may now swap in averaged ones."""
        self._restore.finish(trainer, pl_module)
        if self._saves is not None:
            self._saves.wait_for_tensors()

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Ends the restore."""
        self._restore.finish(trainer, pl_module)

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Ends the restore."""
        self._restore.finish(trainer, pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Removes all hooks and ends the restore. The error of a damaged checkpoint names an intact one."""
        if self._saves is not None:
            self._saves.leave()
            self._saves.close()
        self._restore.fail(trainer, pl_module, exception)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Ends a restore after which there was nothing to train or evaluate, and reports the last save."""
        self._restore.finish(trainer, pl_module)
        self._restore.warn_of_changed_files()
        if self._saves is not None:
            self._saves.leave()
            self._saves.teardown(trainer)
            self._saves.close()

    def _make_io(self, *, wrapped: bool) -> StreamingCheckpointIO:
        return StreamingCheckpointIO(
            host_budget_mib=self._options.host_budget_bytes // _MIB,
            asynchronous=False if wrapped else self._asynchronous_save,
            snapshot=False if wrapped else self._save_snapshot,
            format=self._save_format,
            storage_options=self._storage_options,
        )
