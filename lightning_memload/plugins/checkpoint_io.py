"""A ``CheckpointIO`` that loads checkpoints without reading their tensors, and saves them without a copy of them.

What Lightning gets is an ordinary dict of ordinary tensors that lie in the mapped file, so every hook of a user works
unchanged. On its own the plugin saves the memory of the loaded copy; together with ``MemoryEfficientRestore`` the
values are streamed. What it saves is the file that Lightning would save.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import sys
import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import torch
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_memload.checkpoint import (
    MappedCheckpoint,
    SafeGlobal,
    UnmappableCheckpoint,
    allow_globals,
    load_mapped,
)
from lightning_memload.errors import MemloadError
from lightning_memload.memory import MemoryMonitor
from lightning_memload.plugins.compat import TorchCheckpointIO, classes
from lightning_memload.report import SaveReport
from lightning_memload.save import (
    BackgroundSave,
    Save,
    SaveStats,
    is_in_step,
    plan_directory_save,
    plan_torch_save,
    write_torch,
)

__all__ = ["Allowance", "LoadObserver", "SaveFormat", "SaveObserver", "StreamingCheckpointIO"]

SaveFormat = Literal["torch", "directory", "safetensors+state"]

# In a file of this name the launchers of Lightning (2.5, 2.6) that fork or spawn hand the trained weights to the main
# process, where no callback has installed anything.
_LAUNCHER_FILE = ".temp.ckpt"


@dataclass(frozen=True, slots=True)
class Allowance:
    """What a load may do beyond ``weights_only``.

    Attributes:
        safe_globals: Classes, functions or their names that ``weights_only`` allows for this load.
        erases: Load all else where it refuses others; ``MappedCheckpoint.refusal`` then tells.
    """

    safe_globals: Sequence[SafeGlobal] = ()
    erases: bool = False


class LoadObserver(Protocol):
    """Who is told when a checkpoint is loaded."""

    def on_load_start(self, path: str) -> str:
        """Called before anything is read.

        Returns:
            The path to load: this one, or another one in its place. On every rank the same.
        """
        ...

    def on_load_end(self, path: str, checkpoint: Any, mapped: MappedCheckpoint | None) -> bool | None:
        """Called with what Lightning is going to get; ``mapped`` is ``None`` if it was loaded the ordinary way.

        Returns:
            Whether this observer lets go of the mapped files.
        """
        ...


SaveObserver = Callable[[SaveReport], object]


class StreamingCheckpointIO(TorchCheckpointIO):
    """Loads local checkpoints of every known format as mapped files, everything else as Lightning does.

    Saves in bounded host memory.

    Files that cannot be mapped (the format of torch < 1.6, compressed, remote) are loaded the ordinary way, with one
    warning that says what it costs.

    Args:
        host_budget_mib: The most host memory, in MiB, for tensors on their way from a device to a file that is saved.
            At least 1.
        asynchronous: Let training go on while the disk takes a local checkpoint, without a copy of the model anywhere:
            see :meth:`save_checkpoint`. Not within Lightning's ``AsyncCheckpointIO``, which does copy it.
        format: ``"torch"`` saves ordinary files, ``"directory"`` what ``save_directory`` writes, on local disks only:
            of storages that have not changed since the checkpoint that was saved or loaded before, such as those of
            frozen layers, the files are hard-linked instead of written. ``"safetensors+state"`` saves such directories
            with the weights in one ``model.safetensors``. All are loaded, whatever this says.

    Attributes:
        asynchronous: As given.
        format: As given.
        last_save: What the last save that ended in this process cost, ``None`` before the first.

    Raises:
        ValueError: The budget is below 1 MiB, or there is no such format.

    Example:
        >>> trainer = L.Trainer(plugins=[AsyncCheckpointIO(StreamingCheckpointIO())])
    """

    def __init__(self, *, host_budget_mib: int = 128, asynchronous: bool = False, format: SaveFormat = "torch") -> None:
        super().__init__()
        if host_budget_mib < 1:
            raise ValueError(f"host_budget_mib must be at least 1, got {host_budget_mib}.")
        if format not in get_args(SaveFormat):
            raise ValueError(f"format must be one of {', '.join(map(repr, get_args(SaveFormat)))}, got {format!r}.")
        self.format = format
        self.last_save: SaveStats | None = None
        self.asynchronous = asynchronous
        self._background: BackgroundSave | None = None
        self._changed_in_steps: Callable[[], Iterable[torch.Tensor]] = tuple
        self._after_training = False
        self._training_thread: int | None = None
        self._save_observers: list[SaveObserver] = []
        self._host_budget_bytes = host_budget_mib << 20
        # The checkpoint that was saved or loaded last: what has not changed since then need not be written again.
        self._before: str | None = None
        self._observers: list[LoadObserver] = []
        self._allowances: list[Callable[[str], Allowance]] = []

    def observe(self, observer: LoadObserver) -> Callable[[], None]:
        """Registers who is told of every load.

        Args:
            observer: The observer.

        Returns:
            A function that removes it again; calling it twice is fine.
        """
        return _register(self._observers, observer)

    def allow(self, allowance: Callable[[str], Allowance]) -> Callable[[], None]:
        """Registers who says what a load may do beyond ``weights_only``, asked with the path that is loaded.

        Returns:
            A function that removes it again; calling it twice is fine.
        """
        return _register(self._allowances, allowance)

    def observe_saves(self, observer: SaveObserver) -> Callable[[], None]:
        """Registers who is told the figures of every save that succeeds, in the thread in which it ends.

        Saves are measured only if somebody is: host memory is sampled every 5 ms meanwhile, and the process' VmHWM is
        reset, see :class:`MemoryMonitor`. The thread that registers counts as the one that trains.

        Returns:
            A function that removes it again; calling it twice is fine.
        """
        self._training_thread = threading.get_ident()
        return _register(self._save_observers, observer)

    def begin_steps(self, changed_in_steps: Callable[[], Iterable[torch.Tensor]]) -> None:
        """Lets saves in the background rely on tensors that nothing but an optimizer's step changes, until told else.

        Args:
            changed_in_steps: Gives these tensors, asked at each save.
        """
        self._changed_in_steps = changed_in_steps
        self._after_training = False
        self._training_thread = threading.get_ident()

    def end_steps(self) -> None:
        """Ends what :meth:`begin_steps` began. When it returns, every tensor may be changed.

        Until it begins again nothing goes on that a save could delay, and none is left to the background.
        """
        self._changed_in_steps = tuple
        self._after_training = True
        self.wait_until_written()

    def wait_until_written(self) -> None:
        """Returns when no tensor is needed any more for a save in the background. Raises nothing."""
        if self._background is not None:
            self._background.wait_until_written()

    def wait(self) -> None:
        """Returns when no save is going on in the background. Raises nothing: :meth:`teardown` does."""
        if self._background is not None:
            self._background.wait()

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """Saves a checkpoint: a local file is replaced in one step when all of it is on the disk.

        A remote file is written in order, through fsspec, in a transaction of the file system as Lightning does it.

        With ``asynchronous=True`` a local checkpoint holds, bit for bit, the state at the time of the call, and gets
        its name later. Within ``fit`` with ``MemoryEfficientRestore``, parameters and optimizer states are written
        while the next batch runs forward and backward, which only read them; before an optimizer's step changes them
        the step waits. Everything else is written when this returns; so is everything when this is called within the
        step (from ``training_step``, say, which Lightning runs in its closure), and without that callback, where only
        the disk is not waited for. After training the file has its place when this returns. The next save, load,
        removal of a checkpoint, and the end of the process keep their order with it. A parameter that code of yours
        changes in place between this call and the next step makes the save fail instead of tearing it, unless it is
        changed through ``.data``, which torch does not count.

        Args:
            checkpoint: What to save.
            path: Path or URL. Missing directories are made.
            storage_options: Must be ``None``, as with Lightning's own plugin.

        Raises:
            TypeError: ``storage_options`` were given.
            ValueError: The format is a directory, and the place is remote or not on Linux.
            FileExistsError: Likewise, and there is something else than a checkpoint at ``path``.
            CheckpointWriteError: There is not enough space, or writing failed; what was there before is untouched. Also
                if that happened to the save before this one, in the background; then nothing is saved now.
            Exception: Whatever pickling the checkpoint, or a remote file system, raises.

        Peak memory: ``host_budget_mib`` if tensors are on devices, and the pickle, which holds no tensors; for a remote
        file also what its file system buffers.
        """
        self.teardown()
        format = "torch" if os.path.basename(path) == _LAUNCHER_FILE else self.format
        if storage_options is not None or (sys.platform != "linux" and format == "torch"):
            super().save_checkpoint(checkpoint, str(path), storage_options)
            return
        filesystem, target = url_to_fs(str(path))
        if format != "torch" and (sys.platform != "linux" or not isinstance(filesystem, LocalFileSystem)):
            raise ValueError(
                f"StreamingCheckpointIO(format={format!r}) saves to local disks on Linux only, and was given "
                f"{path}. Use format='torch'."
            )
        filesystem.makedirs(os.path.dirname(path), exist_ok=True)
        in_training_thread = self._training_thread in (None, threading.get_ident())
        measuring = _Measuring(checkpoint, tuple(self._save_observers), blocks=in_training_thread)
        try:
            if not isinstance(filesystem, LocalFileSystem):
                with filesystem.transaction, filesystem.open(target, "wb") as file:
                    stats = write_torch(checkpoint, file, name=str(path), host_budget_bytes=self._host_budget_bytes)
                self._end_save(measuring, stats, stats.seconds)
                return
            save = self._plan(checkpoint, target, format)
            if not self.asynchronous or self._after_training:
                stats = save.run()
                self._end_save(measuring, stats, stats.seconds)
                return
        except BaseException:
            measuring.stop()
            raise
        self._save_in_background(save, measuring)

    def _plan(self, checkpoint: dict[str, Any], target: str, format: SaveFormat) -> Save:
        if format == "torch":
            return plan_torch_save(checkpoint, target, host_budget_bytes=self._host_budget_bytes)
        return plan_directory_save(
            checkpoint,
            target,
            host_budget_bytes=self._host_budget_bytes,
            link_unchanged_from=self._before,
            safetensors=format == "safetensors+state",
        )

    def _save_in_background(self, save: Save, measuring: _Measuring) -> None:
        def end(background: BackgroundSave, stats: SaveStats | None) -> None:
            if stats is None:
                measuring.stop()
            else:
                self._end_save(measuring, stats, stats.pickle_seconds + background.blocked_seconds)

        # Lightning's AsyncCheckpointIO saves copies from a thread of its own; there is nothing to wait for.
        may_wait = threading.get_ident() == self._training_thread and not is_in_step()
        self._background = BackgroundSave(save, self._changed_in_steps() if may_wait else (), on_end=end)

    def _end_save(self, measuring: _Measuring, stats: SaveStats, blocked_seconds: float) -> None:
        self.last_save, self._before = stats, stats.path
        measuring.report(stats, blocked_seconds)

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Removes a checkpoint. While a save is going on, that is put off until it has succeeded.

        So the last good checkpoint never goes before the next one is on the disk.

        Raises:
            CheckpointWriteError: The save before this failed; nothing is removed.
            OSError: It cannot be removed.
        """
        remove = super().remove_checkpoint
        if self._background is not None and self._background.afterwards(lambda: remove(str(path))):
            return
        self.teardown()
        remove(str(path))

    def teardown(self) -> None:
        """Waits for a save in the background.

        Raises:
            CheckpointWriteError: It failed.
        """
        background, self._background = self._background, None
        if background is not None:
            background.result()

    def load_checkpoint(
        self,
        path: str | os.PathLike[str],
        map_location: Any = None,
        weights_only: bool | Literal["stock"] | None = "stock",
    ) -> dict[str, Any]:
        """Loads a checkpoint.

        Args:
            path: Path or URL.
            map_location: As in ``torch.load``. Anything but the CPU means an ordinary load.
            weights_only: Passed to ``torch.load`` exactly as given. ``"stock"``: what Lightning's own plugin passes,
                ``None`` from 2.6 on, and ``False`` before.

        Returns:
            The checkpoint. Its tensors lie in the file: reading one maps its pages, writing to one copies them. What is
            still referred to when the checkpoint itself is let go of (Lightning does so before training starts)
            becomes ordinary memory, and so does all of it before another program changes the file in place. The latter
            needs a lease of Linux: on network file systems, and files of other users, such a change reaches tensors
            that are still in the file, and cutting it short ends the process. For this a ``dict`` comes as a kind of
            ``OrderedDict``.

        Raises:
            FileNotFoundError: There is no such file.
            CheckpointWriteError: A save in the background failed.
            CheckpointFormatError: The file is truncated or damaged, or it is a directory that cannot be mapped.
            pickle.UnpicklingError: ``weights_only`` forbids what the file holds.

        Peak memory: that of the checkpoint without its tensors.
        """
        self.teardown()
        if weights_only == "stock":
            # Only a Trainer of 2.5 gives no such argument, which it does not know.
            weights_only = None if all(map(_takes_weights_only, _stock())) else False
        for observer in self._observers:
            path = observer.on_load_start(str(path))
        filesystem, local_path = url_to_fs(str(path))
        if not filesystem.exists(local_path):
            raise FileNotFoundError(f"Checkpoint file not found: {path}")
        allowances = [allowance(str(path)) for allowance in self._allowances]
        checkpoint: Any
        mapped: MappedCheckpoint | None = None
        with allow_globals([item for allowance in allowances for item in allowance.safe_globals]):
            try:
                if not _is_cpu(map_location):
                    raise UnmappableCheckpoint(f"map_location={map_location!r} moves the tensors.", path=str(path))
                if not isinstance(filesystem, LocalFileSystem):
                    raise UnmappableCheckpoint(f"{path} is not a local file.", path=str(path))
                erases = any(allowance.erases for allowance in allowances)
                checkpoint, mapped = load_mapped(local_path, weights_only=weights_only, erases=erases)
                self._before = local_path
            except UnmappableCheckpoint as reason:
                if filesystem.isdir(local_path):
                    raise  # there is no ordinary way: torch.load knows files only
                rank_zero_warn(
                    f"{reason} It is loaded the ordinary way: the whole checkpoint in host memory, on every rank."
                )
                checkpoint = self._load_ordinarily(path, map_location, weights_only)
        is_taken = [observer.on_load_end(str(path), checkpoint, mapped) for observer in self._observers]
        if mapped is not None and not any(is_taken):
            checkpoint = _detach_at_end(checkpoint, mapped)
        return checkpoint  # type: ignore[no-any-return]

    def _load_ordinarily(self, path: Any, map_location: Any, weights_only: bool | None) -> Any:
        stock = next((kind for kind in _stock() if _takes_weights_only(kind)), TorchCheckpointIO)
        options: dict[str, Any] = {"weights_only": weights_only} if _takes_weights_only(stock) else {}
        if map_location is not None:
            options["map_location"] = map_location
        with _without_mmap():
            return stock.load_checkpoint(self, path, **options)


def _stock() -> tuple[type[TorchCheckpointIO], ...]:
    """Lightning's own plugins: two, perhaps of two versions, where both of its packages are imported."""
    return classes("lightning.fabric.plugins.io.torch_io.TorchCheckpointIO")


def _takes_weights_only(stock: type[TorchCheckpointIO]) -> bool:
    """Whether a plugin has the argument, which Lightning 2.6 added."""
    return "weights_only" in inspect.signature(stock.load_checkpoint).parameters


class _Measuring:
    """Measures one save from now on, if anybody wants to know."""

    def __init__(self, checkpoint: Any, observers: tuple[SaveObserver, ...], *, blocks: bool) -> None:
        step = checkpoint.get("global_step") if isinstance(checkpoint, dict) else None
        self._global_step = step if isinstance(step, int) else None
        self._observers = observers
        self._blocks = blocks
        self._monitor = MemoryMonitor()
        if observers:
            self._monitor.start()

    def report(self, stats: SaveStats, blocked_seconds: float) -> None:
        self.stop()
        for observer in self._observers:
            observer(
                SaveReport(stats, self._monitor.peaks, blocked_seconds if self._blocks else None, self._global_step)
            )

    def stop(self) -> None:
        if self._monitor.is_running:
            self._monitor.stop()


def _register(observers: list[Any], observer: Any) -> Callable[[], None]:
    observers.append(observer)

    def remove() -> None:
        if observer in observers:
            observers.remove(observer)

    return remove


class _Loaded(OrderedDict[Any, Any]):
    """A loaded checkpoint that lets go of its files when it is let go of itself.

    Copies and pickles of it are plain ``OrderedDict``, which is loaded everywhere, also with ``weights_only=True``.
    """

    __slots__ = ("mapped",)
    mapped: MappedCheckpoint | None

    def __del__(self) -> None:
        # Not at exit: what others' exit handlers read may lie in the files.
        if getattr(self, "mapped", None) is not None and not sys.is_finalizing():
            # What only this refers to goes first, and is not read.
            self.clear()
            _detach(self.mapped)

    def __reduce__(self) -> Any:
        return OrderedDict, (), vars(self) or None, None, iter(self.items())

    def copy(self) -> Any:
        return OrderedDict(self)


def _detach_at_end(checkpoint: Any, mapped: MappedCheckpoint) -> Any:
    """Lets go of the files when a loaded checkpoint is let go of, or somebody is about to change them.

    CheckpointIOs are told of no end of a restore (Lightning 2.5, 2.6).

    Returns:
        The checkpoint to hand out.
    """
    mapped.watch()
    if type(checkpoint) in (dict, OrderedDict):
        whole = _Loaded(checkpoint)
        vars(whole).update(getattr(checkpoint, "__dict__", {}))  # a state dict has its _metadata there
        whole.mapped = mapped
        return whole
    try:
        weakref.finalize(checkpoint, _detach, mapped).atexit = False
    except TypeError:
        mapped.detach()  # a list, say
    return checkpoint


def _detach(mapped: MappedCheckpoint | None) -> None:
    try:
        if mapped is not None:
            mapped.detach()
    except (MemloadError, OSError) as error:
        warnings.warn(f"{error} Tensors of the checkpoint that are still in use may be wrong.", stacklevel=2)


def _without_mmap() -> contextlib.AbstractContextManager[Any]:
    """Within, ``torch.load`` takes open files, whatever ``torch.utils.serialization.config.load.mmap`` says.

    Lightning (2.6) passes open files, and torch cannot map them.
    """
    settings = sys.modules.get("torch.utils.serialization")  # torch >= 2.7; nobody can have set what is not imported
    return settings.config.patch("load.mmap", False) if settings is not None else contextlib.nullcontext()


def _is_cpu(map_location: Any) -> bool:
    return map_location is None or (
        isinstance(map_location, (str, torch.device)) and torch.device(map_location).type == "cpu"
    )
