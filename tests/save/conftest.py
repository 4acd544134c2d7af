"""Settings for the tests of saves."""

from __future__ import annotations

import pytest

from lightning_memload.save import torch_file


@pytest.fixture(autouse=True)
def as_many_threads_as_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The files of these tests are small, and each of several threads is to write a part of them."""
    monkeypatch.setattr(torch_file, "_THREAD_BYTES", 1)
