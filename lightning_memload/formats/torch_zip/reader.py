"""The format of ``torch.save``: an uncompressed zip with one pickle and one record per storage.

The index comes from the standard library alone: ``zipfile`` lists the records, their local headers tell where the
data starts, and the pickle is walked without running any of it. It does not judge whether the file is safe to *load*:
``torch.load`` builds the object, so every rule of ``weights_only`` is torch's own; only the storages under its tensors
are ours. They are handed over through ``map_location``, torch's public way to say where a storage goes, in the order in
which the index found them.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import sys
from collections.abc import Collection, Iterator, Mapping
from functools import partial
from typing import Any

import torch

from lightning_memload.bytes import Record, lay_out
from lightning_memload.checkpoint.index import Checkpoint, StorageInfo
from lightning_memload.checkpoint.inventory import Damage, Inventory
from lightning_memload.checkpoint.mapped import MappedCheckpoint, end_loading
from lightning_memload.errors import (
    CheckpointFormatError,
    InsufficientMemoryError,
    MemloadError,
    UnmappableCheckpointError,
    UnsafeGlobalsError,
)
from lightning_memload.formats.torch_zip.hollow import hollow_copy, memory_file
from lightning_memload.formats.torch_zip.records import is_zip, pickle_is_sound, read_records, read_zip_inventory
from lightning_memload.pickles.erasing import erase
from lightning_memload.pickles.globals import explain_refusal, refused_globals
from lightning_memload.pickles.plain import NotPlain, build_plain
from lightning_memload.pickles.structure import (
    STUB_BYTES,
    PickleContents,
    find_storage,
    storages_of_objects,
    walk_pickle,
)
from lightning_memload.storage import FileMapping, FileSet, LocalFile, Reservation, StoredFile, map_or_reserve
from lightning_memload.storage.places import is_file, open_file

__all__ = ["TorchZip", "load_onto", "load_what_is_allowed", "name_records", "read_index"]

# Parts of messages of torch (2.6 to 2.13).
_NOT_HANDED_OVER = "Callable map_location not supported"
# Of fewer storages torch.load builds the object in some 5 ms.
_MANY_STORAGES = 100
_ZIP_READER = ("PytorchStreamReader", "inline_container", "hasRecord")


class TorchZip:
    """The files of ``torch.save`` since torch 1.6, which includes every Lightning ``.ckpt``."""

    name = "torch"

    def recognizes(self, path: str) -> bool:
        """Whether the file is a zip archive."""
        return is_file(path) and is_zip(path)

    def read_index(self, path: str) -> Checkpoint:
        """Indexes the file, see :func:`read_index`."""
        with open_file(path) as file:
            return read_index(file)

    def load(self, path: str, *, weights_only: bool | None, erases: bool = False) -> tuple[Any, MappedCheckpoint]:
        """Loads the object; the tensors stay in the file.

        Raises:
            InsufficientMemoryError: A single tensor is larger than this machine's memory.
            MemloadError: The whole file is larger than this machine's memory, and torch is older than 2.7.
            UnsafeGlobalsError: ``weights_only`` refuses classes in the file.
            pickle.UnpicklingError: ``weights_only`` refuses the file for another reason. The message is torch's.
        """
        source = FileSet([path])
        (file,) = source.files
        try:
            records, pickled = read_records(file)
            with contextlib.suppress(NotPlain):
                return _load_plain(source, records, pickled)
            index = _make_index(file, walk_pickle(file.name, pickled, records))
            mapping = map_or_reserve(source)
            loaded, refusal = load_what_is_allowed(
                mapping, index, file, weights_only=weights_only, erases=erases, may_be_plain=False
            )
            return end_loading(loaded, index, source, mapping, refusal)
        except BaseException:
            source.close()
            raise

    def take_inventory(self, path: str) -> Inventory:
        """Every record of the file, the pickle and the small ones too, see :class:`CheckpointFormat`.

        Raises:
            UnmappableCheckpointError: The records are compressed.
        """
        with open_file(path) as file:
            files = lay_out([(path, file.size_bytes)])
            records, damage = read_zip_inventory(file)
            names: dict[int, str] = {}
            if not damage and pickle_is_sound(file, records):
                try:
                    names = name_records(read_index(file))
                except UnmappableCheckpointError:
                    pass  # Whether the tensors can be used as they lie is not asked here.
                except CheckpointFormatError as error:
                    damage.append(Damage(path, str(error)))
        named = tuple(record._replace(name=names.get(record.offset, record.name)) for record in records)
        return Inventory(path, self.name, files, named, tuple(damage))


def read_index(file: StoredFile) -> Checkpoint:
    """Indexes a torch zip checkpoint.

    Reads the zip's directory, one local header per record and the pickle: a few hundred bytes per tensor, none of
    the tensors. Peak memory is that of the pickle and the index.

    Args:
        file: The open file.

    Returns:
        The index.

    Raises:
        CheckpointFormatError: The file is truncated, or its parts contradict one another.
        UnmappableCheckpointError: The records are compressed or of the other byte order.
    """
    records, pickled = read_records(file)
    return _make_index(file, walk_pickle(file.name, pickled, records))


def _make_index(file: StoredFile, found: PickleContents) -> Checkpoint:
    return Checkpoint(
        path=file.name,
        format=TorchZip.name,
        files=lay_out([(file.name, file.size_bytes)]),
        tensors=found.tensors,
        storages=found.storages,
        globals=found.globals,
        special=found.special,
    )


def load_what_is_allowed(
    mapping: FileMapping,
    index: Checkpoint,
    file: StoredFile,
    *,
    weights_only: bool | None,
    erases: bool,
    stubs: Collection[str] = (),
    may_be_plain: bool = True,
) -> tuple[Any, UnsafeGlobalsError | None]:
    """Loads the object of a torch zip file as :func:`load_onto` does, on request without what is refused.

    Args:
        mapping: See :func:`load_onto`.
        index: See :func:`load_onto`.
        file: See :func:`load_onto`.
        weights_only: See :func:`load_onto`.
        stubs: See :func:`load_onto`.
        erases: Where ``weights_only`` refuses classes, load the object all the same, with tuples in which a
            ``RefusedGlobal`` stands for each of them. Nothing is built of these classes.
        may_be_plain: Try to build the object without ``torch.load`` first.

    Returns:
        The object, and the error that would have been raised without ``erases``.
    """
    if may_be_plain:
        with contextlib.suppress(NotPlain):
            return _load_plain_indexed(mapping, index, file, stubs), None
    try:
        return load_onto(mapping, index, file, weights_only=weights_only, stubs=stubs), None
    except UnsafeGlobalsError as error:
        if not erases:
            raise
        refusal = error
    try:
        _, pickled = read_records(file)
        refused = {(item.module, item.qualname) for item in refused_globals(index.globals)}
        erased = erase(pickled, refused, sys.byteorder)
        with memory_file([(0, erased.archive)]) as archive, torch.serialization.safe_globals([*erased.markers]):
            all_of_them = {storage.key for storage in index.storages if storage.nbytes}
            loaded = load_onto(mapping, index, archive, weights_only=True, stubs=all_of_them)
    except Exception:  # This reason is not the one for which the file was refused.
        raise refusal from None
    return loaded, refusal


def load_onto(
    mapping: FileMapping, index: Checkpoint, file: StoredFile, *, weights_only: bool | None, stubs: Collection[str] = ()
) -> Any:
    """Loads the object of a torch zip file, with its tensors in a mapping.

    Args:
        mapping: The mapped files of the index.
        index: Where each storage is.
        file: The zip file. By its descriptor: its name may belong to another checkpoint by now, whose object must not
            be given the tensors of this one.
        weights_only: Passed to ``torch.load`` exactly as given.
        stubs: Keys of the storages that the zip file has only a stub of, see :func:`walk_pickle`.

    Raises:
        CheckpointFormatError: The file changed since the index was read, or torch finds it damaged.
        UnmappableCheckpointError: A tensor is of a subclass whose storage torch does not give access to.
        InsufficientMemoryError: See :class:`TorchZip`, as for all others.
    """
    if isinstance(mapping, Reservation) and (index.globals or index.special):
        _fill_for_objects(mapping, index, file)
    handover: Any = _Handover(index, mapping, stubs)
    with contextlib.ExitStack() as stack:
        local = file if isinstance(file, LocalFile) else stack.enter_context(hollow_copy(file))
        descriptor = local.open_descriptor()
    try:
        path = f"/proc/self/fd/{descriptor}"
        with _without_reading(index, file) as mmap:
            return torch.load(path, map_location=handover, weights_only=weights_only, mmap=mmap)
    except BaseException as error:
        if isinstance(mapping, Reservation):
            mapping.abandon()
        if isinstance(error, MemloadError) or not isinstance(error, Exception):
            raise
        if os.fstat(descriptor).st_size == file.size_bytes:
            if isinstance(error, pickle.UnpicklingError):
                raise explain_refusal(index, error) from error
            if _NOT_HANDED_OVER in str(error):
                raise UnmappableCheckpointError(
                    f"{file.name} holds a tensor of a subclass that torch builds in the ordinary way only.",
                    path=file.name,
                ) from error
            if any(word in str(error) for word in _ZIP_READER):
                raise CheckpointFormatError(
                    f"{file.name} is damaged: {str(error).partition(chr(10))[0]}. Resume from another checkpoint.",
                    path=file.name,
                ) from error
            raise
        raise CheckpointFormatError(
            f"{file.name} had {file.size_bytes} bytes, and {os.fstat(descriptor).st_size} while it was loaded: it was "
            "changed meanwhile. Load it again, and save to another file that then takes its name.",
            path=file.name,
        ) from error
    finally:
        os.close(descriptor)
        # torch (2.13) keeps the map_location of a load that failed until the next load: not the file with it.
        handover.end()


def _fill_for_objects(mapping: Reservation, index: Checkpoint, file: StoredFile) -> None:
    """Reads what code may use while the object is built: tensors within objects of other classes, and special ones."""
    records, pickled = read_records(file)
    is_used = storages_of_objects(file.name, pickled, records)
    if len(is_used) != len(index.storages):
        raise CheckpointFormatError(f"{file.name} was changed while it was loaded. Load it again.", path=file.name)
    used = [storage for storage, is_one in zip(index.storages, is_used, strict=True) if is_one]
    mapping.fill([(storage.offset, storage.nbytes) for storage in used if storage.nbytes])


def _load_plain(source: FileSet, records: Mapping[str, Record], pickled: bytes) -> tuple[Any, MappedCheckpoint]:
    """Builds the object and the index in one pass.

    Raises:
        NotPlain: It is left to ``torch.load`` and the inert walk.
        OSError: The kernel refuses the mapping.
    """
    (file,) = source.files
    if sum(name.startswith("data/") for name in records) < _MANY_STORAGES:
        raise NotPlain  # torch takes no time for it
    _require_loadable(file, records)
    mapping = map_or_reserve(source)
    try:
        plain = build_plain(pickled, partial(find_storage, file.name, records), mapping)
    except BaseException:
        if isinstance(mapping, Reservation):
            mapping.abandon()
        raise
    index, root = _make_index(file, PickleContents(plain.tensors(), plain.storages, (), ())), plain.root
    del plain  # It holds the storages, and what no tensor holds any more is not read.
    return end_loading(root, index, source, mapping)


def _load_plain_indexed(mapping: FileMapping, index: Checkpoint, file: StoredFile, stubs: Collection[str]) -> Any:
    """Builds the object of a file that was indexed, see :func:`load_onto`, without ``torch.load``.

    Raises:
        NotPlain: It is left to ``torch.load``.
    """
    if len(index.storages) < _MANY_STORAGES:
        raise NotPlain  # torch takes no time for it
    try:
        records, pickled = read_records(file)
    except (MemloadError, OSError) as error:
        raise NotPlain from error  # changed since it was indexed
    _require_loadable(file, records)
    storages = {storage.key: storage for storage in index.storages}

    def find(key: str, location: str, nbytes: int) -> StorageInfo:
        info = storages[key]
        if location != info.location or nbytes != (STUB_BYTES if key in stubs else info.nbytes):
            raise NotPlain
        return info

    return build_plain(pickled, find, mapping).root


def _require_loadable(file: StoredFile, records: Mapping[str, Record]) -> None:
    """Raises ``NotPlain`` for a file that torch refuses, or loads in another way."""
    if file.size_bytes >= _memory_bytes() or "constants.pkl" in records:
        raise NotPlain  # a file that is too large, for which torch has an error, or TorchScript


def name_records(index: Checkpoint) -> dict[int, str]:
    """The name of a tensor for the offset of each storage that has one."""
    names: dict[int, str] = {}
    for tensor in index:
        if tensor.storage.nbytes:
            names.setdefault(tensor.storage.offset, tensor.name)
    return names


class _Handover:
    """A ``map_location`` that replaces each storage torch brings by the mapped one of the same record."""

    def __init__(self, index: Checkpoint, mapping: FileMapping, stubs: Collection[str]) -> None:
        self._path = index.path
        self._mapping: FileMapping | None = mapping
        self._stubs = stubs
        # torch asks once for each storage, in the order of the pickle, but may ask many times for an empty one.
        self._expected: Iterator[StorageInfo] = iter(storage for storage in index.storages if storage.nbytes)

    def __call__(self, storage: torch.UntypedStorage, location: str) -> torch.UntypedStorage:
        if storage.nbytes() == 0:
            return torch.UntypedStorage(0)  # torch's own empty slice would keep torch's mapping alive
        info = next(self._expected, None)
        announced = None if info is None else STUB_BYTES if info.key in self._stubs else info.nbytes
        if self._mapping is None or info is None or announced != storage.nbytes():
            raise CheckpointFormatError(
                f"{self._path}: torch loads a storage of {storage.nbytes()} bytes where the index has {info}. The file "
                "changed while it was read, or holds objects that the index does not understand.",
                path=self._path,
            )
        return self._mapping.storage(info.offset, info.nbytes)

    def end(self) -> None:
        """Drops the reference to the mapping."""
        self._mapping = None


def _memory_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@contextlib.contextmanager
def _without_reading(index: Checkpoint, file: StoredFile) -> Iterator[bool]:
    """A context in which ``torch.load`` reads no tensor data. Yields the ``mmap`` argument for it.

    A mapping by torch reserves memory for the whole file, which the kernel refuses beyond RAM and swap under its
    default overcommit. Larger files go through ``skip_data``, whose storages are allocated one at a time and never
    touched. It is not the first choice: it is a prototype in torch 2.13, and torch 2.6 has it for saving only.
    """
    memory_bytes = _memory_bytes()
    path, file_bytes = file.name, file.size_bytes
    if file_bytes < memory_bytes:
        yield True
        return
    try:
        with torch.serialization.skip_data():
            yield False
    except RuntimeError as error:
        if "skip_data" in str(error):
            raise MemloadError(
                f"{path} ({file_bytes} bytes) is larger than this machine's memory; torch "
                f"{torch.__version__} cannot open such a file. Use torch >= 2.7."
            ) from error
        if "allocate memory" in str(error):
            largest = max(storage.nbytes for storage in index.storages)
            raise InsufficientMemoryError(
                f"{path} holds a tensor of {largest} bytes, and this machine has {memory_bytes} bytes of memory: "
                "torch cannot make an object with such a tensor, although no byte of it would be read. "
                "open_checkpoint() tells what the file holds.",
                device="cpu",
                needed_bytes=largest,
                free_bytes=memory_bytes,
            ) from error
        raise
