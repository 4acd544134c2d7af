"""Writing a directory of single tensors.

``state.pt`` is a torch file with a stub in place of every storage; the bytes of each go to a file of its own.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Mapping

from lightning_memload.checkpoint.tensor_directory import (
    MANIFEST_FILE,
    STATE_FILE,
    TENSORS_FOLDER,
    StorageFile,
    TensorDirectory,
    make_manifest,
    read_storage_files,
    storage_file,
)
from lightning_memload.checkpoint.torch_pickle import STUB_BYTES
from lightning_memload.errors import CheckpointFormatError
from lightning_memload.save.linking import LinkingFiles
from lightning_memload.save.pickling import pickle_object
from lightning_memload.save.replacement import Replacement, put_back, sync
from lightning_memload.save.saving import DEFAULT_BUDGET_BYTES, Order, Save, SaveStats, default_save_threads
from lightning_memload.save.torch_zip import Archive
from lightning_memload.save.writing import LocalSink, Records

__all__ = ["plan_directory_save", "save_directory"]


def save_directory(
    obj: object,
    path: str | os.PathLike[str],
    *,
    host_budget_bytes: int = DEFAULT_BUDGET_BYTES,
    num_threads: int | None = None,
    durable: bool = True,
    link_unchanged_from: str | os.PathLike[str] | None = None,
) -> SaveStats:
    """Saves an object as a directory with one file for each storage, or leaves what was there untouched.

    Takes whatever ``torch.save`` takes and keeps what it keeps: ties, views, strides, parameters and their attributes,
    tensors within objects. Of a storage only the span that the saved tensors use is written.

    A checkpoint directory at ``path`` is replaced in one step, see :class:`Replacement` for where that takes two. Who
    still reads the old checkpoint goes on with it or gets an error, never a mixture of the two.

    Args:
        obj: The object, such as a Lightning checkpoint or a state dict.
        path: The directory to write. Its parent must exist.
        host_budget_bytes: The most host memory for the bytes of tensors on devices.
        num_threads: Threads to write with; ``None``: up to 4, as many as there are CPUs.
        durable: Return only when all files are on the disk, so that they survive a power failure.
        link_unchanged_from: A directory of this format, such as the checkpoint before. Storages whose bytes it has in a
            file of the same number, compared byte for byte, are not written: that file gets a second name (a hard
            link). ``None``, or one that cannot be read or linked to: all are written.

    Returns:
        What it cost.

    Raises:
        FileExistsError: There is something else than a checkpoint directory at ``path``.
        CheckpointWriteError: There is not enough space, or writing failed or is not allowed.
        CheckpointFormatError: The object holds a tensor whose memory was taken away.
        NotImplementedError: It holds a storage without memory.
        ValueError: The budget is below 512 KiB, or there is no thread.
        Exception: Whatever pickling the object raises; nothing has been written then.

    Peak memory: the budget if tensors are on devices, else nothing; and the pickle, which holds no tensors.
    """
    return plan_directory_save(
        obj,
        path,
        host_budget_bytes=host_budget_bytes,
        num_threads=num_threads,
        durable=durable,
        link_unchanged_from=link_unchanged_from,
    ).run()


def plan_directory_save(
    obj: object,
    path: str | os.PathLike[str],
    *,
    host_budget_bytes: int = DEFAULT_BUDGET_BYTES,
    num_threads: int | None = None,
    durable: bool = True,
    link_unchanged_from: str | os.PathLike[str] | None = None,
) -> Save:
    """Does the first part of :func:`save_directory`, all that concerns more of the object than its tensors' memory."""
    target = os.path.realpath(path)
    _refuse_to_replace(target)
    put_back(target)
    threads = default_save_threads() if num_threads is None else num_threads
    old = {} if link_unchanged_from is None else _linkable_files(os.path.realpath(link_unchanged_from))
    return Save(target, lambda: _Directory(obj, host_budget_bytes, threads, old), durable=durable)


class _Directory:
    """A directory that is to be written, with links to old files where they have what is to be written."""

    is_directory = streamed = True

    def __init__(
        self, obj: object, host_budget_bytes: int, num_threads: int, old_files: Mapping[tuple[str, int], str]
    ) -> None:
        pickled = pickle_object(obj, stub_bytes=STUB_BYTES)
        self.stretches = pickled.stretches
        stubs = [bytes(STUB_BYTES if stretch.nbytes else 0) for stretch in pickled.stretches]
        self._state = Archive(pickled, stubs, host_budget_bytes, 1)
        self._keys = [key for key, stretch in enumerate(pickled.stretches) if stretch.nbytes]
        self._records = Records([pickled.stretches[key] for key in self._keys], host_budget_bytes, num_threads)
        self.num_threads = self._records.num_threads
        self.staging_bytes = self._records.staging_bytes
        sizes = self._records.sizes
        self._old_names = [old_files.get((str(key), size)) for key, size in zip(self._keys, sizes, strict=True)]
        linkable = sum(size for size, old_name in zip(sizes, self._old_names, strict=True) if old_name is not None)
        self.nbytes = self._state.nbytes + sum(sizes) - linkable
        self.bytes_linked = 0
        self._storages: list[StorageFile] = []

    def write(self, place: Replacement, *, durable: bool, order: Order | None) -> int:
        """Writes all files but the manifest."""
        folder = place.temporary_path
        os.mkdir(os.path.join(folder, TENSORS_FOLDER))
        names = [os.path.join(folder, storage_file(str(key))) for key in self._keys]
        files = LinkingFiles(names, self._records.sizes, self._old_names, start_writeback=durable)
        with contextlib.closing(files):
            crc32s = self._records.write(
                files, first=order.first if order else None, on_first=order.on_first if order else None
            )
        self.bytes_linked = files.bytes_linked
        self._storages = [
            StorageFile(str(key), nbytes, crc32, str(self.stretches[key].storage.device))
            for key, nbytes, crc32 in zip(self._keys, self._records.sizes, crc32s, strict=True)
        ]
        with open(os.path.join(folder, STATE_FILE), "xb") as file:
            self._state.write_to(LocalSink(file.fileno()))
        return self._state.nbytes + sum(self._records.sizes) - self.bytes_linked

    def finish(self, place: Replacement, *, durable: bool) -> None:
        """Writes the manifest."""
        folder = place.temporary_path
        with open(os.path.join(folder, MANIFEST_FILE), "xb") as file:
            file.write(make_manifest(folder, self._storages))
        # All at the end: the disk then writes while the next files are being filled.
        names = (*(storage_file(storage.key) for storage in self._storages), STATE_FILE, MANIFEST_FILE, TENSORS_FOLDER)
        for name in names if durable else ():
            sync(os.path.join(folder, name))


def _linkable_files(path: str) -> dict[tuple[str, int], str]:
    """The files of a checkpoint directory by number and size; none if that cannot be told."""
    try:
        storages = read_storage_files(path)
    except (OSError, CheckpointFormatError):
        return {}
    return {(storage.key, storage.nbytes): os.path.join(path, storage_file(storage.key)) for storage in storages}


def _refuse_to_replace(target: str) -> None:
    if not os.path.lexists(target) or TensorDirectory().recognizes(target):
        return
    if not os.path.isdir(target) or os.listdir(target):
        raise FileExistsError(
            errno.EEXIST, "is there and is no checkpoint directory, so it is not replaced; remove it or save elsewhere",
            target,
        )  # fmt: skip
