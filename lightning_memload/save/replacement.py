"""A file or a directory that takes the place of another in one step, or leaves nothing behind.

The new content goes to a temporary sibling that gets the name when it is complete, so that at every moment a reader
finds the old one or the new one, whole. A writer holds a lock on its temporary sibling as long as it lives; what a
killed writer left is told by the lock being free, and removed by the next one.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import secrets
import shutil
import stat
import sys
import time
from collections.abc import Iterator, Sequence

from lightning_memload.save.descriptors import OwnDescriptors

if sys.platform != "win32":
    import fcntl

__all__ = ["Replacement", "SetAside", "put_back", "remove_leftovers"]

_NAME = re.compile(r"\.memload-(?P<boot>[0-9a-f]{8})-[0-9a-f]{16}\.tmp")
_NUM_TRIES = 100
# On some network file systems a lock is seen on its own machine only. From another one, what nobody has written to for
# so long counts as left.
_FOREIGN_LEFTOVER_SECONDS = 3600.0
# From linux/fs.h and linux/fcntl.h; the standard library names neither.
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


class Replacement:
    """A temporary file, open for writing, or a temporary directory, that is to replace ``path``.

    It has the permission bits of what ``open`` or ``mkdir`` creates. Use as a context manager: leaving it removes the
    temporary sibling unless :meth:`commit` has put it in its place. Leftovers beside it are removed first.

    A directory takes the place of another by one atomic exchange where Linux and the file system know it (ext4, xfs,
    btrfs, tmpfs, overlay). Elsewhere the old one is renamed away first: a process that is killed right then leaves
    nothing at ``path``, the old directory complete under ``.<name>.<digits>.previous`` beside it, and the next
    replacement puts it back.

    Args:
        path: What to replace, or to create. A symbolic link is replaced itself, not what it points to.
        is_directory: Make a directory.
        over_directory: Let a file replace a directory, whatever is in it, as a directory replaces what it finds.

    Attributes:
        path: The same.
        temporary_path: Where the content goes.
        descriptor: Of the temporary sibling.
        is_committed: Whether it has its place.

    Raises:
        IsADirectoryError: A file is to replace a directory.
        FileExistsError: ``path`` is a device, a pipe or a socket, which nobody wants replaced.
        OSError: There is no directory to write to, or writing to it is not allowed.
    """

    def __init__(self, path: str, *, is_directory: bool = False, over_directory: bool = False) -> None:
        self._may_exchange = is_directory or over_directory
        if not self._may_exchange and os.path.isdir(path) and not os.path.islink(path):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        if _is_special(path):
            raise FileExistsError(errno.EEXIST, "A device, a pipe or a socket is not replaced", path)
        self.path = path
        self.is_committed = False
        self._parent = os.path.dirname(path) or "."
        remove_leftovers(self._parent)
        self.temporary_path, self.descriptor = _create(self._parent, is_directory=is_directory)

    def commit(self, *, durable: bool, names: Sequence[str] = ()) -> None:
        """Puts it in its place.

        Args:
            durable: Return only when content and name are on the disk, so that they survive a power failure. Without,
                both reach the disk when the kernel finds time, the name possibly first, or by :meth:`settle`. Other
                processes see the content at once, and it survives the end of this one.
            names: The files and directories in a directory that ``durable`` is about, see :meth:`settle`.

        Raises:
            OSError: The disk failed, or ``path`` cannot be replaced.
        """
        if durable:
            self._sync(names)
        if self._may_exchange:
            _put_in_place(self.temporary_path, self.path)
        else:
            os.replace(self.temporary_path, self.path)
        self.is_committed = True
        if durable:
            _sync_directory(self._parent)

    def settle(self, names: Sequence[str] = ()) -> None:
        """Returns when content and name are on the disk, after a :meth:`commit` that was not durable.

        Args:
            names: The files and directories in a directory, relative to it. One that is gone is passed over: the
                checkpoint has been removed or replaced since.

        Raises:
            OSError: The disk failed.
        """
        self._sync(names)
        with contextlib.suppress(FileNotFoundError):
            _sync_directory(self._parent)

    def _sync(self, names: Sequence[str]) -> None:
        for name in names:
            try:
                # Not by its path: the directory may have another one by now.
                descriptor = OwnDescriptors.open(name, os.O_RDONLY, dir_fd=self.descriptor)
            except FileNotFoundError:
                if not self.is_committed:
                    raise
                continue
            try:
                os.fsync(descriptor)
            finally:
                OwnDescriptors.close(descriptor)
        os.fsync(self.descriptor)

    def close(self) -> None:
        """Removes what has the temporary name: ours, or the old directory after an exchange. Twice is fine."""
        if self.descriptor < 0:
            return
        try:
            with contextlib.suppress(OSError):
                _remove(self.temporary_path)
        finally:
            # What is locked counts as somebody's, and is never removed.
            OwnDescriptors.close(self.descriptor)
            self.descriptor = -1

    def __enter__(self) -> Replacement:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class SetAside:
    """A checkpoint that has lost its name, and is removed later or gets its name back.

    The name is free at once. The content has a temporary name, and a writer that comes after the end of this process
    removes it as a leftover.

    Args:
        path: A file or a directory.

    Raises:
        OSError: It cannot be renamed.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._temporary_path = _temporary_path(os.path.dirname(path) or ".")
        self._descriptor = -1
        os.rename(path, self._temporary_path)
        # A writer on another machine does not see the lock, and goes by the time.
        with contextlib.suppress(OSError):
            os.utime(self._temporary_path)
        with contextlib.suppress(OSError):
            self._descriptor = OwnDescriptors.open(self._temporary_path, os.O_RDONLY | os.O_NOFOLLOW)
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def remove(self) -> None:
        """Removes the content. Raises nothing: what is left is removed by the next writer."""
        with contextlib.suppress(OSError):
            _remove(self._temporary_path)
        self._let_go()

    def give_back(self) -> None:
        """Gives the content its name again, unless something else has it by now. Raises nothing."""
        with contextlib.suppress(OSError):
            if os.path.lexists(self.path):
                _remove(self._temporary_path)
            else:
                os.rename(self._temporary_path, self.path)
        self._let_go()

    def _let_go(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            OwnDescriptors.close(descriptor)


def _is_special(path: str) -> bool:
    try:
        mode = os.lstat(path).st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode) or stat.S_ISLNK(mode))


def remove_leftovers(directory: str) -> None:
    """Removes what writers that are dead left behind. That of live writers stays, and whatever is in doubt.

    Raises nothing: a directory that can be written to but not listed is no reason not to save.
    """
    found: list[tuple[str, str]] = []
    with contextlib.suppress(OSError), os.scandir(directory) as entries:
        found = [(entry.path, match["boot"]) for entry in entries if (match := _NAME.fullmatch(entry.name))]
    for path, boot in found:
        with contextlib.suppress(OSError):
            _remove_if_left(path, is_foreign=boot != _boot())


def put_back(path: str) -> None:
    """Gives back its name to a checkpoint that a killed writer had renamed away, unless something else has it now."""
    parent, name = os.path.split(path)
    with contextlib.suppress(OSError), os.scandir(parent or ".") as entries:
        for entry in list(entries):
            if not re.fullmatch(rf"\.{re.escape(name)}\.[0-9a-f]{{12}}\.previous", entry.name):
                continue
            with contextlib.suppress(OSError), _locked(entry.path):
                if os.path.lexists(path):
                    _remove(entry.path)
                else:
                    os.rename(entry.path, path)


def _create(parent: str, *, is_directory: bool) -> tuple[str, int]:
    """Creates and locks a temporary file or directory."""
    flags = os.O_RDONLY | os.O_DIRECTORY if is_directory else os.O_RDWR | os.O_CREAT | os.O_EXCL
    for _ in range(_NUM_TRIES):
        path = _temporary_path(parent)
        if is_directory:
            os.mkdir(path)
        try:
            descriptor = OwnDescriptors.open(path, flags | os.O_NOFOLLOW, 0o666)
        except FileNotFoundError:
            if not is_directory or not os.path.isdir(parent):
                raise
            continue  # taken for a leftover
        # Not every file system has locks. There nobody gets one, and nothing is removed.
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        # Somebody may have taken it for a leftover, and locked it to remove it, before we did.
        if _is_at(descriptor, path):
            return path, descriptor
        OwnDescriptors.close(descriptor)
    raise OSError(errno.EBUSY, f"temporary files in {parent} are removed as fast as they are made")


def _temporary_path(parent: str) -> str:
    return os.path.join(parent, f".memload-{_boot()}-{secrets.token_hex(8)}.tmp")


@contextlib.contextmanager
def _locked(path: str) -> Iterator[int]:
    """Holds the lock of an abandoned file or directory; yields its descriptor.

    Raises:
        OSError: A live writer holds it, there are no locks here, or it is a link.
    """
    flags = os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        # Some network file systems lock only what is open for writing.
        descriptor = OwnDescriptors.open(path, os.O_RDWR | flags)
    except IsADirectoryError:
        descriptor = OwnDescriptors.open(path, os.O_RDONLY | os.O_DIRECTORY | flags)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield descriptor
    finally:
        OwnDescriptors.close(descriptor)


def _remove_if_left(path: str, *, is_foreign: bool) -> None:
    with _locked(path) as descriptor:
        if is_foreign and time.time() - _last_change(path) < _FOREIGN_LEFTOVER_SECONDS:
            return
        if _is_at(descriptor, path):
            _remove(path)


def _remove(path: str) -> None:
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        os.unlink(path)


def _is_at(descriptor: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False


def _last_change(path: str) -> float:
    """When a file, or a directory or anything directly in it, was written to."""
    changed = os.lstat(path).st_mtime
    if os.path.isdir(path):
        with os.scandir(path) as entries:
            changed = max([changed, *(entry.stat(follow_symlinks=False).st_mtime for entry in entries)])
    return changed


def _boot() -> str:
    """Names this run of this machine: a lock of another one is not always seen."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read(8)
    except OSError:
        return "0" * 8


def _sync_directory(directory: str) -> None:
    try:
        descriptor = OwnDescriptors.open(directory, os.O_RDONLY)
    except PermissionError:
        return  # it can be written to, but not read: then nobody but the kernel can sync it
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems have no such thing.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        OwnDescriptors.close(descriptor)


def _put_in_place(new: str, target: str) -> None:
    """Gives the new file or directory the target's name, and what has that, if anything, the name of the new."""
    try:
        os.rename(new, target)  # the name is free, or an empty directory has it, or a file for a file
    except OSError as error:
        # A directory with something in it, or a file or a link for a directory, or a directory for a file.
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR, errno.EISDIR):
            raise
        if not _exchange(new, target):
            _replace_in_two_steps(new, target)


def _exchange(first: str, second: str) -> bool:
    """Exchanges two names in one step (``renameat2``, Linux); ``False`` where that cannot be done."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    if call(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM):
        return False
    raise OSError(code, os.strerror(code), second)


def _replace_in_two_steps(new: str, target: str) -> None:
    parent, name = os.path.split(target)
    previous = os.path.join(parent, f".{name}.{secrets.token_hex(6)}.previous")
    with contextlib.ExitStack() as stack:
        # Else another writer would take it for what a killed one left.
        with contextlib.suppress(OSError):
            stack.enter_context(_locked(target))
        os.rename(target, previous)
        try:
            os.rename(new, target)
        except BaseException:
            os.rename(previous, target)
            raise
        _sync_directory(parent)
        _remove(previous)
