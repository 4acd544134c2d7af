"""Optional memory is taken only if enough stays free, and the reason against it names all figures."""

from __future__ import annotations

import pytest

from lightning_memload.memory import refusal

GIB = 1 << 30


@pytest.mark.parametrize(
    ("needed", "free", "options", "reason"),
    [
        (3 * GIB, 4 * GIB, {}, None),
        (3 * GIB + 1, 4 * GIB, {}, "3.00 GiB needed and 1.00 GiB to spare, 4.00 GiB free"),
        (GIB // 2, GIB, {}, None),
        (GIB, GIB + GIB // 4, {}, "1.00 GiB needed and 512.00 MiB to spare, 1.25 GiB free"),
        (GIB, None, {}, "1.00 GiB needed, and the free memory is unknown"),
        (GIB, 9 * GIB, {"limit_bytes": GIB}, None),
        (GIB, 9 * GIB, {"limit_bytes": GIB // 2}, "1.00 GiB needed, 512.00 MiB allowed"),
        (GIB, 9 * GIB, {"limit_bytes": 2 * GIB, "held_bytes": GIB}, None),
        (GIB, 9 * GIB, {"limit_bytes": GIB, "held_bytes": 4}, "1.00 GiB needed beside 4 bytes, 1.00 GiB allowed"),
        (GIB, GIB, {"limit_bytes": 2 * GIB}, "1.00 GiB needed and 512.00 MiB to spare, 1.00 GiB free"),
    ],
    ids=range(10),
)
def test_what_is_refused(needed: int, free: int | None, options: dict[str, int], reason: str | None) -> None:
    assert refusal(needed, free, **options) == reason
