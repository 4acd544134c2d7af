"""Arguments as people give them: taken where that is clear, else refused in one sentence that says what to give."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lightning_memload import (
    CheckpointFormatError,
    MemoryEfficientRestore,
    StreamingCheckpointIO,
    load_weights,
    meta_init,
    open_checkpoint,
)
from lightning_memload.cli import main
from tests.plugins.harness import TRUSTED, TinyModule, make_trainer


@pytest.fixture
def path(tmp_path: Path) -> Path:
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.fit(TinyModule())
    trainer.save_checkpoint(tmp_path / "run" / "last.ckpt")
    return tmp_path / "run" / "last.ckpt"


def test_one_part_may_be_given_by_its_name(path: Path) -> None:
    trainer = make_trainer(path.parent, [MemoryEfficientRestore(restore="weights")], max_steps=1)
    module = TinyModule()
    trainer.fit(module, ckpt_path=path, **TRUSTED)
    assert len(module.losses) == 1  # with the loops restored there were none
    with pytest.raises(ValueError, match=r"restore must be some of 'weights'.*got"):
        MemoryEfficientRestore(restore="weight")  # type: ignore[arg-type]


@pytest.mark.parametrize("value", ["128", 1.5, None])
def test_a_budget_that_is_no_number(value: Any, path: Path) -> None:
    words = rf"host_budget_mib must be a whole number of MiB such as 128, got {value!r}\."
    for make in (MemoryEfficientRestore, StreamingCheckpointIO):
        with pytest.raises(TypeError, match=words):
            make(host_budget_mib=value)
    with pytest.raises(TypeError, match=words):
        load_weights(nn.Linear(1, 1), path, host_budget_mib=value)
    with pytest.raises(TypeError, match=r"num_threads must be a whole number, or None to choose, got '4'\."):
        MemoryEfficientRestore(num_threads="4")  # type: ignore[arg-type]


def test_meta_init_without_parentheses() -> None:
    @meta_init  # type: ignore[arg-type]
    def build(width: int) -> nn.Module:
        """Builds."""
        return nn.Linear(width, width)

    module = build(3)  # type: ignore[arg-type, var-annotated]
    assert all(parameter.is_meta for parameter in module.parameters())
    assert (build.__name__, build.__doc__) == ("build", "Builds.")


@pytest.mark.parametrize(("wrong", "name"), [(nn.Linear, "Linear"), (nn.Linear(1, 1), "a Linear")])
def test_meta_init_of_what_is_no_function(wrong: Any, name: str) -> None:
    with pytest.raises(TypeError, match=rf"meta_init takes functions that build modules, got {name}\. Use 'with meta"):
        meta_init(wrong)


def test_two_callbacks(path: Path) -> None:
    trainer = make_trainer(path.parent, [MemoryEfficientRestore(), MemoryEfficientRestore()], max_steps=2)
    with pytest.raises(ValueError, match=r"The Trainer has 2 MemoryEfficientRestore callbacks, .* Keep one"):
        trainer.fit(TinyModule(), ckpt_path=path, **TRUSTED)


def test_a_name_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = r"huggingface_hub\.snapshot_download\('openai-community/gpt2'\)"
    with pytest.raises(FileNotFoundError, match=words):
        load_weights(nn.Linear(1, 1), "openai-community/gpt2")
    trainer = make_trainer(tmp_path, [MemoryEfficientRestore(weights_from="openai-community/gpt2")], max_steps=1)
    with pytest.raises(FileNotFoundError, match=words):
        trainer.fit(TinyModule())
    (tmp_path / "runs").mkdir()
    for name in ("runs/missing", "missing.ckpt", "missing/file.ckpt", "/a/b"):
        with pytest.raises(FileNotFoundError) as caught:
            load_weights(nn.Linear(1, 1), name)
        assert "huggingface" not in str(caught.value)


class TestDirectories:
    @pytest.mark.parametrize("on_corrupt", ["raise", "previous"])
    def test_a_folder_of_checkpoints_is_no_damaged_one(self, path: Path, on_corrupt: Any) -> None:
        """Its parent is not looked at: the checkpoint that is there is of another run."""
        other = path.parent.parent / "other.ckpt"
        other.write_bytes(path.read_bytes())
        trainer = make_trainer(path.parent, [MemoryEfficientRestore(on_corrupt=on_corrupt)], max_steps=2)
        with pytest.raises(CheckpointFormatError, match="is a directory") as caught:
            trainer.fit(TinyModule(), ckpt_path=path.parent, **TRUSTED)
        assert "intact" not in str(caught.value)
        assert "other" not in str(caught.value)

    @pytest.mark.parametrize("sibling", [False, True])
    def test_paths_are_resolved(self, path: Path, monkeypatch: pytest.MonkeyPatch, sibling: bool) -> None:
        monkeypatch.chdir(path.parent)
        (path.parent / "fw.ckpt").touch()
        if not sibling:
            path.unlink()
        trainer = make_trainer(path.parent, [MemoryEfficientRestore()], max_steps=2)
        with pytest.raises(CheckpointFormatError) as caught:
            trainer.fit(TinyModule(), ckpt_path="fw.ckpt", **TRUSTED)
        words = str(caught.value)
        expected = f"in {path.parent} is {path}:" if sibling else f"There is no intact checkpoint in {path.parent}."
        assert expected in words
        assert words.startswith(f"{path.parent}/fw.ckpt ")

    def test_verify_looks_at_the_others_too(self, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        folder = path.parent
        save_file({"weight": torch.ones(3)}, folder / "model.safetensors")
        (folder / "notes.txt").write_text("no checkpoint")
        assert main(["verify", os.fspath(folder)]) == 3
        out = capsys.readouterr().out
        assert f"{folder} (safetensors)" in out
        assert f"{path} (torch): verified" in out
        data = bytearray(path.read_bytes())
        (tensor,) = [tensor for tensor in open_checkpoint(path) if tensor.name == "state_dict.second.weight"]
        data[tensor.storage.offset] ^= 0xFF
        path.write_bytes(data)
        assert main(["verify", os.fspath(folder)]) == 1
