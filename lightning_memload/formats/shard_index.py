"""Finds the files of a sharded checkpoint with the index of Hugging Face, for every format of the shards.

Users edit the index, copy it without some shards, or forget to update it. So it only decides which files belong to the
checkpoint. The tensors are read from the files themselves.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Sequence

from lightning_memload.errors import CheckpointFormatError, listed
from lightning_memload.formats.json_text import COPY_AGAIN, MAX_HEADER_BYTES, parse_json, short
from lightning_memload.storage.places import is_file, is_folder, names_in, open_file
from lightning_memload.units import counted

__all__ = [
    "INDEX_SUFFIX",
    "WHOLE_SAFETENSORS",
    "WHOLE_TORCH",
    "find_shards",
    "holds_torch_shards",
    "is_shard_index",
    "is_torch_index",
    "keep_last",
    "visible_names",
]

INDEX_SUFFIX = ".index.json"
# Names of files that hold a whole checkpoint, by convention of transformers and diffusers. Other files may hold other
# things, for example optimizer states.
WHOLE_SAFETENSORS = ("model.safetensors", "diffusion_pytorch_model.safetensors")
WHOLE_TORCH = ("pytorch_model.bin", "diffusion_pytorch_model.bin")


def visible_names(folder: str) -> list[str]:
    """The names in a directory, sorted, without hidden ones: these come from downloads or other systems."""
    return sorted(name for name in names_in(folder) if not name.startswith("."))


def is_shard_index(path: str) -> bool:
    """Whether a file is JSON text with a ``weight_map``; damaged JSON counts as well."""
    with open_file(path) as file:
        start = file.pread(64, 0)
        # Not a safetensors file: text has no zero byte, but every valid length of a safetensors header has one.
        if not start.lstrip().startswith(b"{") or b"\0" in start[:9]:
            return False
        return b'"weight_map"' in file.pread(min(file.size_bytes, MAX_HEADER_BYTES), 0)


def holds_torch_shards(folder: str) -> bool:
    """Whether the weights in a directory are files of ``torch.save``. ``False`` if it has safetensors files too."""
    names = visible_names(folder)
    if any(name in WHOLE_SAFETENSORS or name.endswith(f".safetensors{INDEX_SUFFIX}") for name in names):
        return False
    return any(name in WHOLE_TORCH or name.endswith(f".bin{INDEX_SUFFIX}") for name in names)


def is_torch_index(path: str) -> bool:
    """Whether a file is an index of shards of ``torch.save``, judged by its name, or else by the shards' names."""
    if not is_shard_index(path):
        return False
    if path.endswith((f".bin{INDEX_SUFFIX}", f".safetensors{INDEX_SUFFIX}")):
        return path.endswith(f".bin{INDEX_SUFFIX}")
    try:
        return not all(name.endswith(".safetensors") for name in read_shard_names(path))
    except CheckpointFormatError:
        return False


def find_shards(path: str, suffix: str, whole: Sequence[str]) -> list[str] | None:
    """The files of a checkpoint, sorted by name.

    Args:
        path: A directory, an index of shards, or one file of weights.
        suffix: The suffix of the shards' names, such as ``".safetensors"``.
        whole: Conventional names of files that hold a whole checkpoint. In a directory without an index, such a file is
            the checkpoint, and all other files are ignored.

    Returns:
        The paths. ``None`` for a directory that has neither an index nor such a file.

    Raises:
        CheckpointFormatError: There are several indexes, the index is damaged, or it names missing files.
    """
    if not is_folder(path):
        if not is_shard_index(path):
            return [path]
        # A symbolic link is not resolved: in a Hugging Face cache the shards are in the directory of the link.
        return _listed_shards(path, os.path.dirname(path), path)
    names = visible_names(path)
    indexes = [name for name in names if name.endswith(suffix + INDEX_SUFFIX)]
    if len(indexes) > 1:
        raise CheckpointFormatError(
            f"{path} holds {len(indexes)} indexes ({listed(map(short, indexes))}), so which one to use is ambiguous. "
            "Give the path of one of them.",
            path=path,
        )
    if indexes:
        return _listed_shards(path, path, os.path.join(path, indexes[0]))
    found = [name for name in whole if is_file(os.path.join(path, name))]
    return [os.path.join(path, found[0])] if found else None


def _listed_shards(path: str, folder: str, index_path: str) -> list[str]:
    shards = read_shard_names(index_path)
    missing = [name for name in shards if not is_file(os.path.join(folder, name))]
    if missing:
        others = [
            name
            for name in visible_names(folder or ".")
            if name.endswith(os.path.splitext(missing[0])[1]) and name not in shards
        ]
        advice = "Copy or download them again."
        if others:
            advice += (
                f" The index does not name {listed(map(short, others))}, which are there too. If these files are the "
                "checkpoint, the index belongs to another one: give their own index, or remove this one."
            )
        raise CheckpointFormatError(
            f"{path} is not complete: of its {len(shards)} files {len(missing)} are missing or no regular files: "
            f"{listed(map(short, missing))}. {advice}",
            path=path,
        )
    return [os.path.join(folder, name) for name in shards]


def read_shard_names(path: str) -> list[str]:
    """The names of the shards in an index, sorted. A name may include folders.

    Raises:
        CheckpointFormatError: The file is not such an index, or a name in it is not that of a file in its directory.
    """
    with open_file(path) as file:
        if file.size_bytes > MAX_HEADER_BYTES:
            raise CheckpointFormatError(
                f"{path} has {file.size_bytes} bytes, but an index of shards has at most {MAX_HEADER_BYTES}. "
                f"{COPY_AGAIN}",
                path=path,
            )
        index = parse_json(file.pread(file.size_bytes, 0), path, "the index")
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict):
        raise CheckpointFormatError(
            f"{path}: weight_map must map the names of tensors to the names of files, but is "
            f"{short(weight_map)}. {COPY_AGAIN}",
            path=path,
        )
    refused = [f"{short(name)} for {short(key)}" for key, name in weight_map.items() if not _stays_within(name)]
    if refused:
        raise CheckpointFormatError(
            f"{path} names {len(refused)} shards that are not files in its own directory: {listed(refused)}. Put the "
            "shards into the directory of the index.",
            path=path,
        )
    return sorted(set(weight_map.values()))


def _stays_within(name: object) -> bool:
    """Whether a shard's name is inside the directory. A symbolic link there may point outside, as in a cache."""
    if not isinstance(name, str) or any(sign in name for sign in "\\\0"):
        return False
    return all(part not in ("", ".", "..") for part in name.split("/"))


def keep_last(path: str, found: Iterable[tuple[str, str]]) -> dict[str, str]:
    """The file from which each tensor is read. The last one, if several files have it, as in Hugging Face's loaders.

    Args:
        path: The checkpoint.
        found: Pairs of a tensor's name and its file, in the order of the files.
    """
    holders: dict[str, str] = {}
    twice: list[str] = []
    for key, shard in found:
        if key in holders:
            twice.append(f"{short(key)} ({os.path.basename(holders[key])} and {os.path.basename(shard)})")
        holders[key] = shard
    if twice:
        warnings.warn(
            f"{path} holds {counted(len(twice), 'tensor')} in two shards, and each is taken from the last one: "
            f"{listed(twice)}.",
            stacklevel=2,
        )
    return holders
