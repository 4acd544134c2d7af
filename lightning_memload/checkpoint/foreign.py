"""Describes files that are not checkpoints, from their first bytes or the names in them.

Users give paths of files that should have been checkpoints: an HTML page of a server, a pointer of Git LFS, an archive
that contains the checkpoint. The sentences complete an error message. They are a guess: the rest of the file is not
checked.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence

from lightning_memload.errors import listed
from lightning_memload.storage.places import names_in, read_start

__all__ = ["describe_directory", "describe_file", "describe_zip"]

_START_BYTES = 4096

_PACKED = "Unpack it first."
_SENT = "A server sent it instead of the file: download the file again, with your access token if it needs one."
_CONVERT = "Convert it with the program that wrote it."

# The first bytes of a file, its description, and the advice.
_MAGIC: tuple[tuple[bytes, str, str], ...] = (
    (
        b"version https://git-lfs",
        "a pointer of Git LFS, not the file itself",
        "Run 'git lfs pull' in its repository, or download the file.",
    ),
    (b"\x1f\x8b", "compressed with gzip", _PACKED),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd", _PACKED),
    (b"BZh", "compressed with bzip2", _PACKED),
    (b"\xfd7zXZ\0", "compressed with xz", _PACKED),
    (b"\x04\x22\x4d\x18", "compressed with lz4", _PACKED),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", _PACKED),
    (b"Rar!", "a RAR archive", _PACKED),
    (b"PK\x05\x06", "an empty zip archive", "Copy or download it again."),
    (b"GGUF", "a GGUF file of llama.cpp", _CONVERT),
    (b"ggml", "a GGML file of llama.cpp", _CONVERT),
    (b"lmgg", "a GGML file of llama.cpp", _CONVERT),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file, as Keras writes it", _CONVERT),
    (b"\x93NUMPY", "a .npy file of numpy", "Read it with numpy.load."),
    (b"TFL3", "a TensorFlow Lite model", _CONVERT),
    (b"\x89PNG", "a picture", "Give the path of the checkpoint."),
    (b"\x7fELF", "a program", "Give the path of the checkpoint."),
    (b"%PDF", "a PDF document", "Give the path of the checkpoint."),
    (b"PAR1", "a Parquet file", "Give the path of the checkpoint."),
    (b"\x08\x07\x12\x07pytorch", "an ONNX model", _CONVERT),
)
_CHECKPOINT_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin", ".safetensors")
_PICKLE_START = re.compile(rb"\A\(?[\]})(ldt]?(?:lp0|dp0|cp|c[a-z_.]+\n)")


def describe_file(path: str) -> str | None:
    """One or two sentences that describe a regular file and give advice. ``None`` if its kind is unknown.

    Raises:
        OSError: It cannot be read.
    """
    start = read_start(path, _START_BYTES)
    if not start:
        return "It is empty: the save or the copy was not finished. Copy it again, or resume from another checkpoint."
    for magic, what, advice in _MAGIC:
        if start.startswith(magic):
            return f"It is {what}. {advice}"
    if not start.strip(b"\0"):
        return (
            "It begins with zeros: its space was reserved, but the data was never written. Copy it again, or resume "
            "from another checkpoint."
        )
    if start[4:8] == b"TFL3":
        return f"It is a TensorFlow Lite model. {_CONVERT}"
    if b"PK\x03\x04" in start[1:64]:
        return "A zip archive begins in it after other bytes. Copy it again, in binary mode."
    return _describe_text(start)


def _describe_text(start: bytes) -> str | None:
    words = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if words.startswith((b"<!doctype html", b"<html", b"<head", b"<body")):
        return f"It is an HTML page. {_SENT}"
    if words.startswith((b"<?xml", b"<error")):
        return f"It is an XML document. {_SENT}"
    if _PICKLE_START.match(start):
        return "It is a pickle that torch.save did not write. Read it with the program that wrote it."
    if not _is_text(start):
        return None
    shown = start[:80].decode("utf-8", "replace").strip()
    if words.startswith((b"{", b"[")):
        return f"It is JSON text ({shown!r}). {_SENT}"
    return f"It is text ({shown!r}). Give the path of the checkpoint."


def _is_text(start: bytes) -> bool:
    try:
        text = start[:-4].decode() if len(start) == _START_BYTES else start.decode()
    except UnicodeDecodeError:
        return False
    return all(sign.isprintable() or sign.isspace() for sign in text)


def describe_zip(names: Sequence[str]) -> str:
    """One or two sentences that describe a zip archive that ``torch.save`` did not write, from the names in it."""
    tails = {name.partition("/")[2] for name in names}
    if "constants.pkl" in tails and any(tail.startswith("code/") for tail in tails):
        return (
            "It is a TorchScript archive. torch.jit.load reads it: save torch.jit.load(path).state_dict() with "
            "torch.save."
        )
    if names and all(name.endswith(".npy") for name in names):
        return "It is an .npz archive of numpy. Read it with numpy.load, and save what is in it with torch.save."
    if "archive_format" in tails or any(tail.startswith("models/") for tail in tails):
        return (
            "It is a program of torch.export (.pt2). torch.export.load reads it: save "
            "torch.export.load(path).state_dict with torch.save."
        )
    within = [name for name in names if name.lower().endswith(_CHECKPOINT_SUFFIXES) and "/data/" not in name]
    if within:
        return f"It is a zip archive that contains {listed(map(repr, within), most=3)}. {_PACKED}"
    if "data.pkl" in names or any("\\" in name for name in names):
        return (
            "Its records are not in one folder of the archive: it was unpacked and packed again. Pack the folder, not "
            "its content."
        )
    return f"It is a zip archive of {listed(map(repr, names), most=3) or 'nothing'}, but holds no data.pkl."


def describe_directory(path: str, is_checkpoint: Callable[[str], bool]) -> str:
    """Sentences that describe a directory that is not a checkpoint, and name the checkpoints in it.

    Args:
        path: The directory.
        is_checkpoint: Whether a path has a known format.

    Raises:
        OSError: It cannot be listed.
    """
    names = sorted(name for name in names_in(path) if not name.startswith("."))
    if not names:
        return "It is empty."
    found = [name for name in names if is_checkpoint(os.path.join(path, name))]
    if found:
        return f"It holds checkpoints: give the path of one of them, {listed(map(repr, found))}."
    return f"It holds {listed(map(repr, names), most=5)}, none of which is a checkpoint."
