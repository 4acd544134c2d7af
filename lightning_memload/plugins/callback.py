"""The Callback: one line in a Trainer that makes a resume cost no more memory than training.

A thin adaptor. It installs the CheckpointIO, hands each run of the Trainer to a ``RestoreRun``, and reports.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

from lightning_memload.checkpoint import FileSet, SafeGlobal, check_safe_globals
from lightning_memload.distributed import Writer
from lightning_memload.errors import MetaTensorError, listed
from lightning_memload.plugins.checkpoint_io import StreamingCheckpointIO
from lightning_memload.plugins.compat import Callback, classes
from lightning_memload.plugins.damaged import OnCorrupt, tell_of_damage
from lightning_memload.plugins.mixed_imports import name_mixed_imports
from lightning_memload.plugins.onlookers import only_lightning_looks, only_steps_change, tell_who_misses_directories
from lightning_memload.plugins.parts import Part, check_parts
from lightning_memload.plugins.pending import Gate
from lightning_memload.plugins.run import Mode, RestoreOptions, RestoreRun
from lightning_memload.plugins.saves import SaveLog, step_of_loggers
from lightning_memload.plugins.saving_io import Asynchronous, SaveFormat, check_asynchronous
from lightning_memload.plugins.seams import (
    around_load,
    before_move,
    begin_averages,
    install_io,
    keep_strategy_on_device,
    let_teardown_pass,
    loads_by_itself,
    require_one,
    when_set_up,
)
from lightning_memload.plugins.telling import tell_match
from lightning_memload.report import RestoreReport
from lightning_memload.restore import WeightsSource, follow_recipes, meta_names, names_of_data
from lightning_memload.save import tensors_of_optimizers
from lightning_memload.transfer import check_host_budget, check_num_threads

if TYPE_CHECKING:
    import lightning.pytorch as pl

__all__ = ["MemoryEfficientRestore"]

_MIB = 2**20


class MemoryEfficientRestore(Callback):
    """Restores checkpoints straight from the file onto the training device, with a hard bound on host memory.

    Works with every entry point that takes ``ckpt_path`` (``fit``, ``validate``, ``test``, ``predict``), on an ordinary
    ``.ckpt``, and gives bit for bit what Lightning gives. Without a checkpoint it does nothing.

    Host memory of a restore onto a GPU is ``host_budget_mib``, whatever the size of the model. Onto the CPU it is what
    must stay there: weights that were not allocated yet and optimizer states, once.

    Args:
        mode: ``"copy"`` streams every tensor into memory of its own. ``"assign"`` makes CPU parameters the file's own
            pages, which the kernel can take back; the first write to a page makes it ordinary memory. Before another
            program changes the file in place they become ordinary memory too, with their values, and a warning says so;
            where Linux cannot tell (network file systems, files of others, directories of very many files) a change
            is noticed afterwards only, with a warning at the end of the stage or the start of the next. Replacing the
            file by a new one is fine.
            ``"auto"`` assigns for evaluation on the CPU where Linux can tell, else copies.
        host_budget_mib: The most host memory for staging, in MiB, per process. Hard. For saves likewise, if the
            CheckpointIO is installed by this callback.
        num_threads: Threads that read. ``None``: up to 12 for a GPU and 4 for the CPU, shared between the processes of
            a host.
        verify: Compare the CRC-32 that the file records for every tensor: on the way, or of what is assigned before it
            is used. ``False`` lets assigned weights be read only when they are used.
        check_fit: Compare needed with free memory of device and host before the first byte, and refuse what cannot fit.
        log: Print a table of what the restore cost, and log it as ``memload/...`` to every logger of the Trainer; a
            line for each save, and ``memload/save_...``. Measuring a save costs some 20 ms.
        progress_bar: Show a bar for restores of more than a second, if the Trainer shows bars.
        restore: What ``fit`` takes of the checkpoint: some of ``"weights"``, ``"optimizer"`` (with learning rate
            schedulers and the precision plugin's state), ``"loops"`` (epoch, step, progress) and ``"callbacks"``. What
            is left out is not read. ``None``: all, as Lightning does. With ``["weights"]`` any file of weights will do.
        weights_from: A checkpoint of any format whose weights, and nothing else of it, ``fit`` starts from: for
            finetuning. A path, or a :class:`WeightsSource` that also renames and leaves out. Loaded once for each
            module, and not when ``ckpt_path`` is given, so one configuration starts a finetuning and resumes it.
        on_corrupt: What to do when the file of ``ckpt_path`` is damaged. ``"raise"``: the error names the newest
            checkpoint in the same directory that is intact. ``"previous"``: that one is restored instead, with a
            warning; the file is verified completely before anything is restored, which reads it once more. Every rank
            verifies its own file, and all restore the same checkpoint, or all raise. Give it on every rank.
        keep_on_device: Leave the module and the optimizer states where they are when ``fit`` ends. Lightning moves
            them to host memory then, which takes as much of it as the training took of the device's.
        asynchronous_save: ``True``: a save returns when the checkpoint is written and has its name, and does not wait
            for the disk. ``"until_step"``: what only optimizers' steps change is written until the next step, which
            waits; see ``StreamingCheckpointIO.save_checkpoint`` for what you promise. List this callback before others
            that change weights when validation or training ends, so that it waits first. Neither copies the model.
        save_format: ``"torch"``, ``"directory"`` or ``"safetensors+state"``, see ``StreamingCheckpointIO``, if this
            callback installs it.
        safe_globals: Classes and functions, or their dotted names, that ``weights_only`` allows when ``ckpt_path`` is
            loaded, as ``torch.serialization.safe_globals`` does. Evaluation and ``restore=["weights"]`` need none: what
            is refused beside the weights is not loaded then, unless a hook of yours gets the checkpoint.

    Attributes:
        report: The figures of the last restore, ``None`` before the first.

    Raises:
        ValueError: An argument is out of its range, or a name in ``safe_globals`` cannot be imported; or (from ``fit``
            and the others) the Trainer has two of these.
        TypeError: ``safe_globals`` is no list of classes or names, or a number is none.

    Example:
        >>> trainer = L.Trainer(callbacks=[MemoryEfficientRestore()])
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
        if mode not in get_args(Mode):
            raise ValueError(f"mode must be one of {', '.join(map(repr, get_args(Mode)))}, got {mode!r}.")
        check_host_budget(host_budget_mib)
        check_num_threads(num_threads)
        if on_corrupt not in get_args(OnCorrupt):
            raise ValueError(
                f"on_corrupt must be one of {', '.join(map(repr, get_args(OnCorrupt)))}, got {on_corrupt!r}."
            )
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
        # What nothing watches, and the module whose parameters are pages of it.
        self._exposed: tuple[FileSet, weakref.ref[pl.LightningModule]] | None = None
        self._undo: list[Callable[[], Any]] = []
        if save_format not in get_args(SaveFormat):
            raise ValueError(f"save_format must be one of {get_args(SaveFormat)}, got {save_format!r}.")
        check_asynchronous("asynchronous_save", asynchronous_save)
        self._asynchronous_save = asynchronous_save
        self._save_format = save_format
        self._io: StreamingCheckpointIO | None = None
        self._saves: SaveLog | None = None
        self._forget_saves: Callable[[], Any] | None = None
        self._forget_loads: Callable[[], Any] | None = None
        self._writer: Writer | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy belongs to another Trainer, and so to other saves and another module."""
        own = ("_io", "_saves", "_forget_saves", "_forget_loads", "_has_weights", "_exposed", "_writer")
        return {**self.__dict__, **dict.fromkeys(own)}

    # Lightning's hooks ----------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Installs the CheckpointIO. Nothing has been read yet, and nothing is if there is no checkpoint."""
        self._abort()
        self._tell_changed_files()
        require_one(trainer, type(self))
        io = self._io = install_io(trainer, self._make_io)
        wanted = self._asynchronous_save
        if wanted and (io is None or io.asynchronous != wanted):
            rank_zero_warn(
                f"MemoryEfficientRestore(asynchronous_save={wanted!r}) is ignored: how to save is up to the "
                "CheckpointIO that the Trainer was given, or to its strategy. Leave that plugin out, or give "
                f"StreamingCheckpointIO(asynchronous={wanted!r}), not within Lightning's AsyncCheckpointIO."
            )
        if io is not None and io.asynchronous == "until_step":
            self._writer = Writer(trainer.world_size, is_here=trainer.is_global_zero)
            self._writer.arrive()
        if self._save_format != "torch" and (io is None or io.format != self._save_format):
            rank_zero_warn(
                f"MemoryEfficientRestore(save_format={self._save_format!r}) is left out: how to save is up to the "
                "CheckpointIO that the Trainer was given, or to its strategy. Give StreamingCheckpointIO(format=...)."
            )
        if io is not None and io.format != "torch":
            tell_who_misses_directories(trainer.loggers)
        self._observe_saves(trainer, io)
        if io is None and self._options.safe_globals:
            rank_zero_warn("MemoryEfficientRestore(safe_globals=...) is ignored: it does not load the checkpoint.")
        if io is None and self._options.replaces_damaged:
            rank_zero_warn("MemoryEfficientRestore(on_corrupt='previous') is ignored: it does not load the checkpoint.")
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
        """The optimizers exist now, their states come next."""
        if self._run is not None:
            self._run.begin_optimizers(trainer.optimizers)

    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Everything is restored."""
        self._finish(trainer, pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Everything is restored, and from here on only steps change what optimizers have, if that is promised."""
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
        """Logs what has been saved meanwhile, and warns of what could not be."""
        self._flush_saves()
        if self._io is not None:
            self._io.tell_what_changed()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The weights may change from now on, and every rank finds every checkpoint."""
        self._end_steps(leaves=False)
        self._flush_saves()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Everything is restored; during validation others may put averaged weights in place of these."""
        self._finish(trainer, pl_module)
        if self._io is not None:
            self._io.wait_until_written()

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Everything is restored."""
        self._finish(trainer, pl_module)

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Everything is restored."""
        self._finish(trainer, pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Whatever failed, no hook stays and no memory. Of a damaged checkpoint the error says what to take instead."""
        restoring = self._run is not None and self._run.path == str(trainer.ckpt_path)
        self._end_steps(leaves=True)
        self._close_saves()
        self._abort()
        let_teardown_pass(pl_module)
        name_mixed_imports(exception, trainer, pl_module)
        if restoring:
            advise = not self._options.replaces_damaged
            tell_of_damage(exception, str(trainer.ckpt_path), trainer, advise_option=advise)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Ends a restore after which nothing was left to train or to evaluate, and tells of the last save."""
        self._finish(trainer, pl_module)
        self._tell_changed_files()
        self._end_steps(leaves=True)
        if self._io is not None:
            # Lightning's AsyncCheckpointIO tells the IO within nothing.
            if isinstance(trainer.strategy.checkpoint_io, classes("lightning.pytorch.plugins.io.AsyncCheckpointIO")):
                trainer.strategy.checkpoint_io.teardown()
            self._io.teardown()
        self._close_saves()

    # --------------------------------------------------------------------------------------------------------------

    def _end_weights(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """All weights are there, or never will be: the module is about to move, and may be copied from then on."""
        # Not in setup: whether there is a checkpoint, and what configure_model builds, is known only now.
        if self._run is not None:
            self._run.on_no_load()
        self._load_weights(trainer, pl_module)
        path = self._run.path if self._run is not None else None
        if path is None:
            # Nobody asked for random weights. What a constructor loaded is there in any case.
            follow_recipes(pl_module, names_of_data(pl_module), trainer.strategy.root_device)
        else:
            follow_recipes(pl_module, None, trainer.strategy.root_device)
        parameters, buffers = meta_names(pl_module)
        if parameters or buffers:
            raise _meta_error(pl_module, path, parameters, buffers)
        if self._run is not None:
            parts = self._options.parts
            if self._run.path is not None and parts is not None and "callbacks" not in parts:
                begin_averages(trainer, pl_module)
            self._run.end_weights()

    def _begin_stage(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Everything is restored, also by a strategy that does so by itself: there is a checkpoint, or none."""
        self._load_weights(trainer, pl_module)
        self._finish(trainer, pl_module)

    def _load_weights(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Loads the weights to start from, unless there are none, the module has them, or a checkpoint brings all."""
        source, run = self._weights_from, self._run
        known = self._has_weights is not None and self._has_weights() is pl_module
        if source is None or run is None or known or trainer.state.fn != "fit" or trainer.ckpt_path is not None:
            return
        if loads_by_itself(trainer.strategy):
            raise ValueError(
                f"MemoryEfficientRestore(weights_from=...) cannot fill modules that {type(trainer.strategy).__name__} "
                "shards. Load the weights in configure_model, or start from a checkpoint of that strategy."
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
        """What a save that is being made may leave for later; nothing where something could look at it meanwhile."""
        if self._writer is None or not self._writer.knows_all_ranks() or not only_lightning_looks(trainer):
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
            self._exposed = run.exposed_files, weakref.ref(trainer.lightning_module)
        tell_match(report, pl_module)
        if not self._log:
            return
        rank_zero_info(f"Restored {report.path} for {report.stage}\n{report.table()}")
        step = report.global_step if report.stage != "fit" else step_of_loggers(trainer, report.global_step)
        for logger in trainer.loggers:
            logger.log_metrics(report.scalars(), step=step)

    def _tell_changed_files(self) -> None:
        files, module = self._exposed or (None, None)
        if files is None or module is None:
            return
        changed = files.changed_files()
        if changed and module() is not None:
            rank_zero_warn(
                f"{listed(changed)} was changed in place while parameters are pages of it (mode='assign'), so these "
                "have other values now. Restore the module again, and replace files instead of changing them, or use "
                "mode='copy'."
            )
        if changed or module() is None:
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


def _meta_error(
    module: pl.LightningModule, path: str | None, parameters: list[str], buffers: list[str]
) -> MetaTensorError:
    names = (*parameters, *buffers)
    where = f"{type(module).__name__} is still on the meta device: {listed(names)}."
    if path is None:
        advice = (
            "Nothing gives it values, since no checkpoint is restored. Pass ckpt_path=..., or build the module without "
            "meta_init() or torch.device('meta')."
        )
    elif parameters:
        advice = (
            f"Loading {path} gave it no values: the file has none under these names, or a load_state_dict of their own "
            "copied them into parameters without memory. Build these modules on a real device, or let torch report "
            "missing keys with strict loading."
        )
    else:
        advice = (
            f"The checkpoint {path} does not hold these buffers (non-persistent buffers are never saved). Build the "
            "module under lightning_memload.meta_init(), which keeps buffers real, instead of torch.device('meta')."
        )
    return MetaTensorError(f"{where} {advice}", names=names)
