"""Replaces a file or a directory by a new one in one atomic step, or leaves nothing behind.

The new content is written to a temporary sibling, which is renamed when it is complete. So a reader finds the complete
old content or the complete new one at every moment. A writer holds a file lock on its temporary sibling as long as it
lives. A temporary sibling without a lock is a leftover of a killed writer, and the next writer removes it.
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

from lightning_memload.storage.descriptors import OwnDescriptors
from lightning_memload.storage.local import boot_id

if sys.platform != "win32":
    import fcntl

__all__ = ["Replacement", "SetAside", "put_back", "remove_leftovers"]

_NAME = re.compile(r"\.memload-(?P<boot>[0-9a-f]{8})-[0-9a-f]{16}\.tmp")
_NUM_TRIES = 100
# On some network file systems a lock is visible on its own machine only. A temporary sibling of another machine counts
# as a leftover if it has not changed for this long.
_FOREIGN_LEFTOVER_SECONDS = 3600.0
# From linux/fs.h and linux/fcntl.h. The standard library has no names for them.
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


class Replacement:
    """A temporary sibling of ``path``, a file or a directory, that replaces ``path`` on :meth:`commit`.

    The temporary file is open for writing. Permission bits are those that ``open`` or ``mkdir`` give. Use it as a
    context manager: the exit removes the temporary sibling unless it was committed. The constructor removes leftovers
    of killed writers in the same directory.

    A directory replaces another one by one atomic exchange where Linux and the file system support it (ext4, xfs,
    btrfs, tmpfs, overlay). Elsewhere the old directory is renamed to ``.<name>.<digits>.previous`` first. If the
    process is killed between the two renames, nothing is at ``path``, the old directory is complete under that name,
    and the next replacement restores it.

    Args:
        path: The file or directory to replace or to create. A symbolic link is replaced, not its target.
        is_directory: Create a directory instead of a file.
        over_directory: Allow a file to replace a directory with everything in it.

    Attributes:
        path: The file or directory to replace or to create.
        temporary_path: The path of the temporary sibling.
        descriptor: The open descriptor of the temporary sibling.
        is_committed: Whether the new content is at ``path``.

    Raises:
        IsADirectoryError: ``path`` is a directory and a file must not replace it.
        FileExistsError: ``path`` is a device, a pipe or a socket.
        OSError: The parent directory does not exist, or writing to it is not allowed.
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
        """Renames the temporary sibling to ``path``. It replaces what is there.

        Args:
            durable: Return only when content and name are on the disk, so that they survive a power failure. If
                ``False``, the kernel writes both later, the name possibly first, or :meth:`settle` syncs them. In both
                cases other processes see the content at once, and it survives the end of this process.
            names: The files and folders in a directory to sync if ``durable`` is set, see :meth:`settle`.

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
        """Syncs content and name to the disk, after a :meth:`commit` with ``durable=False``.

        Args:
            names: The files and folders in a directory, relative to it. Missing ones are skipped: the checkpoint has
                been removed or replaced since.

        Raises:
            OSError: The disk failed.
        """
        self._sync(names)
        with contextlib.suppress(FileNotFoundError):
            _sync_directory(self._parent)

    def _sync(self, names: Sequence[str]) -> None:
        for name in names:
            try:
                # Opened relative to the directory's descriptor: its path may have changed.
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
        """Removes what has the temporary name: the new content, or the old directory after an exchange.

        A second call does nothing.
        """
        if self.descriptor < 0:
            return
        try:
            with contextlib.suppress(OSError):
                _remove(self.temporary_path)
        finally:
            # The lock ends last: until then no other writer takes the temporary sibling for a leftover.
            OwnDescriptors.close(self.descriptor)
            self.descriptor = -1

    def __enter__(self) -> Replacement:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class SetAside:
    """A checkpoint under a temporary name, to be removed or renamed back later.

    The constructor renames it, so the old name is free at once. If this process ends before :meth:`remove` or
    :meth:`give_back`, the next writer removes the checkpoint as a leftover.

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
        # A writer on another machine does not see the lock. It checks the modification time.
        with contextlib.suppress(OSError):
            os.utime(self._temporary_path)
        with contextlib.suppress(OSError):
            self._descriptor = OwnDescriptors.open(self._temporary_path, os.O_RDONLY | os.O_NOFOLLOW)
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def remove(self) -> None:
        """Removes the content. Never raises: the next writer removes what is left."""
        with contextlib.suppress(OSError):
            _remove(self._temporary_path)
        self._unlock()

    def give_back(self) -> None:
        """Renames the content back. Removes it instead if its name is in use again. Never raises."""
        with contextlib.suppress(OSError):
            if os.path.lexists(self.path):
                _remove(self._temporary_path)
            else:
                os.rename(self._temporary_path, self.path)
        self._unlock()

    def _unlock(self) -> None:
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
    """Removes temporary siblings of dead writers from a directory. Keeps those of live writers, and doubtful ones.

    Never raises: saving must work in a directory that can be written to but not listed.
    """
    found: list[tuple[str, str]] = []
    with contextlib.suppress(OSError), os.scandir(directory) as entries:
        found = [(entry.path, match["boot"]) for entry in entries if (match := _NAME.fullmatch(entry.name))]
    for path, boot in found:
        with contextlib.suppress(OSError):
            _remove_if_leftover(path, is_foreign=boot != _boot())


def put_back(path: str) -> None:
    """Restores the name of a checkpoint that a killed writer had renamed. Removes it if the name is in use again."""
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
            continue  # another writer removed it as a leftover
        # Some file systems have no locks. There no writer gets a lock, and leftovers are never removed.
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        # Before this writer got the lock, another one may have locked and removed it as a leftover.
        if _is_at(descriptor, path):
            return path, descriptor
        OwnDescriptors.close(descriptor)
    raise OSError(errno.EBUSY, f"another process removes each temporary file in {parent} right after it is created")


def _temporary_path(parent: str) -> str:
    return os.path.join(parent, f".memload-{_boot()}-{secrets.token_hex(8)}.tmp")


@contextlib.contextmanager
def _locked(path: str) -> Iterator[int]:
    """Locks a file or directory that has no live writer. Yields its descriptor.

    Raises:
        OSError: A live writer holds the lock, the file system has no locks, or the path is a link.
    """
    flags = os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        # Some network file systems lock only files that are open for writing.
        descriptor = OwnDescriptors.open(path, os.O_RDWR | flags)
    except IsADirectoryError:
        descriptor = OwnDescriptors.open(path, os.O_RDONLY | os.O_DIRECTORY | flags)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield descriptor
    finally:
        OwnDescriptors.close(descriptor)


def _remove_if_leftover(path: str, *, is_foreign: bool) -> None:
    with _locked(path) as descriptor:
        if is_foreign and time.time() - _last_modified(path) < _FOREIGN_LEFTOVER_SECONDS:
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


def _last_modified(path: str) -> float:
    """The latest modification time of a file, or of a directory and its direct entries, in seconds."""
    changed = os.lstat(path).st_mtime
    if os.path.isdir(path):
        with os.scandir(path) as entries:
            changed = max([changed, *(entry.stat(follow_symlinks=False).st_mtime for entry in entries)])
    return changed


def _boot() -> str:
    """Identifies this machine since its last boot. Locks of other machines are not always visible."""
    return (boot_id() or "0" * 8)[:8]


def _sync_directory(directory: str) -> None:
    try:
        descriptor = OwnDescriptors.open(directory, os.O_RDONLY)
    except PermissionError:
        return  # the directory can be written to but not opened, so it cannot be synced
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems cannot sync a directory.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        OwnDescriptors.close(descriptor)


def _put_in_place(new: str, target: str) -> None:
    """Renames the new file or directory to the target. What was there gets the name of the new one, or is removed."""
    try:
        os.rename(new, target)  # enough if nothing, an empty directory, or (for a file) a file is at the target
    except OSError as error:
        # The target is a directory that is not empty, or one of the two is a directory and the other is not.
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR, errno.EISDIR):
            raise
        if not _exchange(new, target):
            _replace_in_two_steps(new, target)


def _exchange(first: str, second: str) -> bool:
    """Exchanges two names in one atomic step (``renameat2`` of Linux). ``False`` where this is not supported."""
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
        # Without the lock another writer would take the renamed directory for a leftover of a killed writer.
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
