"""Descriptions of files that are not checkpoints. Real files of other programs: tests/formats/test_wrong_files.py."""

from __future__ import annotations

import gzip
import pickle
from pathlib import Path

import pytest

from lightning_memload.checkpoint.foreign import describe_directory, describe_file, describe_zip


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "It is empty: the save or the copy was not finished."),
        (bytes(5000), "It begins with zeros: its space was reserved"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a pointer of Git LFS, not the file itself"),
        (gzip.compress(b"weights", mtime=0), "It is compressed with gzip. Unpack it first."),
        (b"\n <!DOCTYPE html><title>Log in</title>", "It is an HTML page. A server sent it"),
        (b"<?xml version='1.0'?><Error/>", "It is an XML document. A server sent it"),
        (b'{"error": "not found"}', 'It is JSON text (\'{"error": "not found"}\'). A server sent it'),
        (b"learning_rate: 3\n", "It is text ('learning_rate: 3'). Give the path of the checkpoint."),
        (b"\0\0\0\0TFL3", "It is a TensorFlow Lite model."),
        (b"\rPK\x03\x04", "A zip archive begins in it after other bytes."),
        (pickle.dumps({"a": 1}, protocol=0), "It is a pickle that torch.save did not write."),
    ],
)
def test_a_file(content: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    path.write_bytes(content)
    described = describe_file(str(path))
    assert described is not None
    assert described.startswith(words) or words in described


def test_unknown_bytes_are_not_guessed(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    path.write_bytes(b"\x01\xff\x02\xfe" * 100)
    assert describe_file(str(path)) is None


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["m/constants.pkl", "m/code/a.py", "m/data.pkl"], "It is a TorchScript archive."),
        (["a.npy", "b.npy"], "It is an .npz archive of numpy."),
        (["m/archive_format"], "It is a program of torch.export (.pt2)."),
        (["runs/last.ckpt", "notes.txt"], "contains 'runs/last.ckpt'. Unpack it first."),
        (["data.pkl", "data/0"], "Pack the folder, not its content."),
        (["word/document.xml"], "It is a zip archive of 'word/document.xml', but holds no data.pkl."),
        ([], "It is a zip archive of nothing, but holds no data.pkl."),
    ],
)
def test_an_archive(names: list[str], words: str) -> None:
    assert words in describe_zip(names)


def test_a_directory(tmp_path: Path) -> None:
    assert describe_directory(str(tmp_path), lambda _: False) == "It is empty."
    for name in ("b.ckpt", "a.txt", ".hidden"):
        (tmp_path / name).touch()
    assert describe_directory(str(tmp_path), lambda path: path.endswith(".ckpt")) == (
        "It holds checkpoints: give the path of one of them, 'b.ckpt'."
    )
    assert describe_directory(str(tmp_path), lambda _: False) == (
        "It holds 'a.txt', 'b.ckpt', none of which is a checkpoint."
    )
