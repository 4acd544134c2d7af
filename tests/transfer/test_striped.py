"""Ranks that share what they read: bit for bit what each rank reads alone, and no rank that waits in vain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.gloo import run_ranks

pytestmark = pytest.mark.timeout(180)

RANKS = "tests.transfer.striped_ranks:"
KIB, MIB = 1 << 10, 1 << 20


def results(name: str, num_ranks: int, folder: Path, **arguments: Any) -> list[Any]:
    told = run_ranks(RANKS + name, num_ranks, folder, **arguments)
    assert all(item is not None and "result" in item for item in told), told
    return [item["result"] for item in told if item is not None]


def test_four_ranks_share_what_one_rank_reads(tmp_path: Path) -> None:
    cases = [
        {"num_tensors": 40, "largest": 600_001, "budget_bytes": 1 * MIB, "seed": 1},
        {"num_tensors": 200, "largest": 20_000, "budget_bytes": 8 * MIB, "seed": 2},
        {"num_tensors": 3, "largest": 7, "budget_bytes": 8 * MIB, "seed": 3},  # more ranks than stripes
        {"num_tensors": 5, "largest": 3_000_000, "budget_bytes": 640 * KIB, "seed": 4},
    ]
    by_rank = results("many_same", 4, tmp_path, cases=cases)
    for number, case in enumerate(cases):
        ranks = [result[number] for result in by_rank]
        read = [rank["read"] for rank in ranks]
        for rank, result in enumerate(ranks):
            assert result["same"], (case, rank)
            assert result["ended"] is None
            assert result["read"] == result["really"]
            assert result["received"] == sum(read) - read[rank]
            assert result["arrived"] == sum(read)
            assert result["staging"] <= case["budget_bytes"]
            assert result["by_rank"] == {str(other): nbytes for other, nbytes in enumerate(read)}
            assert result["empty"] == 0
        # The plan depends on the size of a stripe, and a few bytes between two tensors may be read or not.
        assert abs(sum(read) - ranks[0]["all"]) <= 0.02 * ranks[0]["all"] + 8192
        # Each byte is verified once.
        assert sum(rank["verified"] for rank in ranks) == ranks[0]["verified_alone"]
        if number != 2:
            assert max(read) < 0.25 * sum(read) + case["budget_bytes"] / 8


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return results("failures_and_disagreements", 2, tmp_path_factory.mktemp("ranks"))


def test_failure_of_one_rank_is_raised_on_all(two_ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["failures"] for rank in two_ranks)
    for name in ("flip", "fail", "exhaust", "split"):
        assert first[name]["seconds"] < 30, name
        assert second[name]["seconds"] < 30, name
    for name, kind in {"flip": "ChecksumError", "fail": "CheckpointReadError", "split": "ChecksumError"}.items():
        assert first[name] == {**second[name], "seconds": first[name]["seconds"]}
        assert first[name]["type"] == kind
        assert first[name]["key"] is not None
    assert first["flip"]["error"].endswith("Resume from another checkpoint. Rank 1 of 2 has read it.")
    assert "Input/output error" in first["fail"]["error"]
    assert first["fail"]["error"].endswith("Rank 1 of 2 has read it.")
    assert (second["exhaust"]["type"], second["exhaust"]["error"]) == ("MemoryError", "no space is left for a page")
    assert first["exhaust"]["error"] == (
        "The ranks restore memory.ckpt together, and rank 1 failed: MemoryError: no space is left for a page"
    )
    assert first["split"]["error"].endswith("Rank 1 of 2 has read it.")
    # Damage that only one rank would see is seen if this rank reads there, and has no effect if it does not.
    assert first["maybe"].get("type") in (None, "ChecksumError")
    assert first["none"]["read"] > 0


def test_ranks_that_do_not_load_the_same_read_by_themselves(two_ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["disagreements"] for rank in two_ranks)
    for name in ("plan", "nothing"):
        for rank in (first, second):
            assert rank[name]["same"], name
            assert rank[name]["ended"] == "rank 1 and rank 0 do not load the same parts of the checkpoint together"
            assert rank[name]["received"] == 0
            assert rank[name]["again"]["received"] == 0
    assert first["budget"]["ended"] == "host_budget_mib is too small for the stripes of 2 ranks"
    assert first["left"]["error"] == "The ranks restore memory.ckpt together, and rank 1 failed: ValueError: boom"
    assert first["left"]["seconds"] < 10
    assert first["gone"]["read"] > 0
    assert first["gone"]["ended"].startswith("rank 1 failed, or was silent")


@pytest.mark.parametrize("dead", [0, 2])
def test_killed_rank_is_named_within_seconds(dead: int, tmp_path: Path) -> None:
    """The process of rank 0 holds the store, so without it the others cannot talk."""
    told = run_ranks(RANKS + "killed", 2 if dead == 0 else 3, tmp_path, rank=dead)
    assert told[dead] is None
    for rank, item in enumerate(told):
        if rank == dead:
            continue
        assert item is not None
        result = item["result"]
        assert result["type"] == "MemloadError"
        assert result["seconds"] < 30
        # Rank 0 may have ended with this error before the others have looked, and the store with it.
        assert f"rank {dead} failed" in result["error"] or (rank and "rank 0 failed" in result["error"]), result


def test_suspended_rank_is_named(tmp_path: Path) -> None:
    (first, _) = run_ranks(RANKS + "killed", 2, tmp_path, rank=1, suspended=True)
    assert first is not None
    assert "rank 1 failed, or was silent for 3 s" in first["result"]["error"]


def test_memory_of_a_rank_is_the_budget(tmp_path: Path) -> None:
    budget, nbytes = 16 * MIB, 200 * MIB
    for result in results("peaks", 2, tmp_path, nbytes=nbytes, budget_bytes=budget):
        assert result["zero"]
        assert 0.4 * nbytes < result["read"] < 0.6 * nbytes
        assert result["above"] < budget + 4 * MIB
