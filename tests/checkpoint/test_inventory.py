"""The inventory: where its bytes are, and damage that says what is wrong."""

from __future__ import annotations

import mmap

from lightning_memload.bytes import Record, lay_out
from lightning_memload.checkpoint import Inventory
from lightning_memload.checkpoint.inventory import Damage


def test_a_section_is_found_in_its_file() -> None:
    files = lay_out([("a", 10), ("b", 20)])
    record = Record("weight", mmap.PAGESIZE + 4, 8, None)
    inventory = Inventory("folder", "toy", files, (record,), ())
    assert inventory.place(record.offset) == ("b", 4)
    assert inventory.place(3) == ("a", 3)


def test_damage_reads_as_its_problem() -> None:
    damage = Damage("a", "a ends early", key="weight", offset=4, expected=10, actual=7)
    assert str(damage) == "a ends early"
    assert (Damage("a", "bad").key, Damage("a", "bad").offset) == (None, None)
