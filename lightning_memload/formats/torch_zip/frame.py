"""Reads and compares the structures of a zip archive: local headers, descriptors, the directory and its end records.

A zip archive stores most values twice. A reader uses one of the two; verification compares them. The version fields,
file attributes and padding are not compared, because no reader of checkpoints uses them.
"""

from __future__ import annotations

import struct
import zipfile
from typing import Any

from lightning_memload.checkpoint.inventory import Damage
from lightning_memload.formats.torch_zip.layout import (
    DESCRIPTOR,
    DESCRIPTOR_64,
    DESCRIPTOR_MAGIC,
    END,
    END_64,
    END_64_MAGIC,
    END_MAGIC,
    FLAG_DESCRIPTOR,
    LISTED_MAGIC,
    LOCAL_HEADER,
    LOCATOR_64,
    LOCATOR_64_MAGIC,
    MAX_UINT32,
)
from lightning_memload.storage.source import FileView, StoredFile
from lightning_memload.storage.stream import FilePosition

__all__ = ["MAX_DIRECTORY_BYTES", "check_end", "check_entry", "is_folder", "read_entries"]

# The directory of a million tensors takes some 80 MiB. zipfile has no limit, and its objects take 7 times the size.
MAX_DIRECTORY_BYTES = 256 << 20

# The magic bytes, and the lengths of name, extra field and comment.
_LISTED_HEADER = struct.Struct("<4s24x3H12x")
_DIRECTORY_BIT = 0x10
_MAX_UINT16 = 0xFFFF


class _BoundedStream(FilePosition):
    """The file methods that ``zipfile`` needs to list an archive.

    Refuses reads that are too large for a directory: ``zipfile`` would allocate the memory first, and a hostile sparse
    file takes no disk space.
    """

    def __init__(self, file: StoredFile | FileView) -> None:
        super().__init__(file)
        self._file = file

    def read(self, nbytes: int = -1) -> bytes:
        if nbytes > MAX_DIRECTORY_BYTES:
            raise zipfile.BadZipFile(f"it declares a size of {nbytes} bytes, and the limit is {MAX_DIRECTORY_BYTES}")
        left = max(0, self._size_bytes - self._position)
        data = self._file.pread(left if nbytes < 0 else min(nbytes, left), self._position)
        self._position += len(data)
        return data


def read_entries(file: StoredFile | FileView) -> list[zipfile.ZipInfo]:
    """The entries of the directory at the end of a zip archive.

    Raises:
        zipfile.BadZipFile: There is no directory, or it is larger than 256 MiB.
        Exception: ``struct.error``, ``ValueError``, ``NotImplementedError``, ``OverflowError`` or ``MemoryError``: the
            standard library raises these for damaged bytes.

    Peak memory: some 7 times the size of the directory.
    """
    with zipfile.ZipFile(_BoundedStream(file)) as archive:
        return archive.infolist()


def is_folder(entry: zipfile.ZipInfo) -> bool:
    """Whether an entry is a folder. torch writes no folders, but programs that repack a checkpoint do."""
    return entry.filename.endswith("/") and entry.file_size == 0


def check_entry(file: StoredFile | FileView, entry: zipfile.ZipInfo, data_offset: int) -> Damage | None:
    """Compares the directory's entry of a record with the local header before its data and the descriptor after it.

    Args:
        file: The open file.
        entry: The entry in the directory.
        data_offset: Position of the record's data in the file.

    Returns:
        The first difference, ``None`` if there is none.
    """
    name = entry.orig_filename.encode("utf-8" if entry.flag_bits & 0x800 else "cp437", "replace")
    header = file.pread(LOCAL_HEADER.size + len(name), entry.header_offset)
    _, _, flags, method, clock, date, crc32, packed, nbytes, name_length, _ = LOCAL_HEADER.unpack_from(header)
    local: dict[str, Any] = {"flags": flags, "compression": method, "name": header[LOCAL_HEADER.size :]}
    year, month, day, hour, minute, second = entry.date_time
    local |= {"date": date, "time": clock}
    listed: dict[str, Any] = {"flags": entry.flag_bits, "compression": entry.compress_type, "name": name}
    listed |= {"date": (year - 1980) << 9 | month << 5 | day, "time": hour << 11 | minute << 5 | second // 2}
    local["name length"], listed["name length"] = name_length, len(name)
    # Each value is either in the local header, or deferred to the descriptor or to the zip64 field.
    for word, here, there in (
        ("CRC-32", crc32, entry.CRC),
        ("packed size", packed, entry.compress_size),
        ("size", nbytes, entry.file_size),
    ):
        deferred = (0, MAX_UINT32) if flags & FLAG_DESCRIPTOR else (MAX_UINT32,) if word != "CRC-32" else ()
        local[word], listed[word] = there if here in deferred else here, there
    where = entry.header_offset
    if local == listed and flags & FLAG_DESCRIPTOR:
        where = data_offset + entry.compress_size
        local = _read_descriptor(file, where, is_large=max(entry.file_size, entry.header_offset) >= MAX_UINT32)
        listed = {"magic": DESCRIPTOR_MAGIC, "CRC-32": entry.CRC}
        listed |= {"packed size": entry.compress_size, "size": entry.file_size}
    for word, here in local.items():
        if here != listed[word]:
            return Damage(
                file.name,
                f"{file.name} is damaged: of record {entry.filename!r} the directory has {word} {listed[word]!r}, but "
                f"the bytes at {where}, beside its data, have {here!r}.",
                key=entry.filename,
                offset=where,
                expected=listed[word] if isinstance(here, int) else None,
                actual=here if isinstance(here, int) else None,
            )
    return None


def _read_descriptor(file: StoredFile | FileView, offset: int, *, is_large: bool) -> dict[str, Any]:
    layout = DESCRIPTOR_64 if is_large else DESCRIPTOR
    data = file.pread(layout.size, offset)
    values = layout.unpack(data) if len(data) == layout.size else (data, None, None, None)
    return dict(zip(("magic", "CRC-32", "packed size", "size"), values, strict=True))


def check_end(file: StoredFile | FileView, entries: list[zipfile.ZipInfo]) -> list[Damage]:
    """Compares the end records of the archive with its directory and the entries in it."""
    found: list[Damage] = []

    def require(word: str, offset: int, actual: Any, *allowed: Any) -> None:
        if actual not in allowed:
            number = isinstance(actual, int)
            found.append(
                Damage(
                    file.name,
                    f"{file.name} is damaged: at its end, byte {offset}, it has {word} {actual!r} instead of "
                    f"{allowed[0]!r}.",
                    offset=offset,
                    expected=allowed[0] if number else None,
                    actual=actual if number else None,
                )
            )

    count = len(entries)
    for entry in entries:
        what = f"for record {entry.filename!r} the"
        require(f"{what} volume", entry.header_offset, entry.volume, 0)
        # torch (2.13) takes a record with this bit for a folder, and loads uninitialised memory for it.
        if not is_folder(entry):
            require(f"{what} directory bit", entry.header_offset, entry.external_attr & _DIRECTORY_BIT, 0)
    position = file.size_bytes - END.size
    magic, disk, start_disk, here, total, nbytes, start, comment_length = END.unpack(file.pread(END.size, position))
    if magic != END_MAGIC:
        return found  # A comment follows the end record. torch writes none, and readers skip it.
    require("disk", position, disk, 0, _MAX_UINT16)
    require("disk of the directory", position, start_disk, 0, _MAX_UINT16)
    require("a comment of length", position, comment_length, 0)
    locator = position - LOCATOR_64.size
    data = file.pread(LOCATOR_64.size, locator) if locator >= 0 else b""
    if data.startswith(LOCATOR_64_MAGIC):
        _, locator_disk, end_64, disks = LOCATOR_64.unpack(data)
        require("disk", locator, locator_disk, 0)
        require("number of disks", locator, disks, 1)
        require("its zip64 end at", locator, end_64, locator - END_64.size)
        end_64 = locator - END_64.size
        magic_64, size_64, _, _, disk_64, start_disk_64, here_64, total_64, nbytes_64, start_64 = END_64.unpack(
            file.pread(END_64.size, end_64)
        )
        require("magic", end_64, magic_64, END_64_MAGIC)
        require("a length of itself of", end_64, size_64, END_64.size - 12)
        require("disk", end_64, disk_64, 0)
        require("disk of the directory", end_64, start_disk_64, 0)
        require("entries on this disk", end_64, here_64, count)
        require("entries", end_64, total_64, count)
        require("size of the directory", position, nbytes, nbytes_64, MAX_UINT32)
        require("start of the directory", position, start, start_64, MAX_UINT32)
        require("end of the directory", end_64, start_64 + nbytes_64, end_64)
        start, nbytes = start_64, nbytes_64
    else:
        require("end of the directory", position, start + nbytes, position)
    require("entries on this disk", position, here, count & _MAX_UINT16, _MAX_UINT16)
    require("entries", position, total, count & _MAX_UINT16, _MAX_UINT16)
    if not found:
        require("lengths of the directory's entries that add up to", start, _walk(file, start, nbytes), nbytes)
    return found


def _walk(file: StoredFile | FileView, start: int, nbytes: int) -> int:
    """The sum of the sizes that the directory's entries declare. ``zipfile`` does not check the last one."""
    data = file.pread(min(nbytes, MAX_DIRECTORY_BYTES), start)
    position = 0
    while position + _LISTED_HEADER.size <= len(data):
        magic, *lengths = _LISTED_HEADER.unpack_from(data, position)
        if magic != LISTED_MAGIC:
            break
        position += _LISTED_HEADER.size + sum(lengths)
    return position
