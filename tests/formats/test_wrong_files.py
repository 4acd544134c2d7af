"""Files that people give for checkpoints: each is refused in words that say what it is, everywhere, at once."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import pickle
import struct
import tarfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lightning_memload import MemloadError, load_weights, open_checkpoint, verify_checkpoint
from lightning_memload.cli import main

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


def good() -> bytes:
    buffer = io.BytesIO()
    torch.save(nn.Linear(4, 4).state_dict(), buffer)
    return buffer.getvalue()


def zipped(entries: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def rezipped(rename: Callable[[str], str], method: int = zipfile.ZIP_STORED) -> bytes:
    with zipfile.ZipFile(io.BytesIO(good())) as source:
        return zipped({rename(name): source.read(name) for name in source.namelist()}, method)


def npz() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, weight=np.zeros((4, 4)), bias=np.zeros(4))
    return buffer.getvalue()


def npy() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(3))
    return buffer.getvalue()


def script() -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(nn.Linear(4, 4)), buffer)
    return buffer.getvalue()


def legacy() -> bytes:
    buffer = io.BytesIO()
    torch.save(nn.Linear(4, 4).state_dict(), buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        entry = tarfile.TarInfo("model.ckpt")
        entry.size = 3
        archive.addfile(entry, io.BytesIO(b"abc"))
    return buffer.getvalue()


EXPORTED = {"e/models/model.json": b"{}", "e/archive_format": b"pt2", "e/data/weights/weight_0": bytes(64)}

# Name, content, what the message says.
FILES: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "It is empty"),
    "one byte": (lambda: b"P", "It is text"),
    "one zero": (lambda: b"\0", "begins with zeros"),
    "lfs": (lambda: LFS, "pointer of Git LFS"),
    "html": (lambda: b"<!DOCTYPE html>\n<html><head></head></html>", "HTML page"),
    "html without doctype": (lambda: b"\n  <HTML>error</HTML>", "HTML page"),
    "html with a mark": (lambda: b"\xef\xbb\xbf<html></html>", "HTML page"),
    "json": (lambda: b'{"error":"Repository not found"}', "JSON text"),
    "json list": (lambda: b'[{"error": 1}]', "JSON text"),
    "xml": (lambda: b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "XML document"),
    "zeros": (lambda: bytes(4096), "begins with zeros"),
    "text": (lambda: b"hello world\n" * 100, "It is text"),
    "yaml": (lambda: b"model:\n  layers: 3\n", "It is text"),
    "unicode": (lambda: "日本語\n".encode(), "It is text"),
    "gzip": (lambda: gzip.compress(good()), "gzip"),
    "bzip2": (lambda: bz2.compress(good()), "bzip2"),
    "xz": (lambda: lzma.compress(good()), "xz"),
    "zstd": (lambda: b"\x28\xb5\x2f\xfd" + bytes(100), "zstd"),
    "7z": (lambda: b"7z\xbc\xaf\x27\x1c" + bytes(100), "7z"),
    "rar": (lambda: b"Rar!\x1a\x07" + bytes(100), "RAR"),
    "gguf": (lambda: b"GGUF" + struct.pack("<IQQ", 3, 0, 0), "GGUF"),
    "hdf5": (lambda: b"\x89HDF\r\n\x1a\n" + bytes(100), "HDF5"),
    "onnx": (lambda: b"\x08\x07\x12\x07pytorch" + bytes(50), "ONNX"),
    "tflite": (lambda: b"\x20\0\0\0TFL3" + bytes(50), "TensorFlow Lite"),
    "npy": (npy, "npy file of numpy"),
    "npz": (npz, "npz archive of numpy"),
    "png": (lambda: b"\x89PNG\r\n\x1a\n" + bytes(50), "picture"),
    "pdf": (lambda: b"%PDF-1.7\n" + bytes(50), "PDF"),
    "elf": (lambda: b"\x7fELF" + bytes(50), "a program"),
    "exported": (lambda: zipped(EXPORTED), "torch.export"),
    "script": (script, "TorchScript archive"),
    "zip in zip": (lambda: zipped({"model.ckpt": good()}), "zip archive that contains 'model.ckpt'"),
    "zip in zip, packed": (
        lambda: zipped({"a/b.pt": good()}, zipfile.ZIP_DEFLATED),
        "zip archive that contains 'a/b.pt'",
    ),
    "zip of texts": (lambda: zipped({"a.txt": b"a", "b.txt": b"b"}), "zip archive of 'a.txt', 'b.txt'"),
    "docx": (lambda: zipped({"[Content_Types].xml": b"", "word/document.xml": b""}), "zip archive of"),
    "empty zip": (lambda: zipped({}), "empty zip archive"),
    "without its folder": (lambda: rezipped(lambda name: name.partition("/")[2]), "Pack the folder"),
    "backslashes": (lambda: rezipped(lambda name: name.replace("/", "\\")), "Pack the folder"),
    "beside its folder": (lambda: zipped({"a/data.pkl": b".", "__MACOSX/._a": b""}), "outside of its folder 'a'"),
    "bzip2 in the zip": (lambda: rezipped(str, zipfile.ZIP_BZIP2), "compressed"),
    "half of it": (lambda: good()[:900], "truncated"),
    "end missing": (lambda: good()[:-10], "truncated"),
    "magic alone": (lambda: b"PK\x03\x04", "truncated"),
    "bytes before it": (lambda: b"\n" + good(), "begins in it"),
    "legacy, truncated": (lambda: legacy()[:-20], "torch.load cannot read it|torch < 1.6"),
    "pickle": (lambda: pickle.dumps({"weight": np.zeros((4, 4), "f4")}), "torch < 1.6"),
    "pickle of protocol 0": (lambda: pickle.dumps({"a": 1}, protocol=0), "pickle that torch.save did not write"),
    "tar": (tar, "torch < 1.6|legacy .tar"),
    "noise": (lambda: bytes(range(1, 256)) * 8, "none of the known formats"),
    "safetensors, long header": (lambda: struct.pack("<Q", 1 << 50) + b"{", "header of"),
    "safetensors, no json": (lambda: struct.pack("<Q", 10) + b"{" + b"x" * 9, "JSON"),
    "index of nothing": (lambda: b'{"weight_map": 3}', "weight_map must map"),
    "index of nowhere": (lambda: b'{"weight_map": {"a": "../../etc/passwd"}}', "names 1 shards"),
    "index without shards": (lambda: b'{"weight_map": {"a": "x.bin"}}', "is not complete"),
    "array in it": (lambda: saved([torch.ones(2)]), "No state dict is found"),
    "empty dict in it": (lambda: saved({}), "No state dict is found"),
}
# These are archives of torch: they are listed and verified, only they hold no weights.
SOUND = ("array in it", "empty dict in it")


def saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def test_there_are_enough_of_them() -> None:
    assert len(FILES) >= 50


@pytest.mark.filterwarnings("ignore:'torch.load' received", "ignore:Detected pickle protocol")
@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_no_checkpoint(
    name: str, suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, words = FILES[name]
    path = tmp_path / f"model.{suffix}"
    path.write_bytes(make())
    with pytest.raises((MemloadError, pickle.UnpicklingError)) as caught:
        load_weights(nn.Linear(4, 4), path)
    if isinstance(caught.value, MemloadError):
        assert_says(str(caught.value), words, path)
    assert not any("\x1b" in str(error) for error in [caught.value] if isinstance(error, MemloadError))
    if name in SOUND:
        assert main(["verify", str(path)]) == main(["inspect", str(path)]) == 0
        return
    with pytest.raises(MemloadError) as caught_too:
        open_checkpoint(path)
    assert_says(str(caught_too.value), words, path)
    # Damaged is what was a checkpoint once.
    try:
        damaged = verify_checkpoint(path).is_damaged
    except MemloadError as error:
        damaged = False
        assert_says(str(error), words, path)
    else:
        assert damaged
    assert main(["inspect", str(path)]) == 2
    assert main(["verify", str(path)]) == (1 if damaged else 2)
    output = capsys.readouterr()
    assert "Traceback" not in output.err + output.out
    assert str(path) in output.err + output.out


def assert_says(message: str, words: str, path: Path) -> None:
    import re

    assert re.search(words, message), message
    assert str(path) in message
    assert len(message) < 2000


NO_DAMAGE = ("npz", "exported", "script", "zip in zip", "zip of texts", "docx", "without its folder", "lfs", "html")


@pytest.mark.parametrize("name", NO_DAMAGE)
def test_another_kind_of_file_is_not_called_damaged(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(FILES[name][0]())
    with pytest.raises(MemloadError):
        verify_checkpoint(tmp_path / "file")


class TestPlaces:
    """Paths that are not regular files."""

    def refused(self, path: Path, capsys: pytest.CaptureFixture[str]) -> str:
        for call in (open_checkpoint, verify_checkpoint, lambda path: load_weights(nn.Linear(4, 4), path)):
            with pytest.raises((MemloadError, OSError)):
                call(path)
        assert main(["inspect", str(path)]) == main(["verify", str(path)]) == 2
        return capsys.readouterr().err

    def test_an_empty_directory(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert "It is empty." in self.refused(tmp_path, capsys)

    def test_a_directory_without_weights(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "config.json").write_text(json.dumps({}))
        assert "It holds 'config.json', none of which is a checkpoint" in self.refused(tmp_path, capsys)

    def test_a_directory_of_checkpoints(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        for name in ("epoch=1.ckpt", "last.ckpt"):
            (tmp_path / name).write_bytes(good())
        (tmp_path / "notes.txt").write_text("text")
        assert "give the path of one of them, 'epoch=1.ckpt', 'last.ckpt'." in self.refused(tmp_path, capsys)

    def test_nothing_and_links_to_nothing(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
        (tmp_path / "a").symlink_to(tmp_path / "b")
        (tmp_path / "b").symlink_to(tmp_path / "a")
        for name in ("missing", "dangling", "a"):
            assert name in self.refused(tmp_path / name, capsys)

    @pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
    def test_what_never_answers(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        os.mkfifo(tmp_path / "pipe")
        assert "no regular file" in self.refused(tmp_path / "pipe", capsys)

    def test_urls(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "my file.pt").write_bytes(good())
        url = (tmp_path / "my file.pt").as_uri()
        assert "%20" in url
        assert len(open_checkpoint(url)) == 2
        assert not verify_checkpoint(url).is_damaged
        load_weights(nn.Linear(4, 4), url)
        assert main(["inspect", url]) == main(["verify", url]) == 0
        capsys.readouterr()
        for call in (open_checkpoint, verify_checkpoint):
            with pytest.raises(FileNotFoundError, match="Not a local file; copy it"):
                call("nowhere://bucket/model.ckpt")
        assert main(["inspect", "nowhere://bucket/model.ckpt"]) == 2

    @pytest.mark.parametrize("wrong", [io.BytesIO(), 3, None, ["a"]])
    def test_what_is_no_path(self, wrong: object) -> None:
        for call in (open_checkpoint, verify_checkpoint, lambda path: load_weights(nn.Linear(4, 4), path)):
            with pytest.raises(TypeError, match="A checkpoint is given by its path"):
                call(wrong)  # type: ignore[arg-type]
        if isinstance(wrong, io.BytesIO):
            with pytest.raises(TypeError, match="save its content to a file"):
                open_checkpoint(wrong)  # type: ignore[arg-type]


FOLDERS = ["archive/", "archive/data/", "archive/.data/"]


@pytest.mark.parametrize("where", ["first", "last"])
def test_entries_for_folders_are_no_damage(where: str, tmp_path: Path) -> None:
    """As zip tools write them; torch reads such files."""
    with zipfile.ZipFile(io.BytesIO(good())) as source:
        records = {name: source.read(name) for name in source.namelist()}
    with zipfile.ZipFile(tmp_path / "file", "w") as archive:
        for name in FOLDERS if where == "first" else ():
            archive.writestr(zipfile.ZipInfo(name), b"")
        for name, data in records.items():
            archive.writestr(name, data)
        for name in FOLDERS if where == "last" else ():
            folder = zipfile.ZipInfo(name)
            folder.external_attr = 0x10
            archive.writestr(folder, b"")
    torch.load(tmp_path / "file")
    report = verify_checkpoint(tmp_path / "file")
    assert report.is_verified, str(report)
    load_weights(nn.Linear(4, 4), tmp_path / "file")
