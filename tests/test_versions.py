"""The record of proved versions, and the table that README makes of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import versions
from tests.versions import Combination, Proof, Row, merge, proofs_in, rendered, table

OLD = Proof("3.10", "2.6.0", "2.5.0", "lightning.pytorch", 3900, "2026-01-31", "0123abc")
NEW = Proof("3.13", "2.14.1", "2.6.6", "pytorch_lightning", 101, "2026-02-01", "0123abd")


def test_readme_has_the_recorded_rows() -> None:
    text = versions.TABLE.read_text()
    assert rendered(text, versions.read_proofs()) == text, "run python tests/versions.py --record"


def test_rows_that_passed_are_proofs() -> None:
    combination = Combination("3.10", "2.6.0", "2.5.0")
    rows = [
        Row(combination, "lightning.pytorch", "3900 passed, 12 skipped in 812.31s (0:13:32)", 820, is_good=True),
        Row(combination, "pytorch_lightning", "1 failed, 100 passed in 60.00s", 70, is_good=False),
        Row(combination, "pytorch_lightning", "100 passed, 2 errors in 60.00s", 70, is_good=False),
        Row(combination, "-", "not installed: there is no python3.10", 0, is_good=False),
    ]
    lines = ["$ make test-versions", *(row.line() for row in rows), "python   torch      lightning  imported as", ""]
    assert proofs_in(lines, OLD.date, OLD.commit) == [OLD]


def test_a_new_proof_replaces_the_old_one_and_versions_are_in_their_order() -> None:
    again = Proof("3.10", "2.6.0", "2.5.0", "lightning.pytorch", 4000, "2026-03-01", "89abcde")
    other_name = Proof("3.10", "2.6.0", "2.5.0", "pytorch_lightning", 101, "2026-03-01", "89abcde")
    newest = Proof("3.13", "2.14.1", "2.10.0", "lightning.pytorch", 1, "2026-03-01", "89abcde")
    assert merge([NEW, OLD], [newest, other_name, again]) == [again, other_name, NEW, newest]


def test_table() -> None:
    assert table([OLD]) == (
        "\n"
        "| Python | torch | Lightning | imported as | tests passed | on |\n"
        "|---|---|---|---|---:|---|\n"
        "| 3.10 | 2.6.0 | 2.5.0 | `lightning.pytorch` | 3,900 | 2026-01-31, 0123abc |\n"
        "\n"
    )
    assert table([]) == ""


def test_a_printed_run_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "RECORD", tmp_path / "versions.json")
    monkeypatch.setattr(versions, "TABLE", tmp_path / "README.md")
    versions.RECORD.write_text("[]")
    versions.TABLE.write_text(f"before\n{versions.BEGIN}{versions.END}after\n")
    row = Row(Combination(OLD.python, OLD.torch, OLD.lightning), OLD.name, "3900 passed in 8.0s", 9, is_good=True)
    (tmp_path / "printed.txt").write_text(row.line())
    arguments = ["--record", str(tmp_path / "printed.txt"), "--date", OLD.date, "--commit", OLD.commit]
    for _ in range(2):
        assert versions.main(arguments) == 0
        assert versions.read_proofs() == [OLD]
        assert versions.TABLE.read_text() == f"before\n{versions.BEGIN}{table([OLD])}{versions.END}after\n"
