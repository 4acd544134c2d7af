"""On a real GPU: what is saved from it is what it holds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lightning_memload import save_directory
from lightning_memload.checkpoint import load_mapped

pytestmark = pytest.mark.gpu


def test_directory(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    # Three pieces, the last one of an odd size, and a view that starts within the second.
    weight = torch.randn((9 << 18) + 1, device="cuda")
    save_directory({"weight": weight, "view": weight[5 << 18 : 6 << 18], "step": torch.ones(1)}, path)
    loaded, _ = load_mapped(path, weights_only=True)
    assert torch.equal(loaded["weight"], weight.cpu())
    assert torch.equal(loaded["view"], weight[5 << 18 : 6 << 18].cpu())
    manifest = json.loads((path / "manifest.json").read_text())
    assert [storage["location"] for storage in manifest["storages"]] == ["cuda:0", "cpu"]
