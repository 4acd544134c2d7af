"""Writing a directory of single tensors.

``state.pt`` is a torch file with a stub in place of every storage; the bytes of each go to a file of its own.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import warnings
from collections.abc import Container, Mapping, Sequence

from lightning_memload.checkpoint.tensor_directory import make_manifest
from lightning_memload.checkpoint.tensor_manifest import (
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
from lightning_memload.checkpoint.torch_pickle import STUB_BYTES
from lightning_memload.checkpoint.torch_zip import TorchZip
from lightning_memload.errors import CheckpointFormatError, listed
from lightning_memload.save.linking import LinkingFiles
from lightning_memload.save.pickling import Pickled, pickle_object
from lightning_memload.save.replacement import Replacement, put_back
from lightning_memload.save.saving import DEFAULT_BUDGET_BYTES, Save, SaveStats, default_save_threads
from lightning_memload.save.torch_zip import Archive
from lightning_memload.save.weights_file import RunTarget, WeightsFile, find_weights
from lightning_memload.save.writing import Content, LocalSink, Order, Records, Split, size_of

__all__ = ["plan_directory_save", "save_directory"]

# Loading maps every file, and Linux maps 65,530 in a process unless told else (vm.max_map_count).
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
    """Saves an object as a directory with one file for each storage, or leaves what was there untouched.

    Of more than 32,768 storages the smallest stay in ``state.pt``: loading maps every file, and the kernel counts.

    Takes whatever ``torch.save`` takes and keeps what it keeps: ties, views, strides, parameters and their attributes,
    tensors within objects. Of a storage only the span that the saved tensors use is written.

    A checkpoint directory, or a file of ``torch.save``, at ``path`` is replaced in one step, see :class:`Replacement`
    for where that takes two. Who still reads the old checkpoint goes on with it or gets an error, never a mixture of
    the two. A symbolic link is replaced itself, not the checkpoint that it points to. What somebody has put into the
    old directory beside the checkpoint, such as a ``config.json``, is in the new one too.

    Args:
        obj: The object, such as a Lightning checkpoint or a state dict.
        path: The directory to write. Its parent must exist.
        host_budget_bytes: The most host memory for the bytes of tensors on devices.
        num_threads: Threads to write with; ``None``: up to 4, as many as there are CPUs.
        durable: Return only when all files are on the disk, so that they survive a power failure.
        link_unchanged_from: A directory of this format, such as the checkpoint before. Storages whose bytes it has in a
            file of the same number, compared byte for byte, are not written: that file gets a second name (a hard
            link). ``None``, or one that cannot be read or linked to: all are written.
        safetensors: Save two files instead of one for each storage: ``model.safetensors`` with the weights, that is the
            tensors of ``obj["state_dict"]``, or of ``obj`` if it has no such entry, and ``state.pt`` with everything
            else. Weights that are views or not contiguous are in both: in order in the one, as they are in the other.
            Nothing is linked.

    Returns:
        What it cost.

    Raises:
        FileExistsError: There is something else than a checkpoint at ``path``.
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
) -> Save:
    """Does the first part of :func:`save_directory`, all that concerns more of the object than its tensors' memory."""
    target = _place_of(os.fspath(path))
    _refuse_to_replace(target)
    put_back(target)
    threads = default_save_threads() if num_threads is None else num_threads
    if safetensors:
        return Save(target, lambda: _WithSafetensors(obj, host_budget_bytes, threads), durable=durable)
    old = {} if link_unchanged_from is None else _linkable_files(os.path.realpath(link_unchanged_from))
    return Save(target, lambda: _Directory(obj, host_budget_bytes, threads, old), durable=durable)


class _Directory:
    """A directory that is to be written, each storage in a file of its own or a link to an old one."""

    is_directory = streamed = True

    def __init__(
        self, obj: object, host_budget_bytes: int, num_threads: int, old_files: Mapping[tuple[str, int], str]
    ) -> None:
        pickled = pickle_object(obj, stubs=lambda storage: True)
        with_bytes = [stretch for stretch in pickled.stretches if stretch.nbytes]
        # Sorted in the order of the object where sizes are the same, so that the next save can link.
        largest = sorted(with_bytes, key=lambda stretch: -stretch.nbytes)[:_MAX_FILES]
        outside = {stretch.storage._cdata for stretch in largest}
        if len(outside) < len(with_bytes):
            pickled = pickle_object(obj, stubs=lambda storage: storage._cdata in outside)
        self.stretches = pickled.stretches
        self._state, self._keys = _divide(pickled, outside)
        own = [pickled.stretches[key] for key in self._keys]
        self._records = Records([*self._state.contents, *own], host_budget_bytes, num_threads)
        self.num_threads, self.staging_bytes = self._records.num_threads, self._records.staging_bytes
        self._old_names = [
            old_files.get((str(key), stretch.nbytes)) for key, stretch in zip(self._keys, own, strict=True)
        ]
        self.nbytes = self._state.nbytes + sum(stretch.nbytes for stretch in own)
        linkable = zip(own, self._old_names, strict=True)
        self.bytes_linkable = sum(stretch.nbytes for stretch, old_name in linkable if old_name is not None)
        self.bytes_linked = 0
        self._storages: list[StorageFile] = []

    def write(self, place: Replacement, *, durable: bool, order: Order | None) -> int:
        """Writes all files but the manifest."""
        folder = place.temporary_path
        os.mkdir(os.path.join(folder, TENSORS_FOLDER))
        own = [self.stretches[key] for key in self._keys]
        files = LinkingFiles(
            [os.path.join(folder, storage_file(str(key))) for key in self._keys],
            [stretch.nbytes for stretch in own],
            self._old_names,
            start_writeback=durable,
        )
        with open(os.path.join(folder, STATE_FILE), "xb") as state, contextlib.closing(files):
            sink = LocalSink(state.fileno(), start_writeback=durable)
            of_state = len(self._state.contents)
            target = Split((of_state, self._state.target(sink)), (len(own), files))
            crc32s = self._records.write(target, order)
            self._state.write_end(sink, crc32s[:of_state])
        self.bytes_linked = files.bytes_linked
        self._storages = [
            StorageFile(str(key), stretch.nbytes, crc32, str(stretch.storage.device))
            for key, stretch, crc32 in zip(self._keys, own, crc32s[of_state:], strict=True)
        ]
        return self.nbytes - self.bytes_linked

    @property
    def names(self) -> list[str]:
        """All files, and the folder of those that have one each."""
        own = [storage_file(storage.key) for storage in self._storages]
        return [*own, TENSORS_FOLDER, STATE_FILE, MANIFEST_FILE]

    def finish(self, place: Replacement) -> None:
        """Writes the manifest."""
        _complete(place, self._storages, None)


class _WithSafetensors:
    """A directory that is to be written, with the weights in one file, everything else in another."""

    is_directory = streamed = True
    bytes_linkable = bytes_linked = 0
    names = (WEIGHTS_FILE, STATE_FILE, MANIFEST_FILE)

    def __init__(self, obj: object, host_budget_bytes: int, num_threads: int) -> None:
        weights = find_weights(obj)
        self._weights = WeightsFile.of(weights, pickle_object(obj).stretches)
        places = self._weights.places
        pickled = pickle_object(obj, stubs=lambda storage: storage._cdata in places)
        for stretch in pickled.stretches:
            place = places.get(stretch.storage._cdata)
            if place is not None and self._weights.contents[place] != stretch:
                # An object that differs from one pickling to the next; its storages stay together.
                places.clear()
                pickled = pickle_object(obj)
                break
        self.stretches = pickled.stretches
        self._state, self._keys = _divide(pickled, places)
        self._records = Records([*self._state.contents, *self._weights.contents], host_budget_bytes, num_threads)
        self.num_threads, self.staging_bytes = self._records.num_threads, self._records.staging_bytes
        self.nbytes = self._state.nbytes + self._weights.nbytes
        self._crc32s: list[int] = []
        if self._weights.left_out:
            warnings.warn(
                f"safetensors cannot hold {listed(self._weights.left_out)}: no plain strided tensors of its dtypes. "
                f"They are in {STATE_FILE} only, from where they are restored; {WEIGHTS_FILE} lacks them.",
                stacklevel=2,
            )

    def write(self, place: Replacement, *, durable: bool, order: Order | None) -> int:
        """Writes both files."""
        folder, weights, of_state = place.temporary_path, self._weights, len(self._state.contents)
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(open(os.path.join(folder, name), "xb")) for name in (STATE_FILE, WEIGHTS_FILE)]
            state, beside = (LocalSink(file.fileno(), start_writeback=durable) for file in files)
            target = Split(
                (of_state, self._state.target(state)), (len(weights.contents), RunTarget(beside, weights.offsets))
            )
            crc32s = self._records.write(target, order)
            self._state.write_end(state, crc32s[:of_state])
        self._crc32s = crc32s[of_state:]
        return self.nbytes

    def finish(self, place: Replacement) -> None:
        """Writes the manifest."""
        weights = self._weights
        runs = list(zip(weights.offsets, map(size_of, weights.contents), self._crc32s, strict=True))
        header, storages, copies = runs[0], [], dict(enumerate(runs[1:], start=1))
        for key in self._keys:
            storage = self.stretches[key].storage
            offset, nbytes, crc32 = copies.pop(weights.places[storage._cdata])
            storages.append(StorageFile(str(key), nbytes, crc32, str(storage.device), offset))
        layout = WeightsLayout(weights.nbytes, header[1], header[2], tuple(copies.values()))
        _complete(place, storages, layout)


def _divide(pickled: Pickled, outside: Container[int]) -> tuple[Archive, list[int]]:
    """``state.pt`` with stubs for the storages that lie outside of it, told by ``_cdata``; and their numbers."""
    keys = [
        key for key, stretch in enumerate(pickled.stretches) if stretch.nbytes and stretch.storage._cdata in outside
    ]
    contents: list[Content] = list(pickled.stretches)
    for key in keys:
        contents[key] = bytes(STUB_BYTES)
    return Archive(pickled, contents), keys


def _complete(place: Replacement, storages: Sequence[StorageFile], weights: WeightsLayout | None) -> None:
    """Writes the manifest, and takes along what is not the checkpoint's."""
    folder = place.temporary_path
    with open(os.path.join(folder, MANIFEST_FILE), "xb") as file:
        file.write(make_manifest(folder, storages, weights))
    if not os.path.islink(place.path) and is_tensor_directory(place.path):
        for name in foreign_names(place.path):
            _take_along(os.path.join(place.path, name), os.path.join(folder, name))


def _take_along(old: str, new: str) -> None:
    """Gives a file, or all files of a directory, another name; a copy where that cannot be."""
    if os.path.isdir(old) and not os.path.islink(old):
        shutil.copytree(old, new, symlinks=True, copy_function=_take_along)
        return
    try:
        os.link(old, new, follow_symlinks=False)
    except OSError:
        shutil.copy2(old, new, follow_symlinks=False)


def _linkable_files(path: str) -> dict[tuple[str, int], str]:
    """The files of a checkpoint directory by number and size; none if that cannot be told."""
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
    """The absolute path. A link is a place itself: what it points to is a checkpoint of another name."""
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
            "is there and is no checkpoint directory, nor a file of torch, so it is not replaced; remove it or save "
            "elsewhere",
            target,
        )
