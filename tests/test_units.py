"""Numbers of bytes as people read them."""

from __future__ import annotations

import pytest

from lightning_memload.units import counted, format_bytes, format_gib, format_speed, parse_bytes


@pytest.mark.parametrize(
    ("nbytes", "words"),
    [
        (0, "0 bytes"),
        (1023, "1023 bytes"),
        (1024, "1.00 KiB"),
        (4_200_000, "4.01 MiB"),
        (2**30 - 1, "1.00 GiB"),
        (18 * 2**30, "18.00 GiB"),
        (5000 * 2**40, "5000.00 TiB"),
    ],
)
def test_the_unit_fits(nbytes: int, words: str) -> None:
    assert format_bytes(nbytes) == words


def test_a_column_has_the_unit_of_its_largest() -> None:
    assert [format_bytes(n, like=3 << 30) for n in (0, 1 << 20, 3 << 30)] == ["0.00 GiB", "0.00 GiB", "3.00 GiB"]


def test_one_unit_for_figures_beside_each_other() -> None:
    assert [format_gib(n) for n in (0, 1 << 20, 128 << 20, 1 << 30, 18 << 30)] == [
        "0.000 GiB", "0.001 GiB", "0.125 GiB", "1.00 GiB", "18.00 GiB",
    ]  # fmt: skip
    assert [format_gib(n, like=2 << 30) for n in (0, 128 << 20)] == ["0.00 GiB", "0.12 GiB"]


def test_nouns_agree() -> None:
    assert [counted(n, "tensor") for n in (0, 1, 1200)] == ["0 tensors", "1 tensor", "1,200 tensors"]
    assert [counted(n, "class", "classes") for n in (1, 2)] == ["1 class", "2 classes"]


def test_speeds() -> None:
    assert format_speed(3 << 20, 2.0) == "1.50 MiB/s"
    assert format_speed(0, 0.0) == "0 bytes/s"


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("8GiB", 8 << 30),
        (" 1.5 tib ", 3 << 39),
        ("512 KiB", 512 << 10),
        ("8", None),
        ("8GB", None),
        ("-1GiB", None),
        ("GiB", None),
        ("auto", None),
    ],
)
def test_sizes_that_people_write(text: str, nbytes: int | None) -> None:
    assert parse_bytes(text) == nbytes
