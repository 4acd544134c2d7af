"""Paths and URLs: which place they name, and what is asked of the local disk."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest

from lightning_memload.storage import places
from lightning_memload.storage.places import path_of


@pytest.mark.parametrize(
    ("given", "path"),
    [
        ("last.ckpt", "last.ckpt"),
        (Path("runs/last.ckpt"), "runs/last.ckpt"),
        (b"last.ckpt", "last.ckpt"),
        ("file:///runs/last.ckpt", "/runs/last.ckpt"),
        ("FILE://localhost/runs/a%20b.ckpt", "/runs/a b.ckpt"),
        ("epoch=1://2", "epoch=1://2"),
    ],
)
def test_path_of(given: str, path: str) -> None:
    assert path_of(given) == path


def test_what_names_no_path() -> None:
    with pytest.raises(TypeError, match=r"got a BytesIO\. Give its path, or save its content to a file"):
        path_of(io.BytesIO())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"got a int\.$"):
        path_of(3)  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match="copy it to a local disk first"):
        path_of("nowhere://bucket/last.ckpt")


def test_a_local_file_may_have_the_name_of_a_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gs:" / "bucket").mkdir(parents=True)
    assert path_of("gs://bucket") == "gs://bucket"


def test_questions_about_the_local_disk(tmp_path: Path) -> None:
    file, link, pipe = tmp_path / "file", tmp_path / "link", tmp_path / "pipe"
    file.write_bytes(b"content")
    link.symlink_to(file)
    os.mkfifo(pipe)
    assert [places.is_file(str(path)) for path in (file, link, pipe, tmp_path)] == [True, True, False, False]
    assert [places.is_folder(str(path)) for path in (file, tmp_path)] == [False, True]
    assert [places.is_link(str(path)) for path in (file, link)] == [False, True]
    assert [places.size_of(str(path)) for path in (file, link, pipe, tmp_path)] == [7, 7, None, None]
    assert places.size_of(str(link), follow_links=False) is None
    assert sorted(places.names_in(str(tmp_path))) == ["file", "link", "pipe"]
    assert places.read_start(str(file), 4) == b"cont"
    assert places.read_start(str(file), 40) == b"content"
    assert places.identity_of(str(file)) == places.identity_of(str(link))


def test_a_replaced_file_is_noticed(tmp_path: Path) -> None:
    path, new = tmp_path / "file", tmp_path / "new"
    path.write_bytes(b"old")
    with places.held(str(path)) as is_same:
        assert is_same() is True
        new.write_bytes(b"new")
        new.replace(path)
        assert is_same() is False
        path.unlink()
        assert is_same() is None
