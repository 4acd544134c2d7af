"""Buckets and web servers as a place: obstore reads them, and fsspec where obstore cannot.

obstore takes less CPU time for each byte. fsspec finds credentials that obstore does not look for (profiles of the
command line tools of a cloud), and takes other ``storage_options``. Where stock Lightning can load a checkpoint, fsspec
can read it.
"""

from __future__ import annotations

import errno
import functools
import importlib.util
import warnings
from collections.abc import Callable
from typing import TypeVar

from lightning_memload.errors import UnmappableCheckpointError
from lightning_memload.storage.object_store import ObjectStore
from lightning_memload.storage.source import Place, StoredFile

__all__ = ["Buckets"]

_T = TypeVar("_T")


class Buckets(Place):
    """Chooses the library for each bucket, when it is first used."""

    def __init__(self) -> None:
        self._objects = ObjectStore()
        self._with_fsspec: set[str] = set()

    def open(self, path: str, *, keep_open: bool = True) -> StoredFile:
        """Opens a file, see :class:`Place`."""
        return self._ask(path, lambda place: place.open(path, keep_open=keep_open))

    def is_file(self, path: str) -> bool:
        """Whether there is a file at the path."""
        return self._ask(path, lambda place: place.is_file(path))

    def is_folder(self, path: str) -> bool:
        """Whether the path is a folder."""
        return self._ask(path, lambda place: place.is_folder(path))

    def names_in(self, folder: str) -> list[str]:
        """The names in a folder, see :class:`Place`."""
        return self._ask(folder, lambda place: place.names_in(folder))

    def identity(self, path: str) -> object:
        """A value that is equal as long as the same content is at the path."""
        return self._ask(path, lambda place: place.identity(path))

    def size_of(self, path: str, *, follow_links: bool = True) -> int | None:
        """The size of a file in bytes, see :class:`Place`."""
        return self._ask(path, lambda place: place.size_of(path, follow_links=follow_links))

    def _ask(self, path: str, ask: Callable[[Place], _T]) -> _T:
        bucket = "/".join(path.split("/")[:3])
        # obstore would encode the query of a signed URL.
        if bucket in self._with_fsspec or "?" in path or not _has_obstore():
            return ask(_fsspec())
        try:
            return ask(self._objects)
        except (FileNotFoundError, NotADirectoryError, UnmappableCheckpointError):
            raise
        except OSError as error:
            if error.errno == errno.ESTALE:
                raise
            try:
                result = ask(_fsspec())
            except Exception:  # Its package is not installed, or it cannot either.
                raise error from None
            reason = error
        self._with_fsspec.add(bucket)
        warnings.warn(f"obstore cannot read {bucket}, and fsspec can, with more CPU time: {reason}", stacklevel=4)
        return result


@functools.cache
def _fsspec() -> Place:
    from lightning_memload.storage.fsspec_files import FsspecPlace

    return FsspecPlace()


@functools.cache
def _has_obstore() -> bool:
    return importlib.util.find_spec("obstore") is not None
