"""One line on the terminal that shows how far a verb is, its speed and the time left. Silent in a pipe."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from lightning_memload.units import format_bytes, format_speed

__all__ = ["Progress"]

_SECONDS_BETWEEN = 0.1
_CLEAR_LINE = "\r\x1b[K"


class Progress:
    """Shows progress on stderr, as a context manager. The exit removes the line.

    Args:
        doing: What the verb does, such as ``"Verifying"``.
        quiet: Show nothing.
    """

    def __init__(self, doing: str, *, quiet: bool = False) -> None:
        self._doing = doing
        self._is_shown = not quiet and sys.stderr.isatty()
        self._started = self._last = time.monotonic()

    def __call__(self, done_bytes: int, total_bytes: int) -> None:
        """Shows that so many bytes are done. One call at a time, from any thread."""
        now = time.monotonic()
        if not self._is_shown or now - self._last < _SECONDS_BETWEEN:
            return
        self._last = now
        print(f"{_CLEAR_LINE}{self.describe(done_bytes, total_bytes, now - self._started)}", end="", file=sys.stderr)
        sys.stderr.flush()

    def describe(self, done_bytes: int, total_bytes: int, seconds: float) -> str:
        """The line: part, bytes, speed and time left."""
        part = done_bytes / max(total_bytes, 1)
        left = seconds * (total_bytes - done_bytes) / max(done_bytes, 1)
        return (
            f"{self._doing}: {part:.0%}, {format_bytes(done_bytes)} of {format_bytes(total_bytes)}, "
            f"{format_speed(done_bytes, seconds)}, {_format_left(left)} left"
        )

    def __enter__(self) -> Progress:
        self._started = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_shown:
            print(_CLEAR_LINE, end="", file=sys.stderr, flush=True)


def _format_left(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
