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
    "ZipEntry",
    "data_descriptor",
    "directory",
    "directory_bytes",
    "lay_out",
    "local_header",
]

ALIGNMENT_BYTES = 64
# Numbers from this value on are stored in the zip64 fields.
_MAX_UINT32 = 0xFFFFFFFF

_LOCAL_HEADER = struct.Struct("<4s5H3I2H")
_CENTRAL_HEADER = struct.Struct("<4s6H3I5H2I")
_DESCRIPTOR = struct.Struct("<4s3I")
_DESCRIPTOR_64 = struct.Struct("<4sI2Q")
_END_64 = struct.Struct("<4sQ2H2I4Q")
_END_LOCATOR_64 = struct.Struct("<4sIQI")
_END = struct.Struct("<4s4H2IH")

_FLAG_UTF8 = 1 << 11
_FLAG_DESCRIPTOR = 1 << 3
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
        return self.data_end + (_DESCRIPTOR_64.size if self.is_zip64 else _DESCRIPTOR.size)

    @property
    def is_zip64(self) -> bool:
        """Whether its size or position needs 64 bits."""
        return self.nbytes >= _MAX_UINT32 or self.header_offset >= _MAX_UINT32


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
        unpadded = start + _LOCAL_HEADER.size + length + _PADDING.size
        if nbytes >= _MAX_UINT32 or start >= _MAX_UINT32:
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
    padding = data_start - start - (_LOCAL_HEADER.size + len(name) + len(extra) + _PADDING.size)
    extra += _PADDING.pack(_PADDING_ID, padding) + b"Z" * padding
    fixed = _LOCAL_HEADER.pack(b"PK\x03\x04", 0, _flags(nbytes), 0, 0, 0, 0, 0, 0, len(name), len(extra))
    return fixed + name + extra


def data_descriptor(entry: ZipEntry, crc32: int) -> bytes:
    """The bytes after the entry's data. Empty for an entry without data."""
    if not entry.nbytes:
        return b""
    descriptor = _DESCRIPTOR_64 if entry.is_zip64 else _DESCRIPTOR
    return descriptor.pack(b"PK\x07\x08", crc32, entry.nbytes, entry.nbytes)


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
            _END_64.pack(b"PK\x06\x06", _END_64.size - 12, 0x031E, 0x002D, 0, 0, count, count, len(central), start),
            _END_LOCATOR_64.pack(b"PK\x06\x07", 0, end_64, 1),
            _END.pack(
                b"PK\x05\x06",
                0,
                0,
                min(count, 0xFFFF),
                min(count, 0xFFFF),
                min(len(central), _MAX_UINT32),
                min(start, _MAX_UINT32),
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
    return central + _END_64.size + _END_LOCATOR_64.size + _END.size


def _flags(nbytes: int) -> int:
    return _FLAG_UTF8 | _FLAG_DESCRIPTOR if nbytes else _FLAG_UTF8


def _zip64_field(nbytes: int, header_offset: int, *, compressed_nbytes: int | None = None) -> bytes:
    if nbytes < _MAX_UINT32 and header_offset < _MAX_UINT32:
        return b""
    numbers = []
    if nbytes >= _MAX_UINT32:
        numbers += [nbytes, nbytes if compressed_nbytes is None else compressed_nbytes]
    if header_offset >= _MAX_UINT32:
        numbers.append(header_offset)
    return struct.pack(f"<2H{len(numbers)}Q", 1, 8 * len(numbers), *numbers)


def _central_header(entry: ZipEntry, crc32: int) -> bytes:
    text, nbytes, start, _ = entry
    name = text.encode()
    extra = _zip64_field(nbytes, start)
    size = nbytes if nbytes < _MAX_UINT32 else _MAX_UINT32
    offset = start if start < _MAX_UINT32 else _MAX_UINT32
    fixed = _CENTRAL_HEADER.pack(
        b"PK\x01\x02", 0, 0, _flags(nbytes), 0, 0, 0, crc32, size, size, len(name), len(extra), 0, 0, 0, 0, offset
    )
    return fixed + name + extra
