"""Objects in a bucket, or behind a web server, as a place: ``s3://``, ``gs://``, ``az://``, ``http(s)://``.

The requests are made by ``obstore`` (the extra ``remote``), which finds credentials, regions and endpoints as its
documentation says. An object is pinned by its first request: every later request is for the same version of it
(``If-Match``), and a reply from another version is refused. A read that breaks off returns what has arrived, and the
caller asks for the rest.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from lightning_memload.errors import UnmappableCheckpointError
from lightning_memload.storage.options import storage_options
from lightning_memload.storage.source import Place, StoredFile

__all__ = ["ObjectFile", "ObjectStore"]

_T = TypeVar("_T")

# A small read brings so many bytes, and so does the first request of an object: most headers are there.
_WINDOW_BYTES = 64 << 10
_WINDOWS = 8
# A small read near the end of an object brings so many: there is the directory of a zip archive.
_TAIL_BYTES = 1 << 20
# A reply is taken from the library in parts of this size. Each thread that reads has one of them.
_PART_BYTES = 256 << 10
# The library tries again itself until a reply begins. This is for a reply that breaks off without a byte.
_ATTEMPTS = 6
_FIRST_PAUSE_SECONDS = 0.2
# Several formats look at the same object, one after the other. Each holds up to 2 MiB of it.
_REMEMBERED_SECONDS = 5.0
_REMEMBERED = 4
# The parts of storage_options that obstore takes beside the configuration of a store.
_ARGUMENTS = ("config", "client_options", "retry_config", "credential_provider")
_WEB = ("http://", "https://")
_SECRETS = re.compile(r"\?[^\s\"')]+")


class _ObjectVersion(NamedTuple):
    """What tells one version of an object from another."""

    e_tag: str | None
    last_modified: object
    size: int


class _BrokenReply(Exception):
    """A reply that is not what was asked for."""


class ObjectFile(StoredFile):
    """One version of one object.

    Args:
        store: The store of ``obstore``.
        key: The name of the object in it.
        name: The URL, for messages.

    Raises:
        FileNotFoundError: There is no such object.
        PermissionError: The credentials are missing, expired, or not sufficient.
        OSError: The request failed for another reason.
    """

    is_remote = True

    def __init__(self, store: Any, key: str, name: str) -> None:
        self.name = name
        self._store, self._key = store, key
        self._lock = threading.Lock()
        self._version: _ObjectVersion | None = None
        self._windows: OrderedDict[int, bytes] = OrderedDict()
        self._windows[0] = self._read_head()
        assert self._version is not None
        self.size_bytes = self._version.size

    def _read_head(self) -> bytes:
        reply = _told(self.name, "GET", lambda: self._get(0, _WINDOW_BYTES))
        if reply is None:
            # An empty object has no range at all, and no other store refuses its first bytes.
            meta = _told(self.name, "HEAD", lambda: _obstore().head(self._store, self._key))
            self._version = _version_of(meta)
            if self._version.size:
                raise UnmappableCheckpointError(
                    f"{self.name}: the server sends whole files only, no ranges of bytes. Download the file, or serve "
                    "it from a server with ranges.",
                    path=self.name,
                )
            return b""
        self._version = _version_of(reply.meta)
        head = memoryview(bytearray(min(_WINDOW_BYTES, self._version.size)))
        arrived = [0]
        with contextlib.suppress(_obstore().exceptions.BaseError):
            _fill([head], reply.stream(min_chunk_size=_PART_BYTES), arrived, len(head))
        while arrived[0] < len(head):
            arrived[0] += self._fetch([head[arrived[0] :]], arrived[0], len(head) - arrived[0])
        return bytes(head)

    def readv(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Fills buffers from an offset, see :class:`ByteSource`."""
        wanted = min(sum(map(len, buffers)), self.size_bytes - offset)
        if wanted <= 0:
            return 0
        near = self._near(offset, wanted)
        return _fill(buffers, [near]) if near is not None else self._fetch(buffers, offset, wanted)

    def _near(self, offset: int, wanted: int) -> memoryview | None:
        """Bytes that a request has already brought, or that one request brings with their neighbours."""
        with self._lock:
            for start, known in self._windows.items():
                if start <= offset and offset + wanted <= start + len(known):
                    return memoryview(known)[offset - start : offset - start + wanted]
        if wanted > _WINDOW_BYTES:
            return None
        at_end = offset >= self.size_bytes - _TAIL_BYTES
        start = max(0, self.size_bytes - _TAIL_BYTES) if at_end else offset
        data = bytearray(min(_TAIL_BYTES if at_end else _WINDOW_BYTES, self.size_bytes - start))
        done = 0
        while done < len(data):
            done += self._fetch([memoryview(data)[done:]], start + done, len(data) - done)
        with self._lock:
            self._windows[start] = bytes(data)
            while len(self._windows) > _WINDOWS:
                # The beginning and the end of the object are asked for again and again.
                del self._windows[next(s for s, known in self._windows.items() if s and len(known) <= _WINDOW_BYTES)]
        return memoryview(data)[offset - start : offset - start + wanted]

    def _fetch(self, buffers: Sequence[memoryview], offset: int, wanted: int) -> int:
        """Asks for a range. Returns the number of bytes that have arrived: all, or those before a reply broke off."""
        words = f"GET bytes={offset}-{offset + wanted - 1}"
        for attempt in range(_ATTEMPTS):
            arrived: list[int] = [0]
            try:
                reply = _told(self.name, words, lambda: self._get(offset, offset + wanted))
                if reply is None:
                    raise OSError(errno.EIO, f"{words}: the object has no such range", self.name)
                self._require_same(reply, words)
                _fill(buffers, reply.stream(min_chunk_size=_PART_BYTES), arrived, wanted)
                if arrived[0] == wanted:
                    return wanted
                reason = "it ended too early"
            except (_obstore().exceptions.BaseError, _BrokenReply) as error:
                reason = _reason(error)
            if arrived[0]:
                return arrived[0]
            time.sleep(_FIRST_PAUSE_SECONDS * 2**attempt)
        raise OSError(errno.EIO, f"{words} brought nothing {_ATTEMPTS} times: {reason}", self.name)

    def _get(self, start: int, end: int) -> Any:
        """The reply to a request for a range. ``None`` if the object has no such range, or the server has none."""
        options: dict[str, Any] = {"range": (start, end)}
        e_tag = self._version.e_tag if self._version is not None else None
        if e_tag is not None and not e_tag.startswith("W/"):  # A weak tag matches nothing.
            options["if_match"] = e_tag
        try:
            return _obstore().get(self._store, self._key, options=options)
        except _obstore().exceptions.NotSupportedError:
            return None
        except _obstore().exceptions.GenericError as error:
            if "416" in str(error):
                return None
            if str(error).partition("error: ")[2].startswith("Requested "):
                raise _BrokenReply(_reason(error)) from error  # Another range came.
            raise

    def _require_same(self, reply: Any, words: str) -> None:
        version = _version_of(reply.meta)
        if version != self._version:
            raise OSError(
                errno.ESTALE,
                f"{words}: the object was replaced since it was opened. Start again, and it is read anew",
                self.name,
            )


class ObjectStore(Place):
    """The objects of the stores that ``obstore`` knows."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._remembered: OrderedDict[object, tuple[float, Any]] = OrderedDict()

    def open(self, path: str, *, keep_open: bool = True) -> ObjectFile:
        """Opens an object. The first request is made here, see :class:`ObjectFile`."""
        return self._remember(("file", path), lambda: ObjectFile(*_locate(path), path))

    def is_file(self, path: str) -> bool:
        """Whether there is an object of this name."""
        if path.endswith("/"):
            return False
        try:
            self.open(path)
        except FileNotFoundError:
            return False
        return True

    def is_folder(self, path: str) -> bool:
        """Whether names of objects begin with the path and a ``/``, and none is the path. A web server has no lists."""
        try:
            return not self.is_file(path) and bool(self.names_in(path))
        except NotADirectoryError:
            return False

    def names_in(self, folder: str) -> list[str]:
        """The names directly below a folder, see :class:`Place`."""
        return list(self._remember(("names", folder.rstrip("/")), lambda: _list(folder)))

    def identity(self, path: str) -> object:
        """The version of an object, or the versions of all objects directly below a folder. Always asks the server."""
        store, key = _locate(path)
        try:
            return _version_of(_told(path, "HEAD", lambda: _obstore().head(store, key)))
        except FileNotFoundError:
            found = _list_entries(path) if not path.startswith(_WEB) else ([], [])
            if not any(found):
                raise
            return found

    def size_of(self, path: str, *, follow_links: bool = True) -> int | None:
        """The size of an object in bytes, see :class:`Place`."""
        try:
            return self.open(path).size_bytes
        except FileNotFoundError:
            if self.is_folder(path):
                return None
            raise

    def _remember(self, name: object, make: Callable[[], _T]) -> _T:
        """The result of a request, also if the same was asked a moment ago with the same options."""
        key = (name, repr(storage_options()))
        now = time.monotonic()
        with self._lock:
            for old in [old for old, (made, _) in self._remembered.items() if now - made > _REMEMBERED_SECONDS]:
                del self._remembered[old]
            if key in self._remembered:
                return self._remembered[key][1]  # type: ignore[no-any-return]
        result = make()
        with self._lock:
            self._remembered[key] = (now, result)
            while len(self._remembered) > _REMEMBERED:
                self._remembered.popitem(last=False)
        return result


def _list(folder: str) -> list[str]:
    objects, folders = _list_entries(folder)
    key = _locate(folder)[1].rstrip("/")
    start = len(key) + 1 if key.strip("/") else 0
    names = [name[start:] for name, _ in objects] + [name[start:].rstrip("/") for name in folders]
    return [name for name in names if name]


def _list_entries(folder: str) -> tuple[list[tuple[str, object]], list[str]]:
    """The objects directly below a folder with their versions, and the folders."""
    if folder.startswith(_WEB):
        raise NotADirectoryError(errno.ENOTDIR, "A web server gives no list of its files", folder)
    store, key = _locate(folder)
    prefix = key.rstrip("/") + "/" if key.strip("/") else None
    found = _told(folder, "LIST", lambda: _obstore().list_with_delimiter(store, prefix))
    return [(entry["path"], _version_of(entry)) for entry in found["objects"]], list(found["common_prefixes"])


def _locate(path: str) -> tuple[Any, str]:
    """The store of a URL, and the name of the object in it."""
    scheme, _, rest = path.partition("://")
    bucket, _, key = rest.partition("/")
    options = dict(storage_options())
    arguments = {name: options.pop(name) for name in _ARGUMENTS if name in options}
    if scheme == "http":
        # Who writes http:// means it.
        arguments["client_options"] = {"allow_http": True, **arguments.get("client_options", {})}
    name = (f"{scheme}://{bucket}", repr(sorted(options.items())), repr(sorted(arguments.items(), key=str)))
    with _STORES_LOCK:
        if name not in _STORES:
            _add_profile(scheme, options, arguments)
            _STORES[name] = _told(path, "Opening", lambda: _obstore().store.from_url(name[0], **arguments, **options))
        return _STORES[name], key


def _add_profile(scheme: str, options: Mapping[str, Any], arguments: dict[str, Any]) -> None:
    """Adds the credentials that boto3 finds, such as a profile, where obstore itself has none: it knows no profiles."""
    given = (*options, *arguments, *arguments.get("config", ()), *os.environ)
    known = ("access_key_id", "skip_signature", "credential_provider", "aws_web_identity_token_file")
    if scheme not in ("s3", "s3a") or any(word in name.lower() for name in given for word in known):
        return
    with contextlib.suppress(Exception):  # boto3 is not installed, or finds no credentials either.
        from obstore.auth.boto3 import Boto3CredentialProvider

        arguments["credential_provider"] = Boto3CredentialProvider()


_STORES: dict[object, Any] = {}
_STORES_LOCK = threading.Lock()


def _obstore() -> Any:
    import obstore
    import obstore.exceptions
    import obstore.store

    return obstore


def _told(path: str, words: str, ask: Callable[[], _T]) -> _T:
    """Makes a request. Errors of the library become errors of the operating system, without secrets in their texts."""
    errors = _obstore().exceptions
    try:
        return ask()
    except (errors.NotFoundError, FileNotFoundError) as error:
        raise FileNotFoundError(errno.ENOENT, "No such object", path) from error
    except (errors.PermissionDeniedError, errors.UnauthenticatedError) as error:
        raise PermissionError(
            errno.EACCES,
            f"{words}: the credentials are missing, expired, or do not allow this. Set them as obstore's documentation "
            f"says, or pass storage_options. {_reason(error)}",
            path,
        ) from error
    except errors.PreconditionError as error:
        raise OSError(
            errno.ESTALE,
            f"{words}: the object was replaced since it was opened. Start again, and it is read anew",
            path,
        ) from error
    except errors.BaseError as error:
        if "status code: 404" in str(error):  # There is no such bucket.
            raise FileNotFoundError(errno.ENOENT, f"{words}: {_reason(error)}", path) from error
        raise OSError(errno.EIO, f"{words} failed: {_reason(error)}", path) from error


def _reason(error: BaseException) -> str:
    """The first sentence of an error, without the query of a URL, which may hold a signature."""
    text = str(error).partition("\n\nDebug source")[0].strip()
    return _SECRETS.sub("", " ".join(text.split()))[:400] or type(error).__name__


def _version_of(meta: Mapping[str, Any]) -> _ObjectVersion:
    return _ObjectVersion(meta.get("e_tag"), meta.get("last_modified"), int(meta["size"]))


def _fill(
    buffers: Sequence[memoryview], parts: Any, arrived: list[int] | None = None, wanted: int | None = None
) -> int:
    """Copies parts into consecutive buffers. ``arrived`` counts the bytes, also if the parts end in an error."""
    count = arrived if arrived is not None else [0]
    number = position = 0
    for part in parts:
        data = memoryview(part).cast("B")
        if wanted is not None and count[0] + len(data) > wanted:
            data = data[: wanted - count[0]]
        while data:
            room = buffers[number][position:]
            taken = min(len(room), len(data))
            room[:taken] = data[:taken]
            data, position = data[taken:], position + taken
            count[0] += taken
            if position == len(buffers[number]):
                number, position = number + 1, 0
    return count[0]
