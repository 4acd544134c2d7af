"""Saves of Lightning's ``AsyncCheckpointIO`` while the interpreter shuts down: they are made, and failures are told."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_memload.formats import load_mapped

PROGRAM = """
import concurrent.futures.thread as futures, sys, threading
sys.path.insert(0, sys.argv[2])
import torch
from tests.lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning_memload import StreamingCheckpointIO
folder, options = sys.argv[1], eval(sys.argv[3])
inner = StreamingCheckpointIO(**options)
if sys.argv[4] == "measured":
    inner.observe_saves(lambda report: print("told", report.stats.path))
io = AsyncCheckpointIO(inner)
def wait_for_the_end():
    while not futures._shutdown:
        threading.Event().wait(0.01)
if hasattr(io, "_ensure_setup"):  # since Lightning 2.6
    io._ensure_setup()
io._executor.submit(wait_for_the_end)  # all else happens when the program has ended
io.save_checkpoint({"weight": torch.arange(100_000.0)}, folder + "/final")
io.save_checkpoint({"weight": torch.arange(5.0)}, folder + "/nothing/\\0")
if sys.argv[4] == "without threads":
    def refuse(thread):
        raise RuntimeError("can't create new thread at interpreter shutdown")  # as from Python 3.12 on
    threading.Thread.start = refuse
"""


@pytest.mark.skipif(sys.platform != "linux", reason="saved as Lightning does")
@pytest.mark.parametrize(
    ("options", "way"),
    [({}, "measured"), ({}, "without threads"), ({"asynchronous": True, "format": "directory"}, "without threads")],
)
@pytest.mark.first("way")
@pytest.mark.lightning_only
def test_a_save_outlives_the_program(tmp_path: Path, options: object, way: str) -> None:
    repository = str(Path(__file__).resolve().parents[2])
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, str(tmp_path), repository, repr(options), way]
    ended = subprocess.run(command, timeout=500, capture_output=True, text=True)
    assert ended.returncode == 0
    assert torch.equal(load_mapped(tmp_path / "final")[0]["weight"], torch.arange(100_000.0))
    assert "nothing/\0 could not be saved:" in ended.stderr
    assert "ValueError: " in ended.stderr
    assert (f"told {tmp_path}/final" in ended.stdout) is (way == "measured")
