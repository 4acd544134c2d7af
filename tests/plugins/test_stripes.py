"""``read="stripes"`` with two ranks of gloo: values as stock, and every failure of one rank told by all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.plugins.restored import flip_byte
from tests.plugins.shared_runs import results_of, run_two_ranks

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stripes")
    run_two_ranks("write", folder)
    for rank in range(2):
        node = folder / f"node{rank}"
        node.mkdir()
        shutil.copyfile(folder / "last.ckpt", node / "last.ckpt")  # at another time
    return folder


@pytest.mark.lightning_only
def test_ranks_resume_as_stock(folder: Path) -> None:
    printed = run_two_ranks("compare", folder)
    stock = results_of(folder, "stock", printed)
    assert all(result["digest"] for result in stock), stock
    for name in ("each", "stripes", "meta", "directory", "safetensors", "overlap", "rank 0 only", "copies", "double"):
        expected = results_of(folder, "double stock", printed) if name == "double" else stock
        ranks = results_of(folder, name, printed)
        for rank, result in enumerate(ranks):
            assert result.get("error") is None, (name, printed)
            assert result["digest"] == expected[rank]["digest"], name
            assert result["losses"] == expected[rank]["losses"], name
        shares = name not in ("each", "rank 0 only")
        reports = [result["report"] for result in ranks]
        if not shares:
            assert [report["read"] for report in reports] == ["each", "each"]
            assert [report["bytes_received"] for report in reports] == [0, 0]
            continue
        assert [report["read"] for report in reports] == ["stripes", "stripes"], reports
        assert reports[0]["read_reason"] == "2 ranks have the same checkpoint"
        read = [report["total"]["bytes_read"] for report in reports]
        assert [report["bytes_received"] for report in reports] == read[::-1]
        assert reports[1]["bytes_read_by_rank"] == {"0": read[0], "1": read[1]}
        alone = results_of(folder, "each", printed)[0]["report"]
        # With a directory, gaps between small files are read too.
        assert abs(sum(read) - alone["total"]["bytes_read"]) < (0.05 if name == "directory" else 0.01) * sum(read)
        assert max(read) < 0.6 * sum(read)
        if name != "safetensors":
            assert sum(report["bytes_verified"] for report in reports) == alone["bytes_verified"]
    first, second = results_of(folder, "predict", printed)
    assert first["report"]["bytes_received"] == second["report"]["total"]["bytes_read"] > 0
    # Weights that are pages of the file are not read, and so not shared.
    first, second = results_of(folder, "assign", printed)
    assert first["digest"] == second["digest"] == results_of(folder, "predict", printed)[0]["digest"]
    assert first["report"]["read_reason"].startswith("mode assign (")
    assert first["report"]["read_reason"].endswith(" on rank 0")
    warned = results_of(folder, "overlap", printed)[0]["warnings"]
    assert any("overlap=True) is ignored: only the thread that restores can share" in text for text in warned)
    assert results_of(folder, "rank 0 only", printed)[0]["report"]["read_reason"] == "not every rank has read='stripes'"


@pytest.mark.lightning_only
@pytest.mark.long
def test_failure_of_one_rank_ends_both(folder: Path) -> None:
    shutil.copyfile(folder / "last.ckpt", folder / "other0.ckpt")
    loaded = torch.load(folder / "last.ckpt", weights_only=False)
    loaded["state_dict"]["scalar"] += 1
    torch.save(loaded, folder / "other1.ckpt")
    for rank in range(2):
        (folder / f"damage{rank}").mkdir()
        shutil.copyfile(folder / "last.ckpt", folder / f"damage{rank}/last.ckpt")
    for number in range(4):
        flip_byte(folder / "damage1/last.ckpt", f"state_dict.middle.{number}.weight")
    shutil.copyfile(folder / "last.ckpt", folder / "missing0.ckpt")
    printed = run_two_ranks("fail", folder)
    ranks = {
        name: results_of(folder, name, printed)
        for name in ("other", "damage", "missing", "hook before", "hook after", "space")
    }
    assert all(result["seconds"] < 30 for pair in ranks.values() for result in pair)
    assert all(result.get("error") for pair in ranks.values() for result in pair), printed
    first, second = ranks["other"]
    assert first["type"] == second["type"] == "MemloadError"
    assert first["error"] == second["error"]
    assert first["error"].startswith(f"The ranks have different checkpoints. Rank 0 has {folder}/other0.ckpt with ")
    assert f"rank 1 has {folder}/other1.ckpt with " in first["error"]
    first, second = ranks["damage"]
    assert first["type"] == second["type"] == "ChecksumError"
    for result in (first, second):
        assert f"{folder}/damage1/last.ckpt is damaged" in result["error"]
        assert result["error"].partition("There is")[0].strip().endswith("Rank 1 of 2 has read it.")
    first, second = ranks["missing"]
    assert second["type"] == "FileNotFoundError"
    assert first["error"].startswith(f"Rank 1 failed before the ranks restored {folder}/missing0.ckpt together: ")
    assert "FileNotFoundError" in first["error"]
    for name in ("hook before", "hook after"):
        first, second = ranks[name]
        assert (second["type"], second["error"]) == ("ValueError", "boom")
        assert first["error"].endswith("together, and rank 1 failed: ValueError: boom")
    first, second = ranks["space"]
    assert second["type"] == "InsufficientMemoryError"
    assert "rank 1 failed: InsufficientMemoryError: Restoring" in first["error"]


@pytest.mark.long
def test_killed_rank_is_named(folder: Path) -> None:
    """By rank 0, which Lightning does not end here, see ``shared_fits.kill``."""
    printed = run_two_ranks("kill", folder)
    assert not (folder / "killed.1.json").exists()
    assert (folder / "killed.0.json").exists(), printed
    result = json.loads((folder / "killed.0.json").read_text())
    assert result["type"] == "MemloadError"
    assert "together, and rank 1 failed, or was silent for 2 s: its process was killed" in result["error"]
    assert result["seconds"] < 30
