"""Writing a directory of single tensors.

``torch.save`` writes ``state.pt``, with a pickler that puts a stub in place of every storage that gets a file of its
own; the bytes then go to their files piece by piece. Everything is written into a hidden directory beside the target,
synced, and put in place in one step, so at every moment the target is a complete checkpoint, the old or the new one.
The hidden directory is locked while its writer lives: what is found unlocked was left by a writer that was killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import pickle
import re
import shutil
import types
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from zlib_ng import zlib_ng

from lightning_memload.checkpoint import span_elements
from lightning_memload.checkpoint.tensor_directory import (
    MANIFEST_FILE,
    STATE_FILE,
    TENSORS_FOLDER,
    StorageFile,
    TensorDirectory,
    make_manifest,
    storage_file,
)
from lightning_memload.checkpoint.torch_pickle import STUB_BYTES
from lightning_memload.transfer import LazyRing, RingLayout

__all__ = ["save_directory"]

# Small enough for a processor's cache, so that the checksum is taken from what was just copied or is just written.
_PIECE_BYTES = 4 << 20
# Views of any type then start at a whole element of what is kept of their storage.
_ALIGNMENT_BYTES = 16
# From linux/fs.h and linux/fcntl.h; the standard library names neither.
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


def save_directory(obj: Any, path: str | os.PathLike[str]) -> None:
    """Saves an object as a directory with one file for each storage.

    Takes whatever ``torch.save`` takes and keeps what it keeps: ties, views, strides, parameters and their attributes,
    tensors within objects. Of a storage only the span that the saved tensors use is written. Tensors without dense
    memory (quantised, subclasses) stay in ``state.pt`` with their data, those of sparse tensors get files.

    A checkpoint directory at ``path`` is replaced. On Linux this is one atomic exchange where the file system knows it
    (ext4, xfs, btrfs, tmpfs, overlay). Elsewhere the old directory is renamed away first: a process that is killed
    right then leaves nothing at ``path``, the old checkpoint complete under ``.<name>.<digits>.previous`` beside it,
    and the next save puts it back. Who still reads the old checkpoint goes on with it or gets an error, never a
    mixture of the two.

    Args:
        obj: The object, such as a Lightning checkpoint or a state dict.
        path: The directory to write. Its parent must exist.

    Raises:
        FileExistsError: There is something else than a checkpoint directory at ``path``.
        CheckpointFormatError: The object holds a tensor whose memory was taken away. Likewise.
        OSError: Writing failed. What was at ``path`` is still there.

    Peak memory: the object without its tensors, pickled, and 4 MiB on the host for tensors on devices.
    """
    target = os.path.realpath(path)
    _refuse_to_replace(target)
    _sweep(target)
    with _workplace(target) as folder:
        _write(obj, folder)
        _put_in_place(folder, target)


# The contents ------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Span:
    """What is kept of a storage: the bytes from ``start`` to ``end``."""

    storage: torch.UntypedStorage
    start: int
    end: int
    key: str | None = None
    stub: torch.UntypedStorage | None = None


def _write(obj: Any, folder: str) -> None:
    os.mkdir(os.path.join(folder, TENSORS_FOLDER))
    spans: dict[int, _Span] = {}
    try:
        _find_spans(obj, spans)
        _write_state(obj, os.path.join(folder, STATE_FILE), spans)
        written = sorted((span for span in spans.values() if span.key is not None), key=lambda span: int(span.key or 0))
        storages = _write_storages(folder, written)
    finally:
        # torch.save (2.13) leaves its pickler to the garbage collector: not the tensors with it.
        spans.clear()
    with open(os.path.join(folder, MANIFEST_FILE), "xb") as file:
        file.write(make_manifest(folder, storages))
    # All at the end: the disk then writes while the next files are being filled.
    for name in (*(storage_file(storage.key) for storage in storages), STATE_FILE, MANIFEST_FILE, TENSORS_FOLDER, ""):
        _sync(os.path.join(folder, name))


def _find_spans(obj: Any, spans: dict[int, _Span]) -> None:
    """Finds the storages of all tensors that a pickler meets, and the part of each that they use."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> str | None:
            return "" if torch.is_storage(value) else None

        def reducer_override(self, value: Any) -> Any:
            reduced = _reduce_dense(value)
            if reduced is not None and value.numel():
                storage = value.untyped_storage()
                start, end = _bytes_used(value)
                if end <= storage.nbytes():  # else somebody took the memory away, as FSDP does
                    span = spans.setdefault(storage._cdata, _Span(storage, start, end))
                    span.start, span.end = min(span.start, start), max(span.end, end)
            return NotImplemented if reduced is None else reduced

    Pickler(_Nowhere(), protocol=torch.serialization.DEFAULT_PROTOCOL).dump(obj)


def _write_state(obj: Any, path: str, spans: dict[int, _Span]) -> None:
    """Writes the object with stubs for the storages, and notes the number that torch gives each."""

    class Pickler(pickle.Pickler):
        def reducer_override(self, value: Any) -> Any:
            reduced = _reduce_dense(value)
            if reduced is None:
                return NotImplemented
            function, (storage, _, *rest) = reduced
            if not value.numel():
                # torch would keep the whole storage of an empty view.
                return function, (_retyped(storage, torch.UntypedStorage(0)), 0, *rest)
            span = spans.get(value.untyped_storage()._cdata)
            start, end = _bytes_used(value)
            if span is None or start < span.start or end > span.end:
                return reduced  # made while it was pickled, by an object's __getstate__: torch saves it
            if span.stub is None:
                span.stub = torch.zeros(STUB_BYTES, dtype=torch.uint8, device="cpu").untyped_storage()
            stub = _retyped(storage, span.stub)
            # torch's own: ("storage", type, key, location, number of elements).
            span.key = self.persistent_id(stub)[2]
            offset = value.storage_offset() - span.start // value.element_size()
            return function, (stub, offset, *rest)

    module: Any = types.ModuleType("pickle")
    module.Pickler = Pickler
    torch.save(obj, path, pickle_module=module)


def _reduce_dense(value: Any) -> tuple[Callable[..., Any], tuple[Any, ...]] | None:
    """What torch pickles a tensor as, if that is a storage, an offset, and more that has nothing to do with bytes.

    ``None`` for all other objects. A parameter is pickled around such a tensor.
    """
    if type(value) is not torch.Tensor:
        return None
    function, args = value.__reduce_ex__(torch.serialization.DEFAULT_PROTOCOL)[:2]
    known = (torch._utils._rebuild_tensor_v2, torch._utils._rebuild_tensor_v3)
    return (function, args) if function in known else None


def _retyped(like: Any, storage: torch.UntypedStorage) -> Any:
    """Another storage in the guise in which torch pickles a tensor's: with the tensor's type or, if new, without."""
    if isinstance(like, torch.UntypedStorage):
        return storage
    return torch.storage.TypedStorage(wrap_storage=storage, dtype=like.dtype, _internal=True)


def _bytes_used(tensor: torch.Tensor) -> tuple[int, int]:
    """First byte of the storage that the tensor needs, rounded down, and one past the last."""
    itemsize = tensor.element_size()
    start = int(tensor.storage_offset()) * itemsize
    return start // _ALIGNMENT_BYTES * _ALIGNMENT_BYTES, start + span_elements(tensor.shape, tensor.stride()) * itemsize


class _Nowhere:
    def write(self, data: Any) -> int:
        return len(data)


def _write_storages(folder: str, spans: list[_Span]) -> list[StorageFile]:
    on_cuda = any(span.storage.device.type == "cuda" for span in spans)
    with contextlib.closing(LazyRing(RingLayout(1, 1, _PIECE_BYTES), pinned=on_cuda)) as ring:
        return [_write_storage(folder, span, ring) for span in spans]


def _write_storage(folder: str, span: _Span, ring: LazyRing) -> StorageFile:
    assert span.key is not None
    crc32 = 0
    with open(os.path.join(folder, storage_file(span.key)), "xb", buffering=0) as file:
        for start in range(span.start, span.end, _PIECE_BYTES):
            nbytes = min(_PIECE_BYTES, span.end - start)
            empty = torch.empty(0, dtype=torch.uint8, device=span.storage.device)
            piece = empty.set_(span.storage, start, (nbytes,), (1,))
            if not piece.is_cpu:
                piece = ring.get().tensors[0][:nbytes].copy_(piece)
            data = piece.numpy().data
            crc32 = zlib_ng.crc32(data, crc32)
            while data:
                data = data[file.write(data) :]
    return StorageFile(span.key, span.end - span.start, crc32, str(span.storage.device))


# The place ---------------------------------------------------------------------------------------------------------


def _refuse_to_replace(target: str) -> None:
    if not os.path.lexists(target) or TensorDirectory().recognizes(target):
        return
    if not os.path.isdir(target) or os.listdir(target):
        raise FileExistsError(
            errno.EEXIST, "is there and is no checkpoint directory, so it is not replaced; remove it or save elsewhere",
            target,
        )  # fmt: skip


@contextlib.contextmanager
def _workplace(target: str) -> Iterator[str]:
    """A new locked directory beside the target; whatever has this name in the end is removed."""
    with contextlib.ExitStack() as stack:
        folder = _beside(target, "partial")
        os.mkdir(folder)
        while _lock(folder, stack) is False:
            # Another writer's sweep came first: it takes any directory that is not locked yet.
            folder = _beside(target, "partial")
            os.mkdir(folder)
        # Ours after a failure, the old checkpoint after an exchange.
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        yield folder


def _beside(target: str, kind: str) -> str:
    parent, name = os.path.split(target)
    return os.path.join(parent, f".{name}.{uuid.uuid4().hex[:12]}.{kind}")


def _lock(folder: str, stack: contextlib.ExitStack) -> bool | None:
    """Locks a directory until the stack is closed or the process ends.

    Returns:
        ``False`` if somebody else has it, or had and removed it. ``None`` if the file system has no such locks; then no
        sweep removes anything either.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    stack.callback(os.close, descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return os.path.isdir(folder)


def _sweep(target: str) -> None:
    """Removes what killed writers left beside the target, and puts back what one had renamed away."""
    parent, name = os.path.split(target)
    for entry in os.listdir(parent):
        match = re.fullmatch(rf"\.{re.escape(name)}\.[0-9a-f]{{12}}\.(partial|previous)", entry)
        if match is None:
            continue
        leftover = os.path.join(parent, entry)
        # A link with such a name, another writer that sweeps too: leave it alone.
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            if not _lock(leftover, stack):
                continue
            if match[1] == "previous" and not os.path.lexists(target):
                os.rename(leftover, target)
            else:
                shutil.rmtree(leftover, ignore_errors=True)


def _put_in_place(folder: str, target: str) -> None:
    """Gives the new directory the target's name, and the old one, if there is one, that of the new."""
    try:
        os.rename(folder, target)  # the name is free, or an empty directory has it
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        if not _exchange(folder, target):
            _replace_in_two_steps(folder, target)
    _sync(os.path.dirname(target))


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


def _replace_in_two_steps(folder: str, target: str) -> None:
    previous = _beside(target, "previous")
    with contextlib.ExitStack() as stack:
        # Else another writer would take it for what a killed one left.
        _lock(target, stack)
        os.rename(target, previous)
        try:
            os.rename(folder, target)
        except BaseException:
            os.rename(previous, target)
            raise
        _sync(os.path.dirname(target))
        shutil.rmtree(previous, ignore_errors=True)


def _sync(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
