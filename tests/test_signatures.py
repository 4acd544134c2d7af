"""Public names and their arguments stay as they are unless a change is meant."""

from __future__ import annotations

from tests.signatures import LIST, describe


def test_no_public_signature_changes_by_accident() -> None:
    """If a change is intended, run python -m tests.signatures, and add a line to CHANGELOG.md."""
    assert describe().splitlines() == LIST.read_text().splitlines()


def test_the_list_has_what_users_call() -> None:
    lines = describe().splitlines()
    assert "open_checkpoint(path, *, storage_options=None)" in lines
    assert any(line.startswith("MemoryEfficientRestore(mode='auto', ") for line in lines)
    assert any(line.startswith("MemoryMonitor.tick(self, ") for line in lines)
