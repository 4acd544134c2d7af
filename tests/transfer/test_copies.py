"""The counters of transfers, and the error of a record that is damaged."""

from __future__ import annotations

from lightning_memload.bytes import Record
from lightning_memload.errors import ChecksumError
from lightning_memload.transfer import TransferStats
from lightning_memload.transfer.copies import checksum_error


class Source:
    """A place whose second file begins at byte 100."""

    def place(self, offset: int) -> tuple[str, int]:
        return ("first", offset) if offset < 100 else ("second", offset - 100)


def test_counters_of_two_transfers_add_up() -> None:
    """Bytes and time add up. Threads and memory are used again by the second one."""
    one, two = TransferStats(10, 4, 0.5, 3, 64), TransferStats(1, 1, 0.25, 8, 32)
    assert one + two == two + one == TransferStats(11, 5, 0.75, 8, 64)
    assert one + TransferStats() == one


def test_the_error_names_the_file_and_the_place_in_it() -> None:
    error = checksum_error(Source(), Record("weight", 130, 8, 0xABC), 0x1)  # type: ignore[arg-type]
    assert isinstance(error, ChecksumError)
    assert (error.path, error.key, error.offset) == ("second", "weight", 30)
    assert (error.expected, error.actual) == (0xABC, 1)
    assert str(error) == (
        "second is damaged: the 8 bytes of weight at byte 30 have CRC-32 0x00000001, but the file records 0x00000abc. "
        "Resume from another checkpoint."
    )
