"""Computes the layout of a torch zip archive: the position of each record, and the zip headers around it.

The bytes equal those of torch's own writer (miniz): uncompressed records, data aligned to 64 bytes by padding in the
local header, a descriptor with the CRC-32 after the data, and zip64 fields for numbers of more than 32 bits. The CRC-32
follows the data, so all positions are known before the first byte is written. This module uses neither torch nor files.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import NamedTuple

__all__ = [
    "ALIGNMENT_BYTES",
    "DESCRIPTOR",
    "DESCRIPTOR_64",
    "DESCRIPTOR_MAGIC",
    "END",
    "END_64",
    "END_64_MAGIC",
    "END_MAGIC",
    "FLAG_DESCRIPTOR",
    "FLAG_UTF8",
    "LISTED_MAGIC",
    "LOCAL_HEADER",
    "LOCAL_MAGIC",
    "LOCATOR_64",
    "LOCATOR_64_MAGIC",
    "MAX_UINT32",
    "ZipEntry",
    "data_descriptor",
    "directory",
    "directory_bytes",
    "lay_out",
    "local_header",
]

ALIGNMENT_BYTES = 64
# Numbers from this value on are stored in the zip64 fields.
MAX_UINT32 = 0xFFFFFFFF

LOCAL_HEADER = struct.Struct("<4s5H3I2H")
_CENTRAL_HEADER = struct.Struct("<4s6H3I5H2I")
DESCRIPTOR = struct.Struct("<4s3I")
DESCRIPTOR_64 = struct.Struct("<4sI2Q")
END_64 = struct.Struct("<4sQ2H2I4Q")
LOCATOR_64 = struct.Struct("<4sIQI")
END = struct.Struct("<4s4H2IH")
LOCAL_MAGIC, LISTED_MAGIC, DESCRIPTOR_MAGIC = b"PK\x03\x04", b"PK\x01\x02", b"PK\x07\x08"
END_MAGIC, LOCATOR_64_MAGIC, END_64_MAGIC = b"PK\x05\x06", b"PK\x06\x07", b"PK\x06\x06"

FLAG_UTF8 = 1 << 11
FLAG_DESCRIPTOR = 1 << 3
# torch's alignment field: "FB", the length of the padding, and the padding, all "Z".
_PADDING_ID = b"FB"
_PADDING = struct.Struct("<2sH")


class ZipEntry(NamedTuple):
    """The place of one record in the archive.

    Attributes:
        name: Its name in the archive.
        nbytes: Size of its data.
        header_offset: Where its local header starts.
        data_offset: Where its data starts, a multiple of 64 bytes.
    """

    name: str
    nbytes: int
    header_offset: int
    data_offset: int

    @property
    def data_end(self) -> int:
        """The end of its data. The descriptor follows."""
        return self.data_offset + self.nbytes

    @property
    def end(self) -> int:
        """The start of the next record's header. A record without data has no descriptor."""
        if not self.nbytes:
            return self.data_end
        return self.data_end + (DESCRIPTOR_64.size if self.is_zip64 else DESCRIPTOR.size)

    @property
    def is_zip64(self) -> bool:
        """Whether its size or position needs 64 bits."""
        return self.nbytes >= MAX_UINT32 or self.header_offset >= MAX_UINT32


def lay_out(records: Iterable[tuple[str, int]], *, start: int = 0) -> list[ZipEntry]:
    """Places the records one after the other.

    Args:
        records: Name and size in bytes of each record, in the order of the archive.
        start: Position of the first header.

    Returns:
        One entry for each record.

    Raises:
        ValueError: A size is negative, or a name is longer than a zip can hold.
    """
    entries = []
    for name, nbytes in records:
        length = len(name.encode())
        if nbytes < 0 or length > 0xFFFF:
            raise ValueError(f"a record of {nbytes} bytes with a name of {length} bytes cannot be stored")
        unpadded = start + LOCAL_HEADER.size + length + _PADDING.size
        if nbytes >= MAX_UINT32 or start >= MAX_UINT32:
            unpadded += len(_zip64_field(nbytes, start))
        entry = ZipEntry(name, nbytes, start, -(-unpadded // ALIGNMENT_BYTES) * ALIGNMENT_BYTES)
        entries.append(entry)
        start = entry.end
    return entries


def local_header(entry: ZipEntry) -> bytes:
    """The bytes from the entry's header to its data: header, name, zip64 field, padding."""
    text, nbytes, start, data_start = entry
    name = text.encode()
    # The compressed size is in the descriptor and the directory. It is 0 here, as in torch's files.
    extra = _zip64_field(nbytes, start, compressed_nbytes=0)
    padding = data_start - start - (LOCAL_HEADER.size + len(name) + len(extra) + _PADDING.size)
    extra += _PADDING.pack(_PADDING_ID, padding) + b"Z" * padding
    fixed = LOCAL_HEADER.pack(LOCAL_MAGIC, 0, _flags(nbytes), 0, 0, 0, 0, 0, 0, len(name), len(extra))
    return fixed + name + extra


def data_descriptor(entry: ZipEntry, crc32: int) -> bytes:
    """The bytes after the entry's data. Empty for an entry without data."""
    if not entry.nbytes:
        return b""
    descriptor = DESCRIPTOR_64 if entry.is_zip64 else DESCRIPTOR
    return descriptor.pack(DESCRIPTOR_MAGIC, crc32, entry.nbytes, entry.nbytes)


def directory(entries: Sequence[ZipEntry], crc32s: Sequence[int]) -> bytes:
    """The bytes after the last record: the central directory, and the end records of zip64 and of plain zip.

    Args:
        entries: All entries of the archive.
        crc32s: The CRC-32 of each entry.
    """
    start = entries[-1].end if entries else 0
    central = b"".join(_central_header(entry, crc32) for entry, crc32 in zip(entries, crc32s, strict=True))
    end_64 = start + len(central)
    count = len(entries)
    return b"".join(
        (
            central,
            END_64.pack(END_64_MAGIC, END_64.size - 12, 0x031E, 0x002D, 0, 0, count, count, len(central), start),
            LOCATOR_64.pack(LOCATOR_64_MAGIC, 0, end_64, 1),
            END.pack(
                END_MAGIC,
                0,
                0,
                min(count, 0xFFFF),
                min(count, 0xFFFF),
                min(len(central), MAX_UINT32),
                min(start, MAX_UINT32),
                0,
            ),
        )
    )


def directory_bytes(entries: Iterable[ZipEntry]) -> int:
    """Size of what :func:`directory` returns."""
    central = sum(
        _CENTRAL_HEADER.size + len(entry.name.encode()) + len(_zip64_field(entry.nbytes, entry.header_offset))
        for entry in entries
    )
    return central + END_64.size + LOCATOR_64.size + END.size


def _flags(nbytes: int) -> int:
    return FLAG_UTF8 | FLAG_DESCRIPTOR if nbytes else FLAG_UTF8


def _zip64_field(nbytes: int, header_offset: int, *, compressed_nbytes: int | None = None) -> bytes:
    if nbytes < MAX_UINT32 and header_offset < MAX_UINT32:
        return b""
    numbers = []
    if nbytes >= MAX_UINT32:
        numbers += [nbytes, nbytes if compressed_nbytes is None else compressed_nbytes]
    if header_offset >= MAX_UINT32:
        numbers.append(header_offset)
    return struct.pack(f"<2H{len(numbers)}Q", 1, 8 * len(numbers), *numbers)


def _central_header(entry: ZipEntry, crc32: int) -> bytes:
    text, nbytes, start, _ = entry
    name = text.encode()
    extra = _zip64_field(nbytes, start)
    size = nbytes if nbytes < MAX_UINT32 else MAX_UINT32
    offset = start if start < MAX_UINT32 else MAX_UINT32
    fixed = _CENTRAL_HEADER.pack(
        LISTED_MAGIC, 0, 0, _flags(nbytes), 0, 0, 0, crc32, size, size, len(name), len(extra), 0, 0, 0, 0, offset
    )
    return fixed + name + extra
