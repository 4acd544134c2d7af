"""Files of every other scheme that ``fsspec`` knows as a place: ``hf://``, ``memory://``, ``ftp://``, ``sftp://``, ...

The packages that fsspec needs for a scheme, credentials and options are those of its documentation.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import fsspec
from fsspec.core import url_to_fs

from lightning_memload.storage.options import storage_options
from lightning_memload.storage.source import Place, StoredFile

__all__ = ["FsspecFile", "FsspecPlace", "is_known"]

_T = TypeVar("_T")

_WINDOW_BYTES = 1 << 20
_VERSION_KEYS = ("ETag", "etag", "generation", "version_id", "LastModified", "last_modified", "mtime", "created", "oid")


def is_known(scheme: str) -> bool:
    """Whether fsspec knows a scheme, even if the package for it is not installed."""
    return scheme in fsspec.registry or scheme in fsspec.available_protocols()


class FsspecFile(StoredFile):
    """One file of a file system of fsspec, read with one request for each block.

    Args:
        system: The file system.
        key: The path in it.
        name: The URL, for messages.

    Raises:
        FileNotFoundError: There is no such file.
        OSError: It cannot be opened.
    """

    is_remote = True

    def __init__(self, system: Any, key: str, name: str) -> None:
        self.name = name
        self._system, self._key = system, key
        info = _told(name, lambda: system.info(key))
        if info.get("type") == "directory":
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), name)
        if info.get("size") is None:
            raise OSError(errno.ENOTSUP, "The server does not tell the size of the file. Download it first", name)
        self.size_bytes = int(info["size"])
        self._version = _version_of(info)
        self._window: tuple[int, bytes] = (0, b"")

    def readv(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Fills buffers from an offset, see :class:`ByteSource`."""
        wanted = min(sum(map(len, buffers)), self.size_bytes - offset)
        if wanted <= 0:
            return 0
        data = self._read(offset, wanted)
        done = 0
        for buffer in buffers:
            part = data[done : done + len(buffer)]
            buffer[: len(part)] = part
            done += len(part)
        return done

    def _read(self, offset: int, wanted: int) -> bytes:
        start, near = self._window
        if start <= offset and offset + wanted <= start + len(near):
            return near[offset - start : offset - start + wanted]
        end = min(self.size_bytes, offset + max(wanted, _WINDOW_BYTES))
        data: bytes = _told(self.name, lambda: self._system.cat_file(self._key, start=offset, end=end))
        if len(data) != end - offset:
            raise OSError(
                errno.EIO, f"The server sent {len(data)} of the {end - offset} bytes from {offset} on", self.name
            )
        if wanted < _WINDOW_BYTES:
            self._window = (offset, data)
        return data[:wanted]

    def is_changed(self) -> bool:
        """Whether another content is at the path since this file was opened, as far as the file system tells."""
        try:
            self._system.invalidate_cache()
            return _version_of(self._system.info(self._key)) != self._version
        except Exception:
            return False


class FsspecPlace(Place):
    """The file systems of fsspec."""

    def open(self, path: str, *, keep_open: bool = True) -> FsspecFile:
        """Opens a file, see :class:`Place`."""
        return FsspecFile(*_locate(path), path)

    def is_file(self, path: str) -> bool:
        """Whether there is a file at the path."""
        system, key = _locate(path)
        return bool(_told(path, lambda: system.isfile(key)))

    def is_folder(self, path: str) -> bool:
        """Whether the path is a folder."""
        system, key = _locate(path)
        return bool(_told(path, lambda: system.isdir(key)))

    def names_in(self, folder: str) -> list[str]:
        """The names in a folder, see :class:`Place`."""
        system, key = _locate(folder)
        found = _told(folder, lambda: system.ls(key, detail=False))
        return [name.rstrip("/").rpartition("/")[2] for name in found]

    def identity(self, path: str) -> object:
        """A value that is equal as long as the same content is at the path, as far as the file system tells."""
        system, key = _locate(path)
        system.invalidate_cache()
        return _version_of(_told(path, lambda: system.info(key)))


def _locate(path: str) -> tuple[Any, str]:
    try:
        system, key = url_to_fs(path, **storage_options())
    except (ImportError, ValueError) as error:
        raise OSError(errno.ENOTSUP, f"fsspec cannot open this URL: {error}", path) from error
    return system, key


def _told(path: str, ask: Callable[[], _T]) -> _T:
    """Makes a request. Every error becomes an error of the operating system that names the path."""
    try:
        return ask()
    except FileNotFoundError as error:
        raise FileNotFoundError(errno.ENOENT, "No such file", path) from error
    except PermissionError as error:
        raise PermissionError(errno.EACCES, f"The credentials do not allow this: {error}", path) from error
    except Exception as error:
        raise OSError(errno.EIO, f"{type(error).__name__}: {str(error).partition('?')[0]}", path) from error


def _version_of(info: Mapping[str, Any]) -> tuple[Any, ...]:
    return (info.get("size"), *(str(info[key]) for key in _VERSION_KEYS if key in info))
