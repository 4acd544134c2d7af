"""Runs functions of ``shared_fits.py`` in two ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.fresh_process import run_program

__all__ = ["results_of", "run_two_ranks"]

PROGRAM = Path(__file__).with_name("shared_fits.py")


def run_two_ranks(name: str, folder: Path, accelerator: str = "cpu") -> str:
    """Runs a function of the program in two ranks. Returns what they printed."""
    arguments = json.dumps([name, str(folder)])
    done = run_program(PROGRAM, 240, MEMLOAD_TEST_ARGUMENTS=arguments, MEMLOAD_TEST_ACCELERATOR=accelerator)
    return f"{done.returncode} {done.stdout[-2000:]} {done.stderr[-8000:]}"


def results_of(folder: Path, name: str, printed: str) -> list[dict[str, Any]]:
    """What each rank has written. ``printed`` is shown if one of them has not."""
    files = [folder / f"{name}.{rank}.json" for rank in range(2)]
    assert all(file.exists() for file in files), printed
    return [json.loads(file.read_text()) for file in files]
