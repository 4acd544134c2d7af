"""The Callback that restores checkpoints at no more memory than training needs.

A thin adaptor: it installs the CheckpointIO, creates a ``RestoreRun`` for each run of the Trainer, and reports.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_info

from lightning_memload.distributed import Writer
from lightning_memload.pickles import SafeGlobal, check_safe_globals
from lightning_memload.plugins.checkpoint_io import StreamingCheckpointIO
from lightning_memload.plugins.choices import check_choice
from lightning_memload.plugins.compat import Callback, classes
from lightning_memload.plugins.damaged import OnCorrupt, name_intact_sibling
from lightning_memload.plugins.exposed import ExposedParameters
from lightning_memload.plugins.mixed_imports import name_mixed_imports
from lightning_memload.plugins.mode import Mode
from lightning_memload.plugins.onlookers import (
    only_lightning_reads,
    only_steps_change,
    warn_of_loggers_without_directories,
)
from lightning_memload.plugins.parts import Part, check_parts
from lightning_memload.plugins.pending import Gate
from lightning_memload.plugins.run import RestoreOptions, RestoreRun
from lightning_memload.plugins.saves import SaveLog, step_of_loggers
from lightning_memload.plugins.saving_io import Asynchronous, SaveFormat
from lightning_memload.plugins.seams import (
    around_load,
    before_move,
    begin_averages,
    install_io,
    keep_strategy_on_device,
    loads_by_itself,
    require_one,
    skip_next_move_to_cpu,
    when_set_up,
)
from lightning_memload.plugins.telling import meta_error, report_match, warn_of_ignored_options
from lightning_memload.report import RestoreReport
from lightning_memload.restore import WeightsSource, follow_recipes, meta_names, names_of_data
from lightning_memload.save import tensors_of_optimizers
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
        verify: Compare the CRC-32 that the file records for every tensor, before its values are used. With ``False``,
            assigned weights are not read before their first use.
        check_fit: Compare needed and free memory of device and host before the first byte is read, and raise if the
            checkpoint does not fit.
        log: Print a table with the time and memory of the restore, and log it as ``memload/...`` to every logger of the
            Trainer. Print a line for saves, and log ``memload/save_...``. Measuring a save takes about 20 ms.
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
        save_format: ``"torch"``, ``"directory"`` or ``"safetensors+state"``, see ``StreamingCheckpointIO``. Applies if
            this callback installs the CheckpointIO.
        safe_globals: Classes and functions, or their dotted names, that ``weights_only`` allows when ``ckpt_path`` is
            loaded, as ``torch.serialization.safe_globals`` does. Evaluation and ``restore=["weights"]`` need none:
            refused objects outside the weights are then not loaded, unless a hook of yours receives the checkpoint.

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
        log: bool = True,
        progress_bar: bool = True,
        restore: Part | Collection[Part] | None = None,
        weights_from: str | Path | WeightsSource | None = None,
        on_corrupt: OnCorrupt = "raise",
        keep_on_device: bool = False,
        asynchronous_save: Asynchronous = False,
        save_format: SaveFormat = "torch",
        safe_globals: Sequence[SafeGlobal] = (),
    ) -> None:
        super().__init__()
        check_choice("mode", mode, Mode)
        check_host_budget(host_budget_mib)
        check_num_threads(num_threads)
        check_choice("on_corrupt", on_corrupt, OnCorrupt)
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
        )
        if weights_from is not None and not isinstance(weights_from, (str, Path, WeightsSource)):
            raise ValueError(f"weights_from must be a path or a WeightsSource, got {weights_from!r}.")
        self._keep_on_device = keep_on_device
        self._weights_from = WeightsSource(weights_from) if isinstance(weights_from, (str, Path)) else weights_from
        self._has_weights: weakref.ref[pl.LightningModule] | None = None
        self._log = log
        self.report: RestoreReport | None = None
        self._run: RestoreRun | None = None
        self._exposed: ExposedParameters | None = None
        self._undo: list[Callable[[], Any]] = []
        check_choice("save_format", save_format, SaveFormat)
        check_choice("asynchronous_save", asynchronous_save, Asynchronous)
        self._asynchronous_save = asynchronous_save
        self._save_format = save_format
        self._io: StreamingCheckpointIO | None = None
        self._saves: SaveLog | None = None
        self._forget_saves: Callable[[], Any] | None = None
        self._forget_loads: Callable[[], Any] | None = None
        self._writer: Writer | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy belongs to another Trainer, so it has none of this one's saves and modules."""
        own = ("_io", "_saves", "_forget_saves", "_forget_loads", "_has_weights", "_exposed", "_writer")
        return {**self.__dict__, **dict.fromkeys(own)}

    # Lightning's hooks ----------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Installs the CheckpointIO, before anything is read."""
        self._abort()
        self._warn_of_changed_files()
        require_one(trainer, type(self))
        io = self._io = install_io(trainer, self._make_io)
        options = self._options
        loading = {"safe_globals=...": bool(options.safe_globals), "on_corrupt='previous'": options.replaces_damaged}
        warn_of_ignored_options(io, asynchronous=self._asynchronous_save, format=self._save_format, loading=loading)
        if io is not None and io.asynchronous == "until_step":
            self._writer = Writer(trainer.world_size, is_here=trainer.is_global_zero)
            self._writer.arrive()
        if io is not None and io.format != "torch":
            warn_of_loggers_without_directories(trainer.loggers)
        self._observe_saves(trainer, io)
        if self._keep_on_device:
            keep_strategy_on_device(trainer.strategy)
        self._run = RestoreRun(self._options, trainer, pl_module, stage, streams=io is not None)
        if io is not None:
            self._undo += [io.observe(self._run), io.allow(self._run.allowance)]
            self._undo.append(around_load(trainer.strategy, self._run.load_model))
        if not loads_by_itself(trainer.strategy):
            self._undo.append(before_move(trainer.strategy, lambda: self._end_weights(trainer, pl_module)))
        meet = self._run.meet_companions
        self._undo.append(when_set_up(trainer.strategy, meet, lambda: self._begin_stage(trainer, pl_module)))

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prepares the restore of the optimizer states. The optimizers exist now."""
        if self._run is not None:
            self._run.begin_optimizers(trainer.optimizers)

    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Ends the restore."""
        self._finish(trainer, pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Ends the restore. From here on saves may be asynchronous."""
        self._finish(trainer, pl_module)
        if self._io is None or not self._io.asynchronous:
            return
        if self._io.asynchronous is True or not only_steps_change(trainer):
            self._io.begin_steps(tuple)
            return
        self._io.begin_steps(lambda: self._changed_in_steps(trainer, pl_module))
        gate = Gate(self._io.wait_until_written)
        hook = pl_module.register_load_state_dict_pre_hook(gate)  # type: ignore[no-untyped-call]
        self._forget_loads = hook.remove

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs the saves that have ended, and warns of saves that failed since their tensors changed."""
        self._flush_saves()
        if self._io is not None:
            self._io.tell_what_changed()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Waits until all checkpoints are written, on every rank: other callbacks may now change the weights."""
        self._end_steps(leaves=False)
        self._flush_saves()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Ends the restore, and waits until all checkpoints are written: callbacks may now swap in averaged weights."""
        self._finish(trainer, pl_module)
        if self._io is not None:
            self._io.wait_until_written()

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Ends the restore."""
        self._finish(trainer, pl_module)

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Ends the restore."""
        self._finish(trainer, pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Removes all hooks and ends the restore. The error of a damaged checkpoint names an intact one."""
        restoring = self._run is not None and self._run.path == str(trainer.ckpt_path)
        self._end_steps(leaves=True)
        self._close_saves()
        self._abort()
        skip_next_move_to_cpu(pl_module)
        name_mixed_imports(exception, trainer, pl_module)
        if restoring:
            advise = not self._options.replaces_damaged
            name_intact_sibling(exception, str(trainer.ckpt_path), trainer, advise_option=advise)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Ends a restore after which there was nothing to train or evaluate, and reports the last save."""
        self._finish(trainer, pl_module)
        self._warn_of_changed_files()
        self._end_steps(leaves=True)
        if self._io is not None:
            # Lightning's AsyncCheckpointIO does not call teardown of the IO that it wraps.
            if isinstance(trainer.strategy.checkpoint_io, classes("lightning.pytorch.plugins.io.AsyncCheckpointIO")):
                trainer.strategy.checkpoint_io.teardown()
            self._io.teardown()
        self._close_saves()

    # --------------------------------------------------------------------------------------------------------------

    def _end_weights(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Ends the phase of the weights, before the module moves to its device and may be copied."""
        # Not in setup: only now it is known whether there is a checkpoint, and what configure_model builds.
        if self._run is not None:
            self._run.on_no_load()
        self._load_weights(trainer, pl_module)
        path = self._run.path if self._run is not None else None
        # Without a checkpoint only values that a constructor has loaded are filled in, and no random weights.
        names = names_of_data(pl_module) if path is None else None
        follow_recipes(pl_module, names, trainer.strategy.root_device)
        parameters, buffers = meta_names(pl_module)
        if parameters or buffers:
            raise meta_error(pl_module, path, parameters, buffers)
        if self._run is not None:
            parts = self._options.parts
            if self._run.path is not None and parts is not None and "callbacks" not in parts:
                begin_averages(trainer, pl_module)
            self._run.end_weights()

    def _begin_stage(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Ends the restore, also of a strategy that loads checkpoints itself, whether or not there is a checkpoint."""
        self._load_weights(trainer, pl_module)
        self._finish(trainer, pl_module)

    def _load_weights(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Loads ``weights_from``, unless the module already has these weights or ``ckpt_path`` is restored."""
        source, run = self._weights_from, self._run
        known = self._has_weights is not None and self._has_weights() is pl_module
        if source is None or run is None or known or trainer.state.fn != "fit" or trainer.ckpt_path is not None:
            return
        if loads_by_itself(trainer.strategy):
            raise ValueError(
                "MemoryEfficientRestore(weights_from=...) cannot load into a module that "
                f"{type(trainer.strategy).__name__} shards. Load the weights in configure_model, or start from a "
                "checkpoint of that strategy."
            )
        run.load_weights(source)
        begin_averages(trainer, pl_module)
        self._has_weights = weakref.ref(pl_module)

    def _make_io(self, *, wrapped: bool) -> StreamingCheckpointIO:
        return StreamingCheckpointIO(
            host_budget_mib=self._options.host_budget_bytes // _MIB,
            asynchronous=False if wrapped else self._asynchronous_save,
            format=self._save_format,
        )

    def _observe_saves(self, trainer: pl.Trainer, io: StreamingCheckpointIO | None) -> None:
        if self._forget_saves is not None:
            self._forget_saves()
        self._saves = SaveLog(trainer) if io is not None and self._log else None
        if io is not None and self._saves is not None:
            self._forget_saves = io.observe_saves(self._saves.add)

    def _flush_saves(self) -> None:
        if self._saves is not None:
            self._saves.flush()

    def _close_saves(self) -> None:
        if self._saves is not None:
            self._saves.close()

    def _changed_in_steps(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> list[torch.Tensor]:
        """The tensors that the current save may write later, none if other code could read the checkpoint before."""
        if self._writer is None or not self._writer.knows_all_ranks() or not only_lightning_reads(trainer):
            return []
        self._writer.begin()
        return tensors_of_optimizers(trainer.optimizers, pl_module.modules())

    def _end_steps(self, *, leaves: bool) -> None:
        if self._forget_loads is not None:
            self._forget_loads()
        if self._io is not None:
            self._io.end_steps()
        if self._writer is not None:
            (self._writer.leave if leaves else self._writer.wait)()

    def _finish(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        run = self._take_run()
        if run is None:
            return
        try:
            report = run.finish()
        except BaseException:
            run.abort()
            raise
        if report is None:
            return
        self.report = report
        if run.exposed_files is not None and report.bytes_assigned:
            self._exposed = ExposedParameters(run.exposed_files, trainer.lightning_module)
        report_match(report, pl_module)
        if not self._log:
            return
        rank_zero_info(f"Restored {report.path} for {report.stage}\n{report.table()}")
        step = report.global_step if report.stage != "fit" else step_of_loggers(trainer, report.global_step)
        for logger in trainer.loggers:
            logger.log_metrics(report.scalars(), step=step)

    def _warn_of_changed_files(self) -> None:
        if self._exposed is not None and not self._exposed.warn_if_changed():
            self._exposed = None

    def _abort(self) -> None:
        run = self._take_run()
        if run is not None:
            run.abort()

    def _take_run(self) -> RestoreRun | None:
        run, self._run = self._run, None
        for undo in self._undo:
            undo()
        self._undo.clear()
        return run
