"""The kernel's word before a file changes: read leases (``fcntl(2)``, F_SETLEASE) on the files of a checkpoint.

A mapped file that another program writes to in place shows that program's bytes, and one that is cut short kills the
process (SIGBUS). With a lease the kernel holds everyone who opens the file for writing, or truncates it, until its
bytes are in ordinary memory, for at most ``/proc/sys/fs/lease-break-time`` seconds (45 by default). Reading, linking,
renaming and removing the file break no lease, so replacing it by a new file costs nothing.

Seen to work with Linux 6.18 on ext4, tmpfs and overlayfs (files of a lower layer too), for writers in this process and
in others. Not promised: a forked child shares the mapping but not the lease, so nothing guards pages that it inherits.
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

from lightning_memload.checkpoint.source import FileSet
from lightning_memload.checkpoint.torch_save import before_torch_save

if sys.platform == "linux":
    import fcntl
    import resource

__all__ = ["FileWatch"]

# From linux/fcntl.h; Python has no name for them.
_SETOWN_EX, _OWNER_THREAD = 15, 0
# How often the leases are looked at, which is how long a writer waits before its file is let go. A look costs 1 us a
# file. The signal that the kernel offers instead would need a number that no user's handler has.
_POLL_SECONDS = 0.05
# Looking at more would take more than 2% of a core. Of the open files that a process may have, a quarter at most.
_MOST_FILES = 1024
# Where this kernel sees every writer. On a network file system, or FUSE, others write unseen.
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
    """Holds a lease on each file of a set, and gives way when somebody wants to change one of them.

    Giving way means: the guarded action runs, the leases end, one warning says what it cost. The thread lives as long
    as the leases, which :meth:`end` ends. It does not keep the process alive.

    Args:
        source: The open files. They are opened once more: a mapping keeps the descriptor that it was made of, and a
            forked child the mapping, so a lease on that one would outlive this process in a worker of a data loader.

    Attributes:
        files: The leased files, open for reading until the end. ``None`` before :meth:`begin` and where it failed.
    """

    _alive: ClassVar[weakref.WeakSet[FileWatch]] = weakref.WeakSet()
    _held_by_fork: ClassVar[list[threading.Lock]] = []
    # While one is alive. Reentrant: a finalizer may end a watch anywhere.
    _forget_saves: ClassVar[Callable[[], None] | None] = None
    _saves_lock: ClassVar[threading.RLock] = threading.RLock()

    def __init__(self, source: FileSet) -> None:
        super().__init__(name="memload-lease", daemon=True)
        self.files: FileSet | None = None
        self._source: FileSet | None = source
        self._refusal: str | None = None
        self._is_ready = threading.Event()
        self._is_over = threading.Event()
        # The descriptors are looked at, and closed, within. A finalizer may close them in the thread that looks.
        self._lock = threading.RLock()
        # Held while this gives way. A fork waits for it: in the child no thread would ever release what it holds.
        self._giving_way = threading.Lock()
        self._action: Callable[[], int] | None = None

    def begin(self) -> str | None:
        """Takes the leases, and begins to watch.

        Returns:
            Why there is no lease, ``None`` if there is one on every file.
        """
        assert self._source is not None
        if not self._source.files:
            return "none of its tensors lies in a file"
        limit = min(resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4, _MOST_FILES)
        if len(self._source.files) > limit:
            return f"there are {len(self._source.files)} files, and {limit} at most are kept open for that"
        try:
            self.files = self._source.reopened()
            # The thread takes them: the kernel's signal goes to it, which blocks every signal.
            self.start()
        except (OSError, RuntimeError) as error:  # RuntimeError: no thread begins while the interpreter ends
            return self._refuse(f"{error}")
        finally:
            self._source = None
        self._alive.add(self)
        self._is_ready.wait()
        if self._refusal is None:
            with FileWatch._saves_lock:
                if FileWatch._forget_saves is None:
                    FileWatch._forget_saves = before_torch_save(FileWatch._before_torch_save)
        return self._refusal

    def guard(self, action: Callable[[], int]) -> bool:
        """Sets what has to be done before a file may change.

        Args:
            action: Takes what is needed out of the files, in the watching thread, and returns how many bytes.

        Returns:
            ``False`` if a writer came already, or the watch is over. Then the files may change at any time.
        """
        with self._lock:
            if not self._is_over.is_set():
                self._action = action
            return not self._is_over.is_set()

    def end(self) -> None:
        """Gives the leases back and closes the files. Calling it twice is fine, and from any thread or finalizer."""
        with self._lock:
            self._is_over.set()
            self._action = None
            for file in self.files.files if self.files is not None else ():
                # Closing would not do while a child that was not forked by Python has the descriptor too.
                with contextlib.suppress(OSError, ValueError):
                    fcntl.fcntl(file.fileno(), fcntl.F_SETLEASE, fcntl.F_UNLCK)
                file.close()
        self._forget_saves_with_the_last()

    def run(self) -> None:
        """Takes the leases and watches them."""
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        self._take()
        self._is_ready.set()
        while not self._is_over.wait(_POLL_SECONDS):
            if self._is_broken():
                self._give_way()

    def _take(self) -> None:
        assert self.files is not None
        # Without an owner the kernel sends SIGIO to the process when a lease breaks, which ends it.
        owner = struct.pack("ii", _OWNER_THREAD, threading.get_native_id())
        for file in self.files.files:
            kind = _file_system_of(file.fileno())
            if kind not in _LOCAL_FILE_SYSTEMS:
                self._refuse(f"on {kind or 'an unknown file system'} others may write to it unseen")
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
            for file in self.files.files if self.files is not None else ():
                try:
                    # What the kernel asks for while a break is pending is F_UNLCK, and so is what is left after it.
                    if not self._is_over.is_set() and fcntl.fcntl(file.fileno(), fcntl.F_GETLEASE) != fcntl.F_RDLCK:
                        return True
                except (OSError, ValueError):
                    return False  # a finalizer has just closed it
        return False

    def _give_way(self) -> None:
        failure: Exception | None = None
        copied, changed, name = 0, False, "A file"
        with self._giving_way:
            try:
                with self._lock:
                    action, files = self._action, self.files
                if files is not None and action is not None:
                    broken = [file.name for file in files.files if not file.is_open or _is_wanted(file.fileno())]
                    name = ", ".join(broken[:3]) or files.files[0].name
                    copied = action()
                    changed = bool(files.changed_files())
            except Exception as error:
                failure = error
            finally:
                self.end()
        if failure is not None or (changed and copied):
            warnings.warn(
                f"{name} is being rewritten in place, and its bytes could not all be taken out of it before "
                f"({failure or 'the kernel waits no longer than /proc/sys/fs/lease-break-time'}). Weights that were "
                "assigned from it may be wrong: load them again, with mode='copy'.",
                stacklevel=1,
            )
        elif copied:
            warnings.warn(
                f"{name} is being rewritten in place. Tensors that were pages of it keep their values, and take "
                f"{copied} bytes of memory now. Write a new file and rename it to this name, or load with mode='copy'.",
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
                watch._give_way()

    def _is_watching(self, status: os.stat_result) -> bool:
        with self._lock:
            if self.files is None or self._is_over.is_set():
                return False
            return any(os.path.samestat(os.fstat(file.fileno()), status) for file in self.files.files)

    @classmethod
    def _forget_saves_with_the_last(cls) -> None:
        with cls._saves_lock:
            if cls._forget_saves is not None and all(watch._is_over.is_set() for watch in list(cls._alive)):
                forget, FileWatch._forget_saves = cls._forget_saves, None
                forget()

    @classmethod
    def _before_fork(cls) -> None:
        for watch in list(cls._alive):
            watch._giving_way.acquire()
            cls._held_by_fork.append(watch._giving_way)

    @classmethod
    def _after_fork(cls) -> None:
        while cls._held_by_fork:
            cls._held_by_fork.pop().release()

    @classmethod
    def _in_child(cls) -> None:
        """Closes what the parent's leases hang on, without ending them: a child must not hold them when it is gone."""
        cls._saves_lock = threading.RLock()
        for watch in list(cls._alive):
            watch._lock = threading.RLock()
            watch._is_over.set()
            watch._action = None
            if watch.files is not None:
                watch.files.close()
        cls._forget_saves_with_the_last()
        cls._alive.clear()
        cls._held_by_fork.clear()


def _is_wanted(descriptor: int) -> bool:
    return fcntl.fcntl(descriptor, fcntl.F_GETLEASE) != fcntl.F_RDLCK


def _file_system_of(descriptor: int) -> str | None:
    """The kernel's name of the file system that an open file is on, ``None`` if it does not tell."""
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
