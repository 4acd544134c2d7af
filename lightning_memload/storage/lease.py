"""Learns of writers before a file changes: read leases (``fcntl(2)``, F_SETLEASE) on the files of a checkpoint.

If another program writes to a mapped file in place, the mapping shows the new bytes. If it truncates the file, reading
the mapping kills the process (SIGBUS). With a lease the kernel blocks each program that opens the file for writing, or
truncates it, until the bytes are in ordinary memory, for at most ``/proc/sys/fs/lease-break-time`` seconds (45 by
default). Reading, linking, renaming and removing the file break no lease, so replacing it by a new file costs nothing.

Tested with Linux 6.18 on ext4, tmpfs and overlayfs (including files of a lower layer), with writers in this process and
in others. Limit: a forked child shares the mapping but not the lease, so nothing guards the pages that it inherits.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import struct
import sys
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import ClassVar

from lightning_memload.storage.file_set import FileSet
from lightning_memload.storage.torch_save import before_torch_save

if sys.platform == "linux":
    import fcntl
    import resource

__all__ = ["FileWatch"]

# From linux/fcntl.h. Python has no names for them.
_SETOWN_EX, _OWNER_THREAD = 15, 0
# The interval between two checks of the leases. A writer waits up to this long before the file is released. A check
# costs 1 us for each file. The kernel could send a signal instead, but every signal may have a handler of the user.
_POLL_SECONDS = 0.05
# Checking more files would take more than 2% of a core. Also limited to a quarter of the open files of the process.
_MOST_FILES = 1024
# File systems on which the kernel sees every writer. On a network file system, or FUSE, it does not.
_LOCAL_FILE_SYSTEMS = frozenset(
    {"bcachefs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "overlay", "ramfs", "tmpfs", "xfs", "zfs"}
)
_REFUSALS = {
    errno.EACCES: "the file belongs to another user",
    errno.EPERM: "the file belongs to another user",
    errno.EAGAIN: "the file is open for writing",
    errno.EINVAL: "its file system grants no leases",
}


class FileWatch(threading.Thread):
    """A thread that holds a lease on each file of a set, and releases them when a program wants to change a file.

    To release the leases, the thread runs the guarded action, ends the leases, and warns with the cost. It runs until
    :meth:`end` and does not keep the process alive.

    Args:
        source: The open files. The watch opens them a second time: the mapping keeps its own descriptor, and a forked
            child keeps the mapping, so a lease on that descriptor could outlive this process in a worker of a data
            loader.

    Attributes:
        files: The leased files, open for reading until the end. ``None`` before :meth:`begin` and if it failed.
    """

    _alive: ClassVar[weakref.WeakSet[FileWatch]] = weakref.WeakSet()
    _locked_for_fork: ClassVar[list[threading.Lock]] = []
    # Set while a watch is alive. The lock is reentrant: a finalizer may end a watch in any thread at any time.
    _undo_save_hook: ClassVar[Callable[[], None] | None] = None
    _saves_lock: ClassVar[threading.RLock] = threading.RLock()

    def __init__(self, source: FileSet) -> None:
        super().__init__(name="memload-lease", daemon=True)
        self.files: FileSet | None = None
        self._source: FileSet | None = source
        self._refusal: str | None = None
        self._is_ready = threading.Event()
        self._is_over = threading.Event()
        # Guards the use and the closing of the descriptors. Reentrant: a finalizer may close them in the same thread.
        self._lock = threading.RLock()
        # Held while the leases are released. A fork waits for it: in the child no thread would ever unlock it.
        self._releasing = threading.Lock()
        self._action: Callable[[], int] | None = None

    def begin(self) -> str | None:
        """Takes the leases and starts the thread.

        Returns:
            ``None`` if there is a lease on every file, else the reason why there is none.
        """
        assert self._source is not None
        if not self._source.files:
            return "none of its tensors lies in a file"
        if not self._source.can_map:
            return "it is not on a disk of this machine"
        limit = min(resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4, _MOST_FILES)
        if len(self._source.files) > limit:
            return f"there are {len(self._source.files)} files, and {limit} at most are kept open for that"
        try:
            self.files = self._source.reopened()
            # The thread takes the leases: it blocks all signals, so the kernel's signal to it has no effect.
            self.start()
        except (OSError, RuntimeError) as error:  # RuntimeError: no thread can start during interpreter shutdown
            return self._refuse(f"{error}")
        finally:
            self._source = None
        self._alive.add(self)
        self._is_ready.wait()
        if self._refusal is None:
            with FileWatch._saves_lock:
                if FileWatch._undo_save_hook is None:
                    FileWatch._undo_save_hook = before_torch_save(FileWatch._before_torch_save)
        return self._refusal

    def guard(self, action: Callable[[], int]) -> bool:
        """Sets the action to run before a file may change.

        Args:
            action: Copies the needed bytes out of the files and returns their number. Runs in the watching thread.

        Returns:
            ``False`` if a writer has come already, or the watch has ended. The files may then change at any time.
        """
        with self._lock:
            if not self._is_over.is_set():
                self._action = action
            return not self._is_over.is_set()

    def end(self) -> None:
        """Ends the leases and closes the files. May be called twice, and from any thread or finalizer."""
        with self._lock:
            self._is_over.set()
            self._action = None
            for file in self.files.mappable if self.files is not None else ():
                # Closing alone does not end the lease if a child that Python did not fork has the descriptor too.
                with contextlib.suppress(OSError, ValueError):
                    fcntl.fcntl(file.fileno(), fcntl.F_SETLEASE, fcntl.F_UNLCK)
                file.close()
        self._undo_save_hook_if_last()

    def run(self) -> None:
        """Takes the leases and watches them."""
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        self._take_leases()
        self._is_ready.set()
        while not self._is_over.wait(_POLL_SECONDS):
            if self._is_broken():
                self._release()

    def _take_leases(self) -> None:
        assert self.files is not None
        # Without an owner the kernel sends SIGIO to the process when a lease breaks, which terminates it.
        owner = struct.pack("ii", _OWNER_THREAD, threading.get_native_id())
        for file in self.files.mappable:
            kind = _file_system_of(file.fileno())
            if kind not in _LOCAL_FILE_SYSTEMS:
                self._refuse(f"on {kind or 'an unknown file system'}, writes of other programs may go unnoticed")
                return
            try:
                fcntl.fcntl(file.fileno(), _SETOWN_EX, owner)
                fcntl.fcntl(file.fileno(), fcntl.F_SETLEASE, fcntl.F_RDLCK)
            except OSError as error:
                self._refuse(_REFUSALS.get(error.errno or 0, str(error)))
                return
        changed = self.files.changed_files()
        if changed:
            self._refuse("it was changed since it was opened")

    def _refuse(self, reason: str) -> str:
        self._refusal = reason
        self.end()
        return reason

    def _is_broken(self) -> bool:
        with self._lock:
            for file in self.files.mappable if self.files is not None else ():
                try:
                    # F_GETLEASE returns F_UNLCK while a break is pending, and after it.
                    if not self._is_over.is_set() and fcntl.fcntl(file.fileno(), fcntl.F_GETLEASE) != fcntl.F_RDLCK:
                        return True
                except (OSError, ValueError):
                    return False  # a finalizer has just closed the file
        return False

    def _release(self) -> None:
        failure: Exception | None = None
        copied, changed, name = 0, False, "A file"
        with self._releasing:
            try:
                with self._lock:
                    action, files = self._action, self.files
                if files is not None and action is not None:
                    broken = [f.name for f in files.mappable if not f.is_open or _is_break_pending(f.fileno())]
                    name = ", ".join(broken[:3]) or files.files[0].name
                    copied = action()
                    changed = bool(files.changed_files())
            except Exception as error:
                failure = error
            finally:
                self.end()
        if failure is not None or (changed and copied):
            warnings.warn(
                f"{name} is being rewritten in place, and not all of its bytes could be copied to memory before "
                f"({failure or 'the kernel waits no longer than /proc/sys/fs/lease-break-time'}). Weights that were "
                "assigned from it may be wrong: load them again, with mode='copy'.",
                stacklevel=1,
            )
        elif copied:
            warnings.warn(
                f"{name} is being rewritten in place. Tensors that used its pages keep their values, and now take "
                f"{copied} bytes of memory. Write a new file and rename it to this name, or load with mode='copy'.",
                stacklevel=1,
            )

    @classmethod
    def _before_torch_save(cls, path: str | os.PathLike[str]) -> None:
        try:
            status = os.stat(path)
        except OSError:
            return
        for watch in list(cls._alive):
            if watch._is_watching(status):
                watch._release()

    def _is_watching(self, status: os.stat_result) -> bool:
        with self._lock:
            if self.files is None or self._is_over.is_set():
                return False
            return any(os.path.samestat(os.fstat(file.fileno()), status) for file in self.files.mappable)

    @classmethod
    def _undo_save_hook_if_last(cls) -> None:
        with cls._saves_lock:
            if cls._undo_save_hook is not None and all(watch._is_over.is_set() for watch in list(cls._alive)):
                undo, FileWatch._undo_save_hook = cls._undo_save_hook, None
                undo()

    @classmethod
    def _before_fork(cls) -> None:
        for watch in list(cls._alive):
            watch._releasing.acquire()
            cls._locked_for_fork.append(watch._releasing)

    @classmethod
    def _after_fork(cls) -> None:
        while cls._locked_for_fork:
            cls._locked_for_fork.pop().release()

    @classmethod
    def _in_child(cls) -> None:
        """Closes the leased files in the child without ending the leases.

        The leases belong to the parent. With open descriptors the child would keep them after the parent's end.
        """
        cls._saves_lock = threading.RLock()
        for watch in list(cls._alive):
            watch._lock = threading.RLock()
            watch._is_over.set()
            watch._action = None
            if watch.files is not None:
                watch.files.close()
        cls._undo_save_hook_if_last()
        cls._alive.clear()
        cls._locked_for_fork.clear()


def _is_break_pending(descriptor: int) -> bool:
    return fcntl.fcntl(descriptor, fcntl.F_GETLEASE) != fcntl.F_RDLCK


def _file_system_of(descriptor: int) -> str | None:
    """The kernel's name of the file system of an open file. ``None`` if it is unknown."""
    try:
        with open(f"/proc/self/fdinfo/{descriptor}") as file:
            mount = next((line.split()[1] for line in file if line.startswith("mnt_id:")), None)
        with open("/proc/self/mountinfo") as file:
            line = next((line for line in file if line.split(" ", 1)[0] == mount), "")
    except OSError:
        return None
    return line.partition(" - ")[2].split(" ", 1)[0] or None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=FileWatch._before_fork, after_in_parent=FileWatch._after_fork, after_in_child=FileWatch._in_child
    )
