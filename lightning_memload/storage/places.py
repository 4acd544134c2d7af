"""The places that checkpoints are at, and their registry. A new place needs one file with a class, and one entry here.

A path is a local path, or a URL whose scheme is in :data:`PLACES`. Every room above opens, lists and compares paths
through the functions of this module. Names within a folder are joined to its path with ``/``, in URLs too, so the
functions of ``os.path`` that only split and join text serve both.

A :class:`Place` must be able to read. Two more abilities are optional. If the kernel can map its files,
:meth:`Place.open` returns a :class:`LocalFile`. Only the local disk can replace a checkpoint in one step.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import re
from collections.abc import Callable
from urllib.parse import unquote, urlsplit

from lightning_memload.storage.buckets import Buckets
from lightning_memload.storage.local import LocalDisk
from lightning_memload.storage.source import Place, StoredFile

__all__ = [
    "PLACES",
    "held",
    "identity_of",
    "is_file",
    "is_folder",
    "is_link",
    "is_local",
    "names_in",
    "open_file",
    "path_of",
    "read_start",
    "size_of",
]

_LOCAL_SCHEMES = ("file", "local")
_URL = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]+)://")


_LOCAL: Place = LocalDisk()
# The places by the scheme of their URLs, in small letters. fsspec is asked for all other schemes.
PLACES: dict[str, Place] = dict.fromkeys(
    ("s3", "s3a", "gs", "az", "azure", "abfs", "abfss", "http", "https"), Buckets()
)


def path_of(path: str | os.PathLike[str]) -> str:
    """The path of a checkpoint, from what a user gives: a local path, a ``file://`` URL, or the URL of a place.

    Raises:
        TypeError: It is not a path, but for example an open file.
        FileNotFoundError: It is a URL of an unknown scheme.
    """
    try:
        name = os.fsdecode(os.fspath(path))
    except TypeError as error:
        advice = " Give its path, or save its content to a file." if hasattr(path, "read") else ""
        raise TypeError(
            f"A checkpoint is given by its path, a str or an os.PathLike, got a {type(path).__name__}.{advice}"
        ) from error
    if not _URL.match(name) or not is_local(name):
        return name
    parts = urlsplit(name)
    if parts.scheme.lower() in _LOCAL_SCHEMES and parts.netloc in ("", "localhost"):
        return unquote(parts.path)
    if os.path.lexists(name):
        return name
    raise FileNotFoundError(errno.ENOENT, "Not a local file; copy it to a local disk first", name)


def is_local(path: str) -> bool:
    """Whether a path is on the local disk."""
    return _place_of(path) is _LOCAL


def _place_of(path: str) -> Place:
    if "://" not in path or (url := _URL.match(path)) is None:
        return _LOCAL
    scheme = url[1].lower()
    if scheme in PLACES:
        return PLACES[scheme]
    return _LOCAL if scheme in _LOCAL_SCHEMES else _other_place(scheme)


@functools.cache
def _other_place(scheme: str) -> Place:
    from lightning_memload.storage.fsspec_files import FsspecPlace, is_known

    return FsspecPlace() if is_known(scheme) else _LOCAL


def open_file(path: str, *, keep_open: bool = True) -> StoredFile:
    """Opens a file, see :meth:`Place.open`."""
    return _place_of(path).open(path, keep_open=keep_open)


def is_file(path: str) -> bool:
    """Whether there is a file at the path. ``False`` for a pipe and the like: opening one would block."""
    return _place_of(path).is_file(path)


def is_folder(path: str) -> bool:
    """Whether the path is a folder."""
    return _place_of(path).is_folder(path)


def is_link(path: str) -> bool:
    """Whether the path is a link to another one."""
    return _place_of(path).is_link(path)


def names_in(folder: str) -> list[str]:
    """The names in a folder, in any order.

    Raises:
        OSError: It cannot be listed.
    """
    return _place_of(folder).names_in(folder)


def size_of(path: str, *, follow_links: bool = True) -> int | None:
    """The size of a file in bytes. ``None`` for a folder, a pipe, and a link that is not followed.

    Raises:
        FileNotFoundError: Nothing is at the path.
    """
    return _place_of(path).size_of(path, follow_links=follow_links)


def identity_of(path: str) -> object:
    """A value that is equal as long as the same content is at the path.

    Raises:
        FileNotFoundError: Nothing is at the path.
        OSError: The path cannot be examined.
    """
    return _place_of(path).identity(path)


def held(path: str) -> contextlib.AbstractContextManager[Callable[[], bool | None]]:
    """A context in which a replacement of a file or folder is noticed, see :meth:`Place.held`."""
    return _place_of(path).held(path)


def read_start(path: str, nbytes: int) -> bytes:
    """The first bytes of a file; fewer if it is shorter.

    Raises:
        OSError: It cannot be read.
    """
    with open_file(path) as file:
        return file.pread(nbytes, 0)
