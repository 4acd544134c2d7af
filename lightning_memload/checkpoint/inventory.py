"""The inventory of a checkpoint: every record of its files that can be verified, and all damage that was found.

Reading an index stops at the first error. Taking an inventory continues and lists all errors: it serves verification,
not loading. It covers every record with a checksum, not only tensors. Taking one reads no tensor data and runs no code
from the files.
"""

from __future__ import annotations

from dataclasses import dataclass

from lightning_memload.bytes import FileSpan, Record, place_in

__all__ = ["Damage", "Inventory"]


@dataclass(frozen=True, slots=True)
class Damage:
    """One error in a checkpoint.

    Attributes:
        path: The file.
        problem: The description of the error, with file, place and values.
        key: The tensor or record. ``None`` if the error is not in a single one.
        offset: The position in the file in bytes. ``None`` if there is no single position.
        expected: The value recorded in the checkpoint (a CRC-32 or a size). ``None`` if the error has no such value.
        actual: The value that was found. ``None`` if there is none.
    """

    path: str
    problem: str
    key: str | None = None
    offset: int | None = None
    expected: int | None = None
    actual: int | None = None

    def __str__(self) -> str:
        return self.problem


@dataclass(frozen=True, slots=True)
class Inventory:
    """The records of a checkpoint, and the damage that was found while listing them.

    Attributes:
        path: The checkpoint.
        format: Name of its format.
        files: The files that hold the records.
        records: All records that can be read, in no particular order. Records of a hostile file may overlap.
        damage: The errors in all other parts.
    """

    path: str
    format: str
    files: tuple[FileSpan, ...]
    records: tuple[Record, ...]
    damage: tuple[Damage, ...]

    def place(self, offset: int) -> tuple[str, int]:
        """The file at an offset, and the position within that file."""
        return place_in(self.files, offset)
