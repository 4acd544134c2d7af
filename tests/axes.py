"""Products of options, of which one row per axis is enough.

``@pytest.mark.axes("format", "way")`` on a test names parameters that act apart. Of their product the rows are run in
which at most one of them is not its first value, for each combination of the other parameters. ``make test-all`` runs
the whole product.
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
        marker = item.get_closest_marker("axes")
        if marker is None or not isinstance(item, pytest.Function):
            return True
        values = item.callspec.params
        for name in marker.args:
            if name not in values:
                raise pytest.UsageError(f"{item.originalname} has no parameter {name!r}, which its marker names.")
        firsts = self._firsts.setdefault(item.nodeid.partition("[")[0], values)
        return sum(values[name] is not firsts[name] for name in marker.args) <= 1
