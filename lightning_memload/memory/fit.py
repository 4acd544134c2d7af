"""Decides whether optional memory fits into what is free, so that it is never the reason why a process is killed."""

from __future__ import annotations

from lightning_memload.units import format_bytes

__all__ = ["refusal"]

_SPARE_BYTES = 512 << 20
_SPARE_PART = 4


def refusal(
    needed_bytes: int, free_bytes: int | None, *, limit_bytes: int | None = None, held_bytes: int = 0
) -> str | None:
    """Return why memory must not be allocated, ``None`` if it may.

    A quarter of the free memory, and at least 512 MiB of it, must stay free: other code allocates memory too.

    Args:
        needed_bytes: The memory to allocate.
        free_bytes: The free memory, see ``available_host_bytes``. ``None`` if it is unknown, which is a reason.
        limit_bytes: The most memory for this purpose, ``None`` for no limit.
        held_bytes: The memory that is allocated for this purpose already. It is not part of the free memory.
    """
    if limit_bytes is not None and needed_bytes + held_bytes > limit_bytes:
        held = f" beside {format_bytes(held_bytes)}" if held_bytes else ""
        return f"{format_bytes(needed_bytes)} needed{held}, {format_bytes(limit_bytes)} allowed"
    if free_bytes is None:
        return f"{format_bytes(needed_bytes)} needed, and the free memory is unknown"
    spare_bytes = max(_SPARE_BYTES, free_bytes // _SPARE_PART)
    if needed_bytes + spare_bytes > free_bytes:
        return (
            f"{format_bytes(needed_bytes)} needed and {format_bytes(spare_bytes)} to spare, "
            f"{format_bytes(free_bytes)} free"
        )
    return None
