"""Parameters that are pages of a file which nothing watches: a change is found by comparison, and told once."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from lightning_memload.plugins.exposed import ExposedParameters


class Files:
    """Files of which some were changed."""

    def __init__(self) -> None:
        self.changed: list[str] = []

    def changed_files(self) -> list[str]:
        return self.changed


def test_as_long_as_nothing_has_changed_it_is_checked_again() -> None:
    files: Any = Files()
    module = nn.Linear(1, 1)
    exposed = ExposedParameters(files, module)
    assert exposed.warn_if_changed()
    files.changed = ["last.ckpt"]
    with pytest.warns(UserWarning, match=r"last\.ckpt was changed in place while parameters are pages of it"):
        assert not exposed.warn_if_changed()


def test_the_module_is_not_kept_alive() -> None:
    files: Any = Files()
    files.changed = ["last.ckpt"]
    module = nn.Linear(1, 1)
    exposed = ExposedParameters(files, module)
    del module
    assert not exposed.warn_if_changed()
