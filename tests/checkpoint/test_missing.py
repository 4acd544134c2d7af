"""A path that does not exist: names of the Hub get advice, other paths get the system's own error."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from lightning_memload.checkpoint.missing import hub_advice, require_exists


@pytest.mark.parametrize("name", ["openai-community/gpt2", "meta-llama/Llama-3.1-8B", "a/b_c"])
def test_a_name_of_the_hub_gets_advice(name: str) -> None:
    with pytest.raises(FileNotFoundError, match="download it first") as caught:
        require_exists(name)
    assert f"snapshot_download({name!r})" in str(caught.value)
    assert (caught.value.errno, caught.value.filename) == (errno.ENOENT, name)


@pytest.mark.parametrize(
    "path", ["gpt2", "runs/last.ckpt", "a/model.safetensors", "a/b/c", "/a/b", "./a/b", "a/b.pt", "a/", "-", "a b/c"]
)
def test_another_path_gets_none(path: str) -> None:
    assert hub_advice(path) is None
    with pytest.raises(FileNotFoundError) as caught:
        require_exists(path)
    assert "Hub" not in str(caught.value)


def test_a_name_in_a_folder_that_exists_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    assert hub_advice("runs/first") is None
    assert hub_advice("walks/first") is not None


def test_what_exists_passes(tmp_path: Path) -> None:
    require_exists(str(tmp_path))
