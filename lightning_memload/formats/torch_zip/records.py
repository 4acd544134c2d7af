"""Locates the records of a torch zip archive with the zip directory, and checks the directory against the file.

No value is used before it was compared with its second copy in the file. No tensor data is read.
"""

from __future__ import annotations

import struct
import sys
import zipfile
from collections.abc import Sequence

from zlib_ng import zlib_ng

from lightning_memload.bytes import Record
from lightning_memload.checkpoint.foreign import describe_zip
from lightning_memload.checkpoint.inventory import Damage
from lightning_memload.errors import CheckpointFormatError, UnmappableCheckpointError, listed
from lightning_memload.formats.torch_zip.directory import read_regular_directory
from lightning_memload.formats.torch_zip.frame import check_end, check_entry, is_folder, read_entries
from lightning_memload.formats.torch_zip.layout import LOCAL_MAGIC
from lightning_memload.storage.places import read_start
from lightning_memload.storage.source import FileView, StoredFile

__all__ = ["is_zip", "pickle_is_sound", "read_records", "read_zip_inventory"]

# The time and memory to read a pickle grow with its size: some 10 us and 100 bytes for each tensor.
_MAX_PICKLE_BYTES = 2 << 30
_MAX_ORDER_BYTES = 64
_LOCAL_HEADER = struct.Struct("<4s4xH16xHH")


def is_zip(path: str) -> bool:
    """Whether the file starts like a zip archive. Files of ``torch.save`` before torch 1.6 do not."""
    return read_start(path, len(LOCAL_MAGIC)) == LOCAL_MAGIC


def read_records(file: StoredFile | FileView) -> tuple[dict[str, Record], bytes]:
    """Reads the records and the pickle of an archive.

    Args:
        file: The archive: a file, or a part of one.

    Returns:
        The records by their name in the one top folder of the archive (``data.pkl``, ``data/0``), with offsets from the
        start of the archive; and the pickle.

    Raises:
        CheckpointFormatError: The archive is truncated or damaged, or ``torch.save`` did not write it.
        UnmappableCheckpointError: The records are compressed or byte-swapped, or it is a TorchScript archive.
    """
    start = file.pread(len(LOCAL_MAGIC), 0)
    if start != LOCAL_MAGIC:
        raise CheckpointFormatError(
            f"{file.name} is not what torch.save writes by default: it begins with {start!r}. It is damaged, or was "
            "written by torch < 1.6 or with another serialization. Save it again with torch's defaults.",
            path=file.name,
        )
    records = read_regular_directory(file) or _read_directory(file)
    order = records.get("byteorder")
    if order is not None and (order.nbytes > _MAX_ORDER_BYTES or _read_small(file, order) != sys.byteorder.encode()):
        raise UnmappableCheckpointError(
            f"{file.name} was saved on a machine of the other byte order; its tensors must be byte-swapped to be used.",
            path=file.name,
        )
    if records["data.pkl"].nbytes > _MAX_PICKLE_BYTES:
        raise UnmappableCheckpointError(
            f"{file.name} holds {records['data.pkl'].nbytes} bytes of pickled objects besides its tensors, and the "
            f"limit is {_MAX_PICKLE_BYTES}.",
            path=file.name,
        )
    return records, _read_small(file, records["data.pkl"])


def pickle_is_sound(file: StoredFile | FileView, records: Sequence[Record], start: int = 0) -> bool:
    """Whether the records that an index is made from match their checksums. Verification reports those that do not."""
    for record in records:
        if record.name.partition("/")[2] in ("data.pkl", "byteorder") and record.nbytes <= _MAX_PICKLE_BYTES:
            data = file.pread(record.nbytes, record.offset - start)
            if record.crc32 is not None and zlib_ng.crc32(data) != record.crc32:
                return False
    return True


def read_zip_inventory(file: StoredFile | FileView, start: int = 0) -> tuple[list[Record], list[Damage]]:
    """Every record of a torch zip file that can be read, and the damage of the others.

    Args:
        file: The open file.
        start: Its position in the run of all files.

    Raises:
        CheckpointFormatError: It is a sound archive, but ``torch.save`` did not write it.
        UnmappableCheckpointError: The records are compressed, or it is a TorchScript archive.
        OSError: Reading failed.
    """
    try:
        entries = _read_entries(file)
    except CheckpointFormatError as error:
        return [], [Damage(file.name, str(error))]
    records: list[Record] = []
    damage: list[Damage] = []
    foreign = _find_foreign(file, entries)
    for entry in entries:
        try:
            record = _locate(file, entry)
        except UnmappableCheckpointError as error:
            raise (foreign or error) from None
        except CheckpointFormatError as error:
            damage.append(Damage(file.name, str(error), key=entry.filename, offset=entry.header_offset))
            continue
        problem = check_entry(file, entry, record.offset)
        damage += [problem] if problem is not None else []
        records.append(record._replace(offset=start + record.offset))
    damage += check_end(file, entries)
    if foreign is not None:
        if not damage:
            raise foreign
        damage.append(Damage(file.name, str(foreign)))
    return records, damage


def _find_foreign(
    file: StoredFile | FileView, entries: Sequence[zipfile.ZipInfo]
) -> CheckpointFormatError | UnmappableCheckpointError | None:
    """The error for an archive that ``torch.save`` did not write. ``None`` if it did."""
    names = [entry.filename for entry in entries if not is_folder(entry)]
    records = [name for _, name in _own_records(entries)]
    if "data.pkl" in records and "constants.pkl" not in records:
        if len(records) == len(names):
            return None
        top = entries[0].filename.partition("/")[0]
        outside = [name for name in names if not name.startswith(f"{top}/")]
        return CheckpointFormatError(
            f"{file.name} holds {listed(map(repr, outside), most=3)} outside of its folder {top!r}, which torch.load "
            "refuses: it was unpacked and packed again, on macOS perhaps. Pack that folder alone.",
            path=file.name,
        )
    # torch.load can read a TorchScript archive, so this one is not damaged.
    kind = UnmappableCheckpointError if "constants.pkl" in records else CheckpointFormatError
    return kind(f"{file.name} is not what torch.save writes. {describe_zip(names)}", path=file.name)


def _own_records(entries: Sequence[zipfile.ZipInfo]) -> list[tuple[zipfile.ZipInfo, str]]:
    """The entries in the top folder of the archive, and their names in it. As in torch, the first entry decides it."""
    own = [(entry, entry.filename.partition("/")) for entry in entries if not is_folder(entry)]
    top = entries[0].filename.partition("/")[0] if entries else ""
    return [(entry, name) for entry, (folder, slash, name) in own if folder == top and slash]


def _read_directory(file: StoredFile | FileView) -> dict[str, Record]:
    """The records by their name in the top folder of the archive (``data.pkl``, ``data/0``)."""
    entries = _read_entries(file)
    foreign = _find_foreign(file, entries)
    if foreign is not None:
        raise foreign
    records: dict[str, Record] = {}
    for entry, name in _own_records(entries):
        if name in records:
            raise CheckpointFormatError(
                f"{file.name} holds record {name!r} twice, so it is ambiguous. The file is damaged.",
                path=file.name,
            )
        records[name] = _locate(file, entry)
    _refuse_overlaps(file, records)
    return records


def _read_entries(file: StoredFile | FileView) -> list[zipfile.ZipInfo]:
    try:
        return read_entries(file)
    except (zipfile.BadZipFile, struct.error, ValueError, NotImplementedError, OverflowError, MemoryError) as error:
        raise CheckpointFormatError(
            f"{file.name} starts like a torch checkpoint, but the directory at its end cannot be read ({error}): the "
            f"file is truncated or damaged. It has {file.size_bytes} bytes. Compare with the size of the original, "
            "copy it again, or resume from another checkpoint.",
            path=file.name,
        ) from error


def _locate(file: StoredFile | FileView, entry: zipfile.ZipInfo) -> Record:
    """Locates the data of a record, and checks its local header.

    Raises:
        CheckpointFormatError: The entry is wrong, or the file is truncated.
        UnmappableCheckpointError: The record is compressed.
    """
    in_file = 0 <= entry.header_offset < file.size_bytes
    header = file.pread(_LOCAL_HEADER.size, entry.header_offset) if in_file else b""
    if len(header) < _LOCAL_HEADER.size or not header.startswith(LOCAL_MAGIC):
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
        raise UnmappableCheckpointError(
            f"{file.name} holds its record {entry.filename!r} compressed, so the file does not hold the plain bytes of "
            "its tensors.",
            path=file.name,
        )
    if entry.compress_size != entry.file_size:
        raise CheckpointFormatError(
            f"{file.name}: record {entry.filename!r} is not compressed, but the directory gives it "
            f"{entry.file_size} bytes and {entry.compress_size} in the file. The file is damaged.",
            path=file.name,
        )
    if offset + entry.file_size > file.size_bytes:
        raise CheckpointFormatError(
            f"{file.name} is truncated: record {entry.filename!r} ends at byte {offset + entry.file_size}, but "
            f"the file is only {file.size_bytes} bytes.",
            path=file.name,
        )
    # torch.serialization.set_crc32_options(False) and skip_data() leave the field zero, so zero means "not recorded". A
    # record whose true CRC-32 is zero (one in four billion) is not verified, which is better than a false error.
    return Record(entry.filename, offset, entry.file_size, entry.CRC or None)


def _refuse_overlaps(file: StoredFile | FileView, records: dict[str, Record]) -> None:
    """Raises if records overlap: overlaps would let a small file expand to a hundred thousand times its size."""
    end, before = 0, ""
    for name, record in sorted(records.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if record.offset < end:
            raise CheckpointFormatError(
                f"{file.name}: record {name!r} begins at byte {record.offset}, but record {before!r} ends at byte "
                f"{end}. The file is damaged or malicious.",
                path=file.name,
            )
        end, before = record.offset + record.nbytes, name


def _read_small(file: StoredFile | FileView, record: Record) -> bytes:
    data = file.pread(record.nbytes, record.offset)
    if record.crc32 is not None and zlib_ng.crc32(data) != record.crc32:
        raise CheckpointFormatError(
            f"{file.name} is damaged: the {record.nbytes} bytes at {record.offset}, which describe its contents, have "
            f"CRC-32 {zlib_ng.crc32(data):#010x}, but the file records {record.crc32:#010x}. Resume from another "
            "checkpoint.",
            path=file.name,
        )
    return data
