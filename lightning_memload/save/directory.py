"""Saves an object as a directory: ``state.pt`` and the tensors beside it.

``state.pt`` is a torch file with a stub in place of every storage. The bytes of each storage are in a file of their
own, or the weights are together in one safetensors file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import shutil
import warnings
from collections.abc import Callable, Container, Mapping, Sequence

from lightning_memload.errors import CheckpointFormatError, listed
from lightning_memload.formats.safetensors.layout import ContiguousWriter, WeightsFile, find_weights
from lightning_memload.formats.tensor_directory.linking import LinkingFiles
from lightning_memload.formats.tensor_directory.manifest import (
    MANIFEST_FILE,
    STATE_FILE,
    TENSORS_FOLDER,
    WEIGHTS_FILE,
    StorageFile,
    WeightsLayout,
    foreign_names,
    is_tensor_directory,
    read_manifest,
    storage_file,
)
from lightning_memload.formats.tensor_directory.reader import make_manifest
from lightning_memload.formats.torch_zip.reader import TorchZip
from lightning_memload.pickles.pickling import Pickled, pickle_object
from lightning_memload.pickles.structure import STUB_BYTES
from lightning_memload.save.saving import DEFAULT_BUDGET_BYTES, Save, SaveStats, default_save_threads
from lightning_memload.save.torch_file import TorchFileWriter
from lightning_memload.storage.descriptors import OwnDescriptors
from lightning_memload.storage.replacement import Replacement, put_back
from lightning_memload.transfer.contents import Content
from lightning_memload.transfer.sinks import LocalSink, SplitWriter
from lightning_memload.transfer.writing import WriteEngine, WriteOrder

__all__ = ["plan_directory_save", "save_directory"]

# Loading maps every file, and Linux allows 65,530 mappings in a process by default (vm.max_map_count).
_MAX_FILES = 32_768


def save_directory(
    obj: object,
    path: str | os.PathLike[str],
    *,
    host_budget_bytes: int = DEFAULT_BUDGET_BYTES,
    num_threads: int | None = None,
    durable: bool = True,
    link_unchanged_from: str | os.PathLike[str] | None = None,
    safetensors: bool = False,
) -> SaveStats:
    """Saves an object as a directory with one file for each storage.

    With more than 32,768 storages the smallest ones stay in ``state.pt``: loading maps every file, and the kernel
    limits the number of mappings.

    Accepts every object that ``torch.save`` accepts, and keeps ties, views, strides, parameters and their attributes,
    and tensors within objects. Only the span of a storage that the saved tensors use is written.

    An existing checkpoint at ``path`` (a directory of this format or a file of ``torch.save``) is replaced in one
    atomic step; see :class:`Replacement` for the file systems where this takes two steps. After an error it is
    unchanged. A process that is reading the old checkpoint reads it to the end or gets an error, never a mixture of the
    two. A symbolic link at ``path`` is replaced, not the checkpoint that it points to. Other files in the old
    directory, such as a ``config.json``, are kept in the new one.

    Args:
        obj: The object, such as a Lightning checkpoint or a state dict.
        path: The directory to write. Its parent must exist.
        host_budget_bytes: Maximum host memory for staging tensors from devices.
        num_threads: Number of writing threads. ``None`` means the number of CPUs, at most 4.
        durable: Return only when all files are on the disk, so that they survive a power failure.
        link_unchanged_from: A directory of this format, such as the previous checkpoint. If it has a file of the same
            number with the same bytes (compared byte for byte), that file is hard-linked instead of written again.
            ``None``, or a directory that cannot be read or linked to: all files are written.
        safetensors: Write two files instead of one for each storage: ``model.safetensors`` with the weights, and
            ``state.pt`` with everything else. The weights are the tensors of ``obj["state_dict"]``, or of ``obj`` if it
            has no such entry. Weights that are views or not contiguous are in both files: contiguous in
            ``model.safetensors``, unchanged in ``state.pt``. No file is linked.

    Returns:
        The sizes and times of the save.

    Raises:
        FileExistsError: ``path`` exists and is not a checkpoint.
        CheckpointWriteError: There is not enough space, or writing failed or is not allowed.
        CheckpointFormatError: The object holds a tensor whose memory was freed.
        NotImplementedError: The object holds a storage without memory.
        ValueError: The budget is below 512 KiB, or ``num_threads`` is below 1.
        Exception: Pickling the object failed. Nothing has been written.

    Peak memory: the pickle, which holds no tensors, and the budget if tensors are on devices.
    """
    return plan_directory_save(
        obj,
        path,
        host_budget_bytes=host_budget_bytes,
        num_threads=num_threads,
        durable=durable,
        link_unchanged_from=link_unchanged_from,
        safetensors=safetensors,
    ).run()


def plan_directory_save(
    obj: object,
    path: str | os.PathLike[str],
    *,
    host_budget_bytes: int = DEFAULT_BUDGET_BYTES,
    num_threads: int | None = None,
    durable: bool = True,
    link_unchanged_from: str | os.PathLike[str] | None = None,
    safetensors: bool = False,
    content_of: Callable[[Content], Content] | None = None,
) -> Save:
    """Plans a :func:`save_directory`. From its return to the end of the save, only tensors' memory must not change.

    ``content_of`` may replace the bytes of each record by others of the same number, for storages without memory. It is
    not asked with ``safetensors``.
    """
    target = _place_of(os.fspath(path))
    _refuse_to_replace(target)
    put_back(target)
    threads = default_save_threads() if num_threads is None else num_threads
    if safetensors:
        return Save(target, lambda: _SafetensorsWriter(obj, host_budget_bytes, threads), durable=durable)
    old = {} if link_unchanged_from is None else _linkable_files(os.path.realpath(link_unchanged_from))
    return Save(target, lambda: _DirectoryWriter(obj, host_budget_bytes, threads, old, content_of), durable=durable)


class _DirectoryWriter:
    """The :class:`CheckpointWriter` of a directory with one file for each storage, written or linked to an old one."""

    is_directory = streamed = True

    def __init__(
        self,
        obj: object,
        host_budget_bytes: int,
        num_threads: int,
        old_files: Mapping[tuple[str, int], str],
        content_of: Callable[[Content], Content] | None,
    ) -> None:
        pickled = pickle_object(obj, stubs=lambda storage: True)
        with_bytes = [saved for saved in pickled.saved_storages if saved.nbytes]
        # A stable sort: storages of equal size keep the object's order, so the next save chooses the same ones.
        largest = sorted(with_bytes, key=lambda saved: -saved.nbytes)[:_MAX_FILES]
        outside = {saved.storage._cdata for saved in largest}
        if len(outside) < len(with_bytes):
            pickled = pickle_object(obj, stubs=lambda storage: storage._cdata in outside)
        self.storage_sizes = [saved.nbytes for saved in pickled.saved_storages]
        self._state, keys = _divide(pickled, outside)
        own = [pickled.saved_storages[key] for key in keys]
        contents: list[Content] = [*self._state.take_contents(), *own]
        if content_of is not None:
            contents = list(map(content_of, contents))
        self.records = WriteEngine(contents, host_budget_bytes, num_threads)
        # Without the checksums, which are known when the files are written.
        self._storages = [
            StorageFile(str(key), saved.nbytes, 0, str(saved.storage.device))
            for key, saved in zip(keys, own, strict=True)
        ]
        self._old_names = [old_files.get((storage.key, storage.nbytes)) for storage in self._storages]
        self.nbytes = self._state.nbytes + sum(storage.nbytes for storage in self._storages)
        linkable = zip(self._storages, self._old_names, strict=True)
        self.bytes_linkable = sum(storage.nbytes for storage, old_name in linkable if old_name is not None)
        self.bytes_linked = 0

    def write(self, place: Replacement, *, durable: bool, order: WriteOrder | None) -> int:
        """Writes all files except the manifest."""
        folder = place.temporary_path
        os.mkdir(os.path.join(folder, TENSORS_FOLDER))
        files = LinkingFiles(
            [os.path.join(folder, storage_file(storage.key)) for storage in self._storages],
            [storage.nbytes for storage in self._storages],
            self._old_names,
            start_writeback=durable,
        )
        with OwnDescriptors.new_file(os.path.join(folder, STATE_FILE)) as state, contextlib.closing(files):
            sink = LocalSink(state, start_writeback=durable)
            of_state = self._state.num_records
            target = SplitWriter((of_state, self._state.target(sink)), (len(self._storages), files))
            crc32s = self.records.write(target, order)
            self._state.write_end(sink, crc32s[:of_state])
        self.bytes_linked = files.bytes_linked
        written = zip(self._storages, crc32s[of_state:], strict=True)
        self._storages = [dataclasses.replace(storage, crc32=crc32) for storage, crc32 in written]
        return self.nbytes - self.bytes_linked

    @property
    def names(self) -> list[str]:
        """All files, and the folder of the storage files."""
        own = [storage_file(storage.key) for storage in self._storages]
        return [*own, TENSORS_FOLDER, STATE_FILE, MANIFEST_FILE]

    def finish(self, place: Replacement) -> None:
        """Writes the manifest."""
        _complete(place, self._storages, None)


class _SafetensorsWriter:
    """The :class:`CheckpointWriter` of a directory with the weights in one file and everything else in another."""

    is_directory = streamed = True
    bytes_linkable = bytes_linked = 0
    names = (WEIGHTS_FILE, STATE_FILE, MANIFEST_FILE)

    def __init__(self, obj: object, host_budget_bytes: int, num_threads: int) -> None:
        weights = find_weights(obj)
        self._weights = WeightsFile.of(weights, pickle_object(obj).saved_storages)
        places = self._weights.places
        pickled = pickle_object(obj, stubs=lambda storage: storage._cdata in places)
        for saved in pickled.saved_storages:
            place = places.get(saved.storage._cdata)
            if place is not None and self._weights.contents[place] != saved:
                # The object gives other tensors on the second pickling, so all storages stay in state.pt.
                places.clear()
                pickled = pickle_object(obj)
                break
        self.storage_sizes = [saved.nbytes for saved in pickled.saved_storages]
        self._state, keys = _divide(pickled, places)
        # The number and device of each storage outside of state.pt, and the index of its content.
        self._outside = [
            (str(key), str(saved.storage.device), places[saved.storage._cdata])
            for key, saved in ((key, pickled.saved_storages[key]) for key in keys)
        ]
        contents = [*self._state.take_contents(), *self._weights.take_contents()]
        self.records = WriteEngine(contents, host_budget_bytes, num_threads)
        self.nbytes = self._state.nbytes + self._weights.nbytes
        self._crc32s: list[int] = []
        if self._weights.left_out:
            warnings.warn(
                f"safetensors cannot hold {listed(self._weights.left_out)}: they are not plain strided tensors of a "
                f"dtype that it supports, or their name is reserved. They are saved in {STATE_FILE} only, and restored "
                f"from there; {WEIGHTS_FILE} does not contain them.",
                stacklevel=2,
            )

    def write(self, place: Replacement, *, durable: bool, order: WriteOrder | None) -> int:
        """Writes both files."""
        folder, offsets, of_state = place.temporary_path, self._weights.offsets, self._state.num_records
        with contextlib.ExitStack() as stack:
            paths = [os.path.join(folder, name) for name in (STATE_FILE, WEIGHTS_FILE)]
            files = [stack.enter_context(OwnDescriptors.new_file(path)) for path in paths]
            state, beside = (LocalSink(file, start_writeback=durable) for file in files)
            target = SplitWriter(
                (of_state, self._state.target(state)), (len(offsets), ContiguousWriter(beside, offsets))
            )
            crc32s = self.records.write(target, order)
            self._state.write_end(state, crc32s[:of_state])
        self._crc32s = crc32s[of_state:]
        return self.nbytes

    def finish(self, place: Replacement) -> None:
        """Writes the manifest."""
        weights = self._weights
        runs = list(zip(weights.offsets, self.records.sizes[self._state.num_records :], self._crc32s, strict=True))
        header, storages, copies = runs[0], [], dict(enumerate(runs[1:], start=1))
        for key, device, content in self._outside:
            offset, nbytes, crc32 = copies.pop(content)
            storages.append(StorageFile(key, nbytes, crc32, device, offset))
        layout = WeightsLayout(weights.nbytes, header[1], header[2], tuple(copies.values()))
        _complete(place, storages, layout)


def _divide(pickled: Pickled, outside: Container[int]) -> tuple[TorchFileWriter, list[int]]:
    """``state.pt`` with stubs for the storages outside of it (given by ``_cdata``), and the numbers of these."""
    keys = [key for key, saved in enumerate(pickled.saved_storages) if saved.nbytes and saved.storage._cdata in outside]
    contents: list[Content] = list(pickled.saved_storages)
    for key in keys:
        contents[key] = bytes(STUB_BYTES)
    return TorchFileWriter(pickled, contents), keys


def _complete(place: Replacement, storages: Sequence[StorageFile], weights: WeightsLayout | None) -> None:
    """Writes the manifest, and keeps the files of the old directory that are not part of the checkpoint."""
    folder = place.temporary_path
    with open(os.path.join(folder, MANIFEST_FILE), "xb") as file:
        file.write(make_manifest(folder, storages, weights))
    if not os.path.islink(place.path) and is_tensor_directory(place.path):
        for name in foreign_names(place.path):
            _link_or_copy(os.path.join(place.path, name), os.path.join(folder, name))


def _link_or_copy(old: str, new: str) -> None:
    """Hard-links a file, or all files of a directory. Copies them where hard links are not possible."""
    if os.path.isdir(old) and not os.path.islink(old):
        shutil.copytree(old, new, symlinks=True, copy_function=_link_or_copy)
        return
    try:
        os.link(old, new, follow_symlinks=False)
    except OSError:
        shutil.copy2(old, new, follow_symlinks=False)


def _linkable_files(path: str) -> dict[tuple[str, int], str]:
    """The storage files of a checkpoint directory, by number and size. Empty if the manifest cannot be read."""
    try:
        storages = read_manifest(path).storages
    except (OSError, CheckpointFormatError):
        return {}
    return {
        (storage.key, storage.nbytes): os.path.join(path, storage_file(storage.key))
        for storage in storages
        if storage.offset is None
    }


def _place_of(path: str) -> str:
    """The absolute path, with links resolved in the parent only: a link at the path itself is replaced."""
    parent, name = os.path.split(path.rstrip(os.sep))
    return os.path.realpath(path) if name in ("", ".", "..") else os.path.join(os.path.realpath(parent), name)


def _refuse_to_replace(target: str) -> None:
    if not os.path.lexists(target) or os.path.islink(target):
        return
    if is_tensor_directory(target) or (os.path.isfile(target) and TorchZip().recognizes(target)):
        return
    if not os.path.isdir(target) or os.listdir(target):
        raise FileExistsError(
            errno.EEXIST,
            "exists and is neither a checkpoint directory nor a file of torch, so it is not replaced; remove it or "
            "save to another path",
            target,
        )
