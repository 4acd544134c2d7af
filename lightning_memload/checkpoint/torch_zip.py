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
import struct
import sys
import zipfile
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from zlib_ng import zlib_ng

from lightning_memload.checkpoint.index import Checkpoint, StorageInfo, lay_out
from lightning_memload.checkpoint.inventory import Damage, Inventory, Section
from lightning_memload.checkpoint.mapped import MappedCheckpoint, UnmappableCheckpoint
from lightning_memload.checkpoint.mapping import FileMapping
from lightning_memload.checkpoint.source import FilePart, FileSet, LocalFile
from lightning_memload.checkpoint.torch_pickle import STUB_BYTES, Record, walk_pickle
from lightning_memload.checkpoint.zip_frame import check_end, check_entry, read_entries
from lightning_memload.errors import CheckpointFormatError, InsufficientMemoryError, MemloadError

__all__ = [
    "TorchZip",
    "is_zip",
    "load_onto",
    "name_sections",
    "pickle_is_sound",
    "read_index",
    "read_records",
    "read_zip_inventory",
]

_ZIP_MAGIC = b"PK\x03\x04"
# Reading a pickle takes time and memory in proportion to it: some 10 us and 100 bytes for each tensor.
_MAX_PICKLE_BYTES = 2 << 30
_MAX_ORDER_BYTES = 64
_LOCAL_HEADER = struct.Struct("<4s4xH16xHH")
# What torch's messages have in common (2.6 to 2.13).
_NOT_HANDED_OVER = "Callable map_location not supported"
_ZIP_READER = ("PytorchStreamReader", "inline_container", "hasRecord")


class TorchZip:
    """What ``torch.save`` writes since torch 1.6, and with it every Lightning ``.ckpt``."""

    name = "torch"

    def recognizes(self, path: str) -> bool:
        """Whether the file is a zip archive."""
        return os.path.isfile(path) and is_zip(path)

    def read_index(self, path: str) -> Checkpoint:
        """Indexes the file, see :func:`read_index`."""
        with LocalFile(path) as file:
            return read_index(file)

    def load(self, path: str, *, weights_only: bool | None) -> tuple[Any, MappedCheckpoint]:
        """Loads the object; the tensors stay in the file.

        Raises:
            InsufficientMemoryError: A single tensor is larger than this machine's memory.
            MemloadError: The whole file is, and torch is older than 2.7.
            pickle.UnpicklingError: ``weights_only`` forbids what the file holds; torch's own message.
        """
        source = FileSet([path])
        try:
            index = read_index(source.files[0])
            mapping = FileMapping(source)
        except BaseException:
            source.close()
            raise
        loaded = load_onto(mapping, index, source.files[0], weights_only=weights_only)
        return loaded, MappedCheckpoint(index, source, mapping)

    def take_inventory(self, path: str) -> Inventory:
        """Every record of the file, the pickle and the small ones too, see :class:`CheckpointFormat`.

        Raises:
            UnmappableCheckpoint: The records are compressed.
        """
        with LocalFile(path) as file:
            files = lay_out([(path, file.size_bytes)])
            sections, damage = read_zip_inventory(file)
            names: dict[int, str] = {}
            if not damage and pickle_is_sound(file, sections):
                try:
                    names = name_sections(read_index(file))
                except UnmappableCheckpoint:
                    pass  # Nobody asks here whether the tensors can be used as they lie.
                except CheckpointFormatError as error:
                    damage.append(Damage(path, str(error)))
        named = tuple(replace(section, key=names.get(section.offset, section.key)) for section in sections)
        return Inventory(path, self.name, files, named, tuple(damage))


def is_zip(path: str | os.PathLike[str]) -> bool:
    """Whether the file starts like a zip archive. Legacy ``torch.save`` files (before torch 1.6) do not."""
    with open(path, "rb") as file:
        return file.read(len(_ZIP_MAGIC)) == _ZIP_MAGIC


def read_index(file: LocalFile) -> Checkpoint:
    """Indexes a torch zip checkpoint.

    Reads the zip's directory, one local header per record and the pickle: a few hundred bytes per tensor, none of
    the tensors. Peak memory is that of the pickle and the index.

    Args:
        file: The open file.

    Returns:
        The index.

    Raises:
        CheckpointFormatError: The file is truncated, or its parts contradict one another.
        UnmappableCheckpoint: The records are compressed or of the other byte order.
    """
    records, pickled = read_records(file)
    tensors, storages = walk_pickle(file.name, pickled, records)
    return Checkpoint(
        path=file.name,
        format=TorchZip.name,
        files=lay_out([(file.name, file.size_bytes)]),
        tensors=tensors,
        storages=storages,
    )


def read_records(file: LocalFile | FilePart) -> tuple[dict[str, Record], bytes]:
    """Reads what describes the tensors of an archive.

    Args:
        file: The archive: a file, or a part of one.

    Returns:
        The records, with offsets from the start of the archive, by their name below its one top folder (``data.pkl``,
        ``data/0``); and the pickle.

    Raises:
        CheckpointFormatError: The archive is truncated or damaged.
        UnmappableCheckpoint: The records are compressed or of the other byte order.
    """
    start = file.pread(len(_ZIP_MAGIC), 0)
    if start != _ZIP_MAGIC:
        raise CheckpointFormatError(
            f"{file.name} is not what torch.save writes by default: it begins with {start!r}. It is damaged, or was "
            "written by torch < 1.6 or with another serialization. Save it again with torch's defaults.",
            path=file.name,
        )
    records = _read_directory(file)
    order = records.get("byteorder")
    if order is not None and (order.nbytes > _MAX_ORDER_BYTES or _read_small(file, order) != sys.byteorder.encode()):
        raise UnmappableCheckpoint(
            f"{file.name} was saved on a machine of the other byte order; its tensors must be byte-swapped to be used.",
            path=file.name,
        )
    if "data.pkl" not in records:
        raise CheckpointFormatError(
            f"{file.name} is a zip archive but holds no data.pkl, so torch.save did not write it.", path=file.name
        )
    if records["data.pkl"].nbytes > _MAX_PICKLE_BYTES:
        raise UnmappableCheckpoint(
            f"{file.name} holds {records['data.pkl'].nbytes} bytes of pickled objects beside its tensors; more than "
            f"{_MAX_PICKLE_BYTES} are not read.",
            path=file.name,
        )
    return records, _read_small(file, records["data.pkl"])


def load_onto(
    mapping: FileMapping, index: Checkpoint, file: LocalFile, *, weights_only: bool | None, stubs: Collection[str] = ()
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
        UnmappableCheckpoint: A tensor is of a subclass whose storage torch gives to nobody.
        InsufficientMemoryError: See :class:`TorchZip`, as for all others.
    """
    handover: Any = _Handover(index, mapping, stubs)
    descriptor = file.open_descriptor()
    try:
        path = f"/proc/self/fd/{descriptor}"
        with _without_reading(index, file) as mmap:
            return torch.load(path, map_location=handover, weights_only=weights_only, mmap=mmap)
    except Exception as error:
        if isinstance(error, MemloadError):
            raise
        if os.fstat(descriptor).st_size == file.size_bytes:
            if _NOT_HANDED_OVER in str(error):
                raise UnmappableCheckpoint(
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


def pickle_is_sound(file: LocalFile | FilePart, sections: Sequence[Section], start: int = 0) -> bool:
    """Whether the records that an index is made from have their checksums. If not, verifying these records tells."""
    for section in sections:
        if section.key.partition("/")[2] in ("data.pkl", "byteorder") and section.nbytes <= _MAX_PICKLE_BYTES:
            data = file.pread(section.nbytes, section.offset - start)
            if section.crc32 is not None and zlib_ng.crc32(data) != section.crc32:
                return False
    return True


def name_sections(index: Checkpoint) -> dict[int, str]:
    """The name of a tensor for the offset of each storage that has one."""
    names: dict[int, str] = {}
    for tensor in index:
        if tensor.storage.nbytes:
            names.setdefault(tensor.storage.offset, tensor.name)
    return names


def read_zip_inventory(file: LocalFile | FilePart, start: int = 0) -> tuple[list[Section], list[Damage]]:
    """Every record of a torch zip file that can be read, and what is wrong with the others.

    Args:
        file: The open file.
        start: Its place in the run of all files.

    Raises:
        UnmappableCheckpoint: The records are compressed.
        OSError: Reading failed.
    """
    try:
        entries = _read_entries(file)
    except CheckpointFormatError as error:
        return [], [Damage(file.name, str(error))]
    sections: list[Section] = []
    damage: list[Damage] = []
    for entry in entries:
        try:
            record = _locate(file, entry)
        except UnmappableCheckpoint:
            raise
        except CheckpointFormatError as error:
            damage.append(Damage(file.name, str(error), key=entry.filename, offset=entry.header_offset))
            continue
        problem = check_entry(file, entry, record.offset)
        damage += [problem] if problem is not None else []
        sections.append(Section(entry.filename, start + record.offset, record.nbytes, record.crc32))
    return sections, damage + check_end(file, entries)


def _read_directory(file: LocalFile | FilePart) -> dict[str, Record]:
    """Records by their name below the archive's one top folder (``data.pkl``, ``data/0``)."""
    records: dict[str, Record] = {}
    for entry in _read_entries(file):
        name = entry.filename.partition("/")[2]
        if name in records:
            raise CheckpointFormatError(
                f"{file.name} holds record {name!r} twice, so which one is meant cannot be told. The file is damaged.",
                path=file.name,
            )
        records[name] = _locate(file, entry)
    _require_apart(file, records)
    return records


def _read_entries(file: LocalFile | FilePart) -> list[zipfile.ZipInfo]:
    try:
        return read_entries(file)
    except (zipfile.BadZipFile, struct.error, ValueError, NotImplementedError, OverflowError, MemoryError) as error:
        raise CheckpointFormatError(
            f"{file.name} starts like a torch checkpoint, but the directory at its end cannot be read ({error}): the "
            f"file is truncated or damaged. It has {file.size_bytes} bytes. Compare with the size of the original, "
            "copy it again, or resume from another checkpoint.",
            path=file.name,
        ) from error


def _locate(file: LocalFile | FilePart, entry: zipfile.ZipInfo) -> Record:
    """Where the data of a record is."""
    in_file = 0 <= entry.header_offset < file.size_bytes
    header = file.pread(_LOCAL_HEADER.size, entry.header_offset) if in_file else b""
    if len(header) < _LOCAL_HEADER.size or not header.startswith(_ZIP_MAGIC):
        raise CheckpointFormatError(
            f"{file.name}: the directory places record {entry.filename!r} at byte {entry.header_offset}, but no "
            "record starts there. The file is damaged.",
            path=file.name,
        )
    _, method, name_length, extra_length = _LOCAL_HEADER.unpack(header)
    offset = entry.header_offset + _LOCAL_HEADER.size + name_length + extra_length
    if entry.compress_type != method and (damage := check_entry(file, entry, offset)) is not None:
        raise CheckpointFormatError(damage.problem, path=file.name)
    if entry.compress_type != zipfile.ZIP_STORED:
        raise UnmappableCheckpoint(
            f"{file.name} holds its record {entry.filename!r} compressed, so its tensors are not in the file as "
            "they are.",
            path=file.name,
        )
    if entry.compress_size != entry.file_size:
        raise CheckpointFormatError(
            f"{file.name}: record {entry.filename!r} is stored as it is, but the directory gives it "
            f"{entry.file_size} bytes and {entry.compress_size} in the file. The file is damaged.",
            path=file.name,
        )
    if offset + entry.file_size > file.size_bytes:
        raise CheckpointFormatError(
            f"{file.name} is truncated: record {entry.filename!r} ends at byte {offset + entry.file_size}, but "
            f"the file is only {file.size_bytes} bytes.",
            path=file.name,
        )
    # torch.serialization.set_crc32_options(False) and skip_data() leave the field zero. A record whose true
    # CRC-32 is zero (one in four billion) then goes unverified, which is better than a false alarm.
    return Record(offset, entry.file_size, entry.CRC or None)


def _require_apart(file: LocalFile | FilePart, records: dict[str, Record]) -> None:
    """Raises if records overlap: a small file could else stand for a hundred thousand times its size."""
    end, before = 0, ""
    for name, record in sorted(records.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if record.offset < end:
            raise CheckpointFormatError(
                f"{file.name}: record {name!r} begins at byte {record.offset}, but record {before!r} ends at byte "
                f"{end}. The file is damaged, or made to mislead.",
                path=file.name,
            )
        end, before = record.offset + record.nbytes, name


def _read_small(file: LocalFile | FilePart, record: Record) -> bytes:
    data = file.pread(record.nbytes, record.offset)
    if record.crc32 is not None and zlib_ng.crc32(data) != record.crc32:
        raise CheckpointFormatError(
            f"{file.name} is damaged: the {record.nbytes} bytes at {record.offset}, which describe its contents, have "
            f"CRC-32 {zlib_ng.crc32(data):#010x}, but the file records {record.crc32:#010x}. Resume from another "
            "checkpoint.",
            path=file.name,
        )
    return data


class _Handover:
    """A ``map_location`` that replaces each storage torch brings by the mapped one of the same record."""

    def __init__(self, index: Checkpoint, mapping: FileMapping, stubs: Collection[str]) -> None:
        self._path = index.path
        self._mapping: FileMapping | None = mapping
        self._stubs = stubs
        # torch asks once for each storage, in pickle order, but again and again for empty ones.
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
        """Lets go of the mapping."""
        self._mapping = None


@contextlib.contextmanager
def _without_reading(index: Checkpoint, file: LocalFile) -> Iterator[bool]:
    """Within, ``torch.load`` reads no tensor data; the value is its ``mmap`` argument.

    A mapping by torch reserves memory for the whole file, which the kernel refuses beyond RAM and swap under its
    default overcommit. Larger files go through ``skip_data``, whose storages are allocated one at a time and never
    touched. (torch 2.13; an early prototype there, and torch 2.6 has it for saving only, hence not the first choice.)
    """
    memory_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
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
