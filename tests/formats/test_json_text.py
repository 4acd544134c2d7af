"""JSON of strangers: what cannot be used is damage, and messages stay short."""

from __future__ import annotations

import pytest

from lightning_memload.errors import CheckpointFormatError
from lightning_memload.formats.json_text import parse_json, short


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (b"{}", {}),
        (b'{"a": [1, -2.5, null, true]}', {"a": [1, -2.5, None, True]}),
        (b'{"a": {"a": 1}}', {"a": {"a": 1}}),
        (b"18446744073709551615", 2**64 - 1),
        ('"ä\\u00e4"'.encode(), "ää"),
        (b'{"\\ud83d\\ude00": 1}', {"\N{GRINNING FACE}": 1}),
        (b'{"' + b"1" * 21 + b'": 1}', {"1" * 21: 1}),
    ],
)
def test_ordinary_json(text: bytes, value: object) -> None:
    assert parse_json(text, "a.json", "the header") == value


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"", "Expecting value"),
        (b"{", "Expecting property name"),
        (b'{"a": 1, "b": 2, "a": 3}', "it has the key 'a' twice"),
        (b'{"x": {"a": 1, "a": 1}}', "it has the key 'a' twice"),
        (b"9" * 21, "an integer of 21 digits"),
        (b"9" * 100_000, "an integer of 100000 digits"),
        (b"NaN", "it has NaN for a number"),
        (b"[-Infinity]", "it has -Infinity for a number"),
        (b'{"\\ud800": 1}', "surrogates not allowed"),
        (b"\xff", "can't decode byte 0xff"),
        (b"[" * 200_000, "recursion"),
    ],
    ids=lambda value: str(value[:12]),
)
def test_what_cannot_be_used(text: bytes, reason: str) -> None:
    with pytest.raises(CheckpointFormatError, match=reason) as caught:
        parse_json(text, "a.json", "the header")
    assert str(caught.value).startswith(f"a.json: the header, {len(text)} bytes of JSON, cannot be read (")
    assert caught.value.path == "a.json"
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("value", ["x" * 10**6, list(range(10**5)), {n: n for n in range(10**4)}, 10**3000])
def test_shown_values_are_short(value: object) -> None:
    assert len(short(value)) < 200


def test_a_deep_value_is_shown() -> None:
    value: object = 1
    for _ in range(5000):
        value = [value]
    assert len(short(value)) < 50
