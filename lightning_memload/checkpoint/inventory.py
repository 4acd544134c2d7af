"""The inventory of a checkpoint: every stretch of its files that can be held against a checksum, and what is wrong.

Where an index stops at the first contradiction, an inventory goes on and lists them all: it is made to be verified, not
loaded. It covers more than the tensors: whatever record of a file carries a checksum is in it. Taking one reads no
tensor data and runs no code from the files.
"""

from __future__ import annotations

from dataclasses import dataclass

from lightning_memload.checkpoint.index import FileSpan, place_in

__all__ = ["Damage", "Inventory", "Section"]


@dataclass(frozen=True, slots=True)
class Section:
    """One stretch of bytes that was written as one.

    Attributes:
        key: What to call it in messages: a tensor's name, or the record's where it is none.
        offset: Position of its first byte in the run of all files.
        nbytes: Its length.
        crc32: CRC-32 of its bytes as the checkpoint records it, ``None`` where it records none.
    """

    key: str
    offset: int
    nbytes: int
    crc32: int | None


@dataclass(frozen=True, slots=True)
class Damage:
    """One thing that is not as it was written.

    Attributes:
        path: The file.
        problem: What is wrong, in words that name file, place and values.
        key: The tensor or record, ``None`` when it is not a single one.
        offset: Where in the file, in bytes, ``None`` when it is no single place.
        expected: The value that the checkpoint records (a CRC-32, a size), ``None`` when it is not about a value.
        actual: The value that was found.
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
    """What a checkpoint consists of, as far as it can be told.

    Attributes:
        path: The checkpoint.
        format: Name of its format.
        files: The files that hold the sections.
        sections: Everything that can be read, in no particular order. Those of a hostile file may overlap.
        damage: What is wrong with everything else.
    """

    path: str
    format: str
    files: tuple[FileSpan, ...]
    sections: tuple[Section, ...]
    damage: tuple[Damage, ...]

    def place(self, offset: int) -> tuple[str, int]:
        """The file at an offset, and the position within that file."""
        return place_in(self.files, offset)
