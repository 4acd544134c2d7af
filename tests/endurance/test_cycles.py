"""Train, save, be killed, resume, under a memory limit that leaves no room for a second copy of anything."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.endurance.cycles_in_process import STATE_BYTES, run_cycles
from tests.fresh_process import run_fresh


@pytest.mark.cgroup
@pytest.mark.memory
def test_cycles_under_a_limit_that_kills_the_stock_way(tmp_path: Path) -> None:
    """3 cycles; ``python -m tests.endurance.cycles_in_process FOLDER 30`` runs the full number."""
    ours, resumed, saved = (tmp_path / name for name in ("ours", "resumed", "saved"))
    for folder in (ours, resumed, saved):
        folder.mkdir()
    result = run_cycles(str(ours), 3)
    assert (result["cycles"], result["killed"]) == (3, False)
    # The last checkpoint, what was seen, and one file of the save that was killed: never more.
    assert max(result["left"]) <= 3
    # The first has no checkpoint to resume from; from then on nothing grows.
    assert max(result["anonymous_bytes"]) <= result["anonymous_bytes"][0] + STATE_BYTES // 8
    # Without us the first save is killed, and so is the first resume from a checkpoint that is there.
    assert run_cycles(str(saved), 1, ours=False)["killed"]
    for name in ("last.ckpt", "cycle.json"):
        shutil.copy(ours / name, resumed / name)
    assert run_cycles(str(resumed), 1, ours=False)["killed"]


@pytest.mark.memory
def test_one_process_holds_no_more_from_cycle_to_cycle(tmp_path: Path) -> None:
    found: list[dict[str, Any]] = run_fresh(
        "tests.endurance.cycles_in_process:cycle_in_one_process", folder=tmp_path, num_cycles=6
    ).result
    third, last = found[2], found[-1]
    assert last["anonymous_bytes"] <= third["anonymous_bytes"] + STATE_BYTES // 16
    for name in ("descriptors", "threads"):
        assert last[name] <= third[name], (name, found)
    assert last["mappings"] <= third["mappings"] + 10, found
