"""Arguments with a fixed set of values, and the parts of a restore."""

from __future__ import annotations

from typing import Any, Literal

import pytest

from lightning_memload.plugins.choices import check_choice, detail_of
from lightning_memload.plugins.parts import check_parts

Way = Literal["first", "second", False]


@pytest.mark.parametrize("value", ["first", "second", False])
def test_a_choice_passes(value: Any) -> None:
    check_choice("way", value, Way)


@pytest.mark.parametrize("value", ["third", "First", "", None, 3])
def test_another_value_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"way must be one of 'first', 'second', False, got ") as caught:
        check_choice("way", value, Way)
    assert str(caught.value).endswith(f"got {value!r}.")


@pytest.mark.parametrize(
    ("value", "detail"), [(True, "summary"), ("summary", "summary"), ("all", "all"), (False, None), (1, "summary")]
)
def test_a_detail_of_figures(value: Any, detail: str | None) -> None:
    assert detail_of("log", value) == detail


@pytest.mark.parametrize("value", ["none", "ALL", None, 2])
def test_a_detail_that_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="log_saves must be one of False, True, 'summary', 'all', got "):
        detail_of("log_saves", value)


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        (None, None),
        ("weights", {"weights"}),
        (["weights", "loops", "weights"], {"weights", "loops"}),
        (("callbacks", "optimizer"), {"callbacks", "optimizer"}),
    ],
)
def test_parts_are_a_set(parts: Any, expected: set[str] | None) -> None:
    assert check_parts(parts) == expected


@pytest.mark.parametrize("parts", [[], "", "weight", ["weights", "optimizers"], {"Weights"}])
def test_parts_that_are_refused(parts: Any) -> None:
    with pytest.raises(ValueError, match="restore must be some of 'weights', 'optimizer', 'loops', 'callbacks', or"):
        check_parts(parts)
