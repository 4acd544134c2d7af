"""Options of which a part is enough: one row per axis of a product, or the first value.

``@pytest.mark.axes("format", "way")`` on a test names parameters that act apart. Of their product the rows are run in
which at most one of them is not its first value, for each combination of the other parameters. With
``@pytest.mark.first("format")`` only the first value of a parameter is run, for other tests have its other values.
``@pytest.mark.long`` is for a test of many processes whose kind quicker tests have. ``make test-all`` runs all cases.
"""

from __future__ import annotations

from typing import Any

import pytest

__all__ = ["Axes"]


class Axes:
    """Chooses the cases that are always run. The case of a test that it sees first has the first value of each axis."""

    def __init__(self) -> None:
        self._firsts: dict[str, dict[str, Any]] = {}

    def has(self, item: pytest.Item) -> bool:
        """Whether a case is always run.

        Raises:
            pytest.UsageError: The marker names a parameter that the test lacks.
        """
        return item.get_closest_marker("long") is None and self._has(item, "axes", 1) and self._has(item, "first", 0)

    def _has(self, item: pytest.Item, marker_name: str, most: int) -> bool:
        """Whether at most so many of the parameters that a marker names are not their first value."""
        marker = item.get_closest_marker(marker_name)
        if marker is None or not isinstance(item, pytest.Function):
            return True
        values = item.callspec.params
        for name in marker.args:
            if name not in values:
                raise pytest.UsageError(f"{item.originalname} has no parameter {name!r}, which its marker names.")
        firsts = self._firsts.setdefault(item.nodeid.partition("[")[0], values)
        return sum(values[name] is not firsts[name] for name in marker.args) <= most
