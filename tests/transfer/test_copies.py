"""The counters of transfers."""

from __future__ import annotations

from lightning_memload.transfer import TransferStats


def test_counters_of_two_transfers_add_up() -> None:
    """Bytes and time add up. Threads and memory are used again by the second one."""
    one, two = TransferStats(10, 4, 0.5, 3, 64), TransferStats(1, 1, 0.25, 8, 32)
    assert one + two == two + one == TransferStats(11, 5, 0.75, 8, 64)
    assert one + TransferStats() == one
